"""This module recomputes delayed updates in numpy float64 from the closed forms, without autograd, clock and stages."""

from itertools import pairwise

import numpy as np


def delayed_updates(
    weights,
    biases,
    owners,
    microbatches,
    delays,
    learning_rate,
    drains=(),
    stashing=False,
    accumulate=lambda first: 1,
    factor=lambda stage, k: 1.0,
    rule=lambda state, weight, gradient, rate, staleness: weight - rate * gradient,
):
    """Train a tanh network on squared error with the weight versions of the asynchronous pipeline.

    Every layer l belongs to stage owners[l]. Micro-batch k has its forward with the weights of version max(0, k −
    delay) and its backward with the weights of version k, or with those of its forward if `stashing`. Then the weights
    are updated.

    Args:
        weights: per layer, (out, in).
        biases: per layer, (out,).
        owners: per layer, its stage.
        microbatches: (inputs, targets, loss weight) triples; the loss is the mean square over all elements.
        delays: per stage.
        learning_rate: of all layers.
        drains: micro-batches before which the pipeline has run empty.
        stashing: whether the backward uses the forward's weights.
        accumulate: the number of micro-batches per update, as a function of the first micro-batch since the last drain.
        factor: the factor of the learning rate, as a function of the stage and the last micro-batch of an update.
        rule: the optimizer's rule, which returns the new weights or biases. It may keep something in ``state``. The
            staleness is that of updates after every micro-batch.
    """
    parameters = list(zip(weights, biases, strict=True))
    states = [({}, {}) for _ in owners]
    for first, end in pairwise([0, *drains, len(microbatches)]):
        history = [parameters]  # before the backward of each micro-batch
        gradients = [(0, 0) for _ in owners]
        for k, (x, target, share) in enumerate(microbatches[first:end]):
            seen = [history[max(0, k - delays[stage])] for stage in owners]
            inputs, outputs = [], []
            for layer in range(len(owners)):
                weight, bias = seen[layer][layer]
                inputs.append(x)
                x = x @ weight.T + bias
                x = np.tanh(x) if layer < len(owners) - 1 else x
                outputs.append(x)
            error = share * 2 * (x - target) / x.size
            for layer in reversed(range(len(owners))):
                if layer < len(owners) - 1:
                    error = error * (1 - outputs[layer] ** 2)
                of_weight, of_bias = gradients[layer]
                gradients[layer] = of_weight + error.T @ inputs[layer], of_bias + error.sum(0)
                error = error @ (seen[layer][layer][0] if stashing else history[k][layer][0])
            updated = list(history[k])
            if (k + 1) % accumulate(first) == 0 or first + k + 1 == end:
                for layer, stage in enumerate(owners):
                    rate, staleness = learning_rate * factor(stage, first + k), min(k, delays[stage])
                    updated[layer] = tuple(
                        rule(state, parameter, gradient, rate, staleness)
                        for state, parameter, gradient in zip(
                            states[layer], updated[layer], gradients[layer], strict=True
                        )
                    )
                gradients = [(0, 0) for _ in owners]
            history.append(updated)
        parameters = history[-1]
    return [weight for weight, _ in parameters], [bias for _, bias in parameters]
