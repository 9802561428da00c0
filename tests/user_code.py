"""LightningModules as users write them, without a pipeline in mind."""

import asyncio
import contextlib
import copy
import functools
import io
import itertools
import pickle
import random
import threading
import types
import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities import grad_norm
from lightning_modules import Samples
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.autograd.graph import disable_saved_tensors_hooks, register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertModel


def perceptron():
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


class Plain(L.LightningModule):
    """The module that most others change. Tests cut it at `net.2` and `net.4`."""

    lr, momentum, batch_size, length = 0.1, 0.9, 6, 17

    def __init__(self):
        super().__init__()
        self.net = perceptron()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, self.momentum)

    def collate(self, samples):
        return default_collate(samples)

    def train_dataloader(self):
        return DataLoader(Samples(length=self.length), self.batch_size, collate_fn=self.collate)


class Layered(Plain):
    """A module that calls its layers in a loop and lets subclasses act between them."""

    def forward(self, x):
        for index, layer in enumerate(self.net):
            x = self.between(index, layer(x))
        return x

    def between(self, index, h):
        return h


# ------------------------------------------------------------------- autograd


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.name, ctx.scale = "reverse", scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        assert ctx.name == "reverse"
        return -ctx.scale * grad, None


class GradientReversal(Layered):
    def __init__(self):
        super().__init__()
        self.domain = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.net[:4](x)
        domain = F.cross_entropy(self.domain(Reverse.apply(h, 0.3)), (y > 0).long())
        return F.cross_entropy(self.net[4:](h), y) + domain


class Round(torch.autograd.Function):
    """Straight-through rounding, with a saved tensor and other state on ctx."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.limits = {"max": 0.9}
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < ctx.limits["max"])


class StraightThrough(Layered):
    def between(self, index, h):
        return Round.apply(h) if index in (1, 3) else h


class Multiply(torch.autograd.Function):
    """A product that keeps its weight on ctx, where saved-tensor hooks do not see it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.name, ctx.x, ctx.weight = "multiply", x, weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, grad.t() @ ctx.x


class OwnLinear(nn.Linear):
    def forward(self, x):
        return Multiply.apply(x, self.weight) + self.bias


class WeightOnContext(Plain):
    def __init__(self):
        super().__init__()
        self.net[2] = OwnLinear(8, 8)


class RunInFunction(torch.autograd.Function):
    """A custom checkpoint: modules are called in the forward, and again in the backward."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        y.backward(grad)
        return None, x.grad


class OwnCheckpoint(Plain):
    inside = slice(4, 6)

    def forward(self, x):
        start, stop = self.inside.start, self.inside.stop
        return self.net[stop:](RunInFunction.apply(self.net[start:stop], self.net[:start](x)))


class OwnCheckpointOverABoundary(OwnCheckpoint):
    inside = slice(1, 5)


class NoGradBlock(Layered):
    def between(self, index, h):
        with torch.no_grad():
            scale = h.abs().amax(1, keepdim=True) + 1
        return h / scale


class GradModeByHand(Plain):
    """A module that switches gradients off and on over boundaries without a context manager."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        torch.set_grad_enabled(False)
        target = self.net(-x).softmax(1)
        torch.set_grad_enabled(True)
        logits = self.net[6](torch.tanh(self.net[4](torch.tanh(self.net[2](torch.tanh(self.net[0](x)))))))
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, target)


class Autocast(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch[0].float(), batch[1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.net(x)
        with torch.autocast("cpu", enabled=False):
            return F.cross_entropy(logits.float(), y)


class DefaultDtype(Layered):
    """A module that sets another default dtype over the boundaries of a float64 network."""

    def training_step(self, batch, batch_idx):
        torch.set_default_dtype(torch.float32)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            torch.set_default_dtype(torch.float64)

    def between(self, index, h):
        return h * torch.tensor([0.1]).double()


class Probe(Plain):
    """A head on a frozen backbone, which is called without a graph."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        with torch.no_grad():
            h = self.net(x)
        return self.head(h)


class Teacher(Plain):
    """A teacher that follows the student by a running mean after each update."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        with torch.no_grad():
            target = self.teacher(x + 0.1).softmax(1)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, target)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.1)


class TargetNetwork(Plain):
    """Q-learning: the step sometimes copies the network into the target, and calls the target first."""

    def __init__(self):
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.global_step % 2 == 0:
            self.target.load_state_dict(self.net.state_dict())
        with torch.no_grad():
            best = self.target(x.roll(1, 1)).max(1).values
        return F.smooth_l1_loss(self.net(x).gather(1, y[:, None])[:, 0], y + 0.9 * best)


class CopiesTheNetworkInTheStep(Plain):
    """A module that copies the network, with everything that is hooked to it, in the step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            target = copy.deepcopy(self.net)(-x).softmax(1)
        logits = self.net(x)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, target)


class PicklesTheNetwork(Plain):
    def on_train_epoch_end(self):
        assert pickle.loads(pickle.dumps(self.net))[0].weight.equal(self.net[0].weight)


class InputPenalty(Plain):
    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(self.net(x), batch[1])
        (slope,) = torch.autograd.grad(self.net(x).square().sum(1).mean() * len(x), x, create_graph=True)
        return loss + slope.square().sum(1).mean()


class PenaltyOfOneCall(Plain):
    """A gradient penalty for which the network is called only once, so no parameter is in two stages."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        logits = self.net(x)
        (slope,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().sum(1).mean()


class PenaltyInTheLastStage(Plain):
    def training_step(self, batch, batch_idx):
        h = self.net[:4](batch[0])
        logits = self.net[4:](h)
        (slope,) = torch.autograd.grad(logits.square().sum(), h, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().sum(1).mean()


class Adversarial(Plain):
    """Adversarial training: gradients of the input first, then a step on the changed input."""

    def training_step(self, batch, batch_idx):
        x, y = batch[0].clone().requires_grad_(), batch[1]
        (slope,) = torch.autograd.grad(F.cross_entropy(self.net(x), y, reduction="sum"), x)
        return F.cross_entropy(self.net(x.detach() + 0.1 * slope.sign()), y)


class BalancesLosses(Plain):
    """Two losses that are balanced by their gradients at a layer of an early stage."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        losses = [F.cross_entropy(logits, y), logits.square().mean()]
        weight = self.net[0].weight
        norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in losses]
        return losses[0] + losses[1] * norms[0] / norms[1]


class TensorHooks(Layered):
    def between(self, index, h):
        if h.requires_grad:
            h.register_hook(lambda grad: 0.5 * grad)
        return h


class HookOfSeveralTensors(Layered):
    """A hook over the outputs of all layers, which runs once per backward."""

    mode, last = "all", None

    def training_step(self, batch, batch_idx):
        self.hidden = []
        loss = super().training_step(batch, batch_idx)
        register_multi_grad_hook(self.hidden[: self.last], self.measure, mode=self.mode)
        return loss

    def between(self, index, h):
        self.hidden.append(h)
        return h

    def measure(self, gradients):
        self.log("norm", sum(gradient.norm() for gradient in gradients if gradient is not None))


class HookOfAnyTensor(HookOfSeveralTensors):
    mode = "any"


class HookInTheFirstStage(HookOfSeveralTensors):
    last = 2

    def measure(self, gradients):
        assert all(gradient is not None for gradient in gradients)


class HookOfAllParameters(Plain):
    def on_fit_start(self):
        register_multi_grad_hook([*self.parameters()], lambda gradients: None)


class ParameterHooks(Plain):
    def __init__(self):
        super().__init__()
        for p in self.net.parameters():
            p.register_hook(lambda grad: 2 * grad)


class GradientsAfterAccumulation(Plain):
    def __init__(self):
        super().__init__()
        for p in self.net.parameters():
            p.register_post_accumulate_grad_hook(self.clamp)

    @staticmethod
    def clamp(p):
        p.grad.clamp_(-0.01, 0.01)


class RetainsGradients(Plain):
    """A module that reads the retained gradient of an activation after the backward."""

    def training_step(self, batch, batch_idx):
        self.h = self.net[:4](batch[0])
        self.h.retain_grad()
        return F.cross_entropy(self.net[4:](self.h), batch[1])

    def on_after_backward(self):
        if self.h.grad is not None and self.net[0].weight.grad is not None:
            self.net[0].weight.grad /= 1 + self.h.grad.norm()


class Checkpointed(Plain):
    reentrant, inside = False, slice(4, 6)

    def forward(self, x):
        start, stop = self.inside.start, self.inside.stop
        h = self.net[:start](x)
        h = checkpoint(self.net[start:stop], h, use_reentrant=self.reentrant)
        return self.net[stop:](h)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CheckpointedOverABoundary(Checkpointed):
    inside = slice(1, 5)


class CheckpointedReentrantOverABoundary(CheckpointedOverABoundary):
    reentrant = True


class CheckpointedDropout(Checkpointed):
    def __init__(self):
        super().__init__()
        self.net[5] = nn.Dropout(0.4)


class SavedTensorHooks(Plain):
    def training_step(self, batch, batch_idx):
        with saved_tensors_hooks(lambda x: (x.shape, x.numpy(force=True)), lambda x: torch.from_numpy(x[1])):
            return super().training_step(batch, batch_idx)


class SavedOnCpu(Plain):
    def forward(self, x):
        with save_on_cpu():
            return super().forward(x)


class Doubles(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.tanh else out


class FunctionMode(Plain):
    def forward(self, x):
        with Doubles():
            return super().forward(x)


class Tanhs(TorchDispatchMode):
    """A dispatch mode that, like FlopCounterMode, sees the operations of its own block only."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.tanh.default
        return func(*args, **(kwargs or {}))


class DispatchMode(Plain):
    def training_step(self, batch, batch_idx):
        with Tanhs() as mode:
            logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) * mode.count


class Vectorised(Plain):
    def forward(self, x):
        return vmap(self.net)(x)


class VectorisedHead(Plain):
    def forward(self, x):
        return vmap(self.net[5:])(self.net[:5](x))


class BoundaryInInferenceMode(Plain):
    def training_step(self, batch, batch_idx):
        with torch.inference_mode():
            target = self.net(-batch[0]).softmax(1)
        return F.cross_entropy(self.net(batch[0]), target.clone())


class InferenceModeElsewhere(Plain):
    def __init__(self):
        super().__init__()
        self.target = perceptron()

    def training_step(self, batch, batch_idx):
        with torch.inference_mode():
            target = self.target(batch[0]).softmax(1)
        return F.cross_entropy(self.net(batch[0]), target.clone())


class NoisyWeights(Plain):
    """A module that runs the network with other weights in place of its own."""

    def forward(self, x):
        return functional_call(self.net, {name: p * 1.1 for name, p in self.net.named_parameters()}, (x,))


class SlowWeights(Plain):
    """A teacher without gradients: the network with other weights, which the teacher owns."""

    def __init__(self):
        super().__init__()
        slow = perceptron()
        for name, p in slow.named_parameters():
            self.register_buffer(name.replace(".", "_"), p.detach())

    def training_step(self, batch, batch_idx):
        x, y = batch
        weights = {name: getattr(self, name.replace(".", "_")) for name, _ in self.net.named_parameters()}
        with torch.no_grad():
            target = functional_call(self.net, weights, (x,)).softmax(1)
        logits = self.net(x)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, target)


class MovesWeights(Plain):
    """A module that changes weights in place for the forward and changes them back."""

    def training_step(self, batch, batch_idx):
        for p in self.net.parameters():
            p.data.mul_(2)
        loss = super().training_step(batch, batch_idx)
        for p in self.net.parameters():
            p.data.div_(2)
        return loss


class ClampsWeights(Plain):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for p in self.net.parameters():
                p.clamp_(-0.2, 0.2)
        return super().training_step(batch, batch_idx)


class FreezesForAWhile(Plain):
    """A module that switches requires_grad off and on again, over boundaries."""

    def training_step(self, batch, batch_idx):
        self.net[4].requires_grad_(False)
        logits = self.net(batch[0])
        self.net[4].requires_grad_(True)
        return F.cross_entropy(logits, batch[1])


# -------------------------------------------------------------- random numbers


class Dropout(Plain):
    def __init__(self):
        super().__init__()
        self.net[1], self.net[3], self.net[5] = (nn.Sequential(nn.Tanh(), nn.Dropout(0.3)) for _ in range(3))


class LayerDrop(Layered):
    """A module that leaves out layers of equal sizes at random."""

    def draw(self):
        return random.random()

    def forward(self, x):
        for index, layer in enumerate(self.net):
            if index not in (2, 3, 5) or self.draw() < 0.6:
                x = layer(x)
        return x


class LayerDropNumpy(LayerDrop):
    def draw(self):
        return np.random.rand()


class LayerDropTorch(LayerDrop):
    def draw(self):
        return torch.rand(()).item()


class LayerDropOwnGenerator(LayerDrop):
    def __init__(self):
        super().__init__()
        self.random, self.numpy = random.Random(0), np.random.default_rng(0)

    def draw(self):
        return (self.random.random() + self.numpy.random()) / 2


class Noise(Layered):
    def between(self, index, h):
        return h + 0.1 * torch.randn_like(h)


class NoiseOfItsOwnGenerator(Layered):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def between(self, index, h):
        return h + 0.1 * torch.randn(h.shape, generator=self.generator, dtype=h.dtype)


class SeedsInTheStep(Layered):
    """A module that adds the same noise to all samples, seeded at the start of the step and drawn in every stage."""

    def training_step(self, batch, batch_idx):
        torch.manual_seed(batch_idx)
        return super().training_step(batch, batch_idx)

    def between(self, index, h):
        return h + 0.1 * torch.randn(h.shape[1], dtype=h.dtype)


class ForksRandomNumbers(SeedsInTheStep):
    def training_step(self, batch, batch_idx):
        with torch.random.fork_rng():
            return super().training_step(batch, batch_idx)


# ------------------------------------------------------- the trainer and hooks


class UsesTheTrainer(Layered):
    def between(self, index, h):
        return h * (1 + 0.1 * self.current_epoch + 0.01 * self.global_step) / self.trainer.max_epochs

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return loss * (1 + batch_idx) / self.trainer.num_training_batches


class ReadsGradients(Plain):
    """A module that reads the gradients of the last step, which Lightning clears only after training_step."""

    def training_step(self, batch, batch_idx):
        gradient = self.net[0].weight.grad
        return super().training_step(batch, batch_idx) / (1 + (0 if gradient is None else gradient.abs().sum()))


class ModuleHooks(Plain):
    """Hooks that change arguments, attributes, outputs and gradients, at boundaries and elsewhere."""

    def __init__(self):
        super().__init__()
        for layer in self.net:
            layer.scale = 1.0
            layer.register_forward_pre_hook(self.before, with_kwargs=True)
            layer.register_forward_hook(lambda layer, args, out: out * layer.scale)
        self.net[2].register_full_backward_hook(lambda layer, grad_in, grad_out: tuple(2 * g for g in grad_in))
        self.net.register_full_backward_pre_hook(lambda layer, grad_out: tuple(3 * g for g in grad_out))
        self.net.register_full_backward_hook(lambda layer, grad_in, grad_out: None)

    @staticmethod
    def before(layer, args, kwargs):
        layer.scale = 1 + args[0].detach().abs().max().item() * 0
        layer.scale *= 0.9
        return tuple(a * 1.1 for a in args), kwargs


class Scaled(nn.Linear):
    def forward(self, x, *, scale=1.0, shift=None):
        return super().forward(x) * scale + (0 if shift is None else shift)


class KeywordArguments(Plain):
    def __init__(self):
        super().__init__()
        self.net[2], self.net[4] = Scaled(8, 8), Scaled(8, 8)
        self.net[2].register_forward_pre_hook(
            lambda layer, args, kwargs: (args, kwargs | {"scale": 2 * kwargs["scale"]}), with_kwargs=True
        )

    def forward(self, x):
        h = torch.tanh(self.net[0](x))
        h = torch.tanh(self.net[2](x=h, scale=x[:, :1].detach(), shift=h))
        return self.net[6](self.net[4](h, shift=h.mean()))


class CollectsFeatures(Plain):
    """A dictionary that forward hooks fill and that the loss reads."""

    def __init__(self):
        super().__init__()
        self.features = {}
        for index in (1, 3, 5):
            self.net[index].register_forward_hook(functools.partial(self.keep, str(index)))

    def keep(self, name, layer, args, out):
        self.features[name] = out

    def training_step(self, batch, batch_idx):
        self.features.clear()
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * sum(h.square().mean() for h in self.features.values())


class CollectsInAClosure(Plain):
    """Outputs in a local variable of `__init__`, to which no attribute of a module leads."""

    def __init__(self):
        super().__init__()
        features = []
        self.net[1].register_forward_hook(lambda layer, args, out: features.append(out))
        self.take = lambda: features.pop()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * self.take().square().mean()


class HooksOfTheStep(Plain):
    """Hooks that are registered at the start of the step and removed at its end."""

    def training_step(self, batch, batch_idx):
        kept = []
        handles = [layer.register_forward_hook(lambda layer, args, out: kept.append(out)) for layer in self.net]
        loss = super().training_step(batch, batch_idx)
        for handle in handles:
            handle.remove()
        return loss + sum(h.square().mean() for h in kept)


# ------------------------------------------------------- state and attributes


class KeepsLabels(Plain):
    def training_step(self, batch, batch_idx):
        self.x, self.y = batch
        return F.cross_entropy(self(self.x), self.y)


class KeepsLabelsInAnObject(Plain):
    def __init__(self):
        super().__init__()
        self.state = types.SimpleNamespace()

    def training_step(self, batch, batch_idx):
        self.state.y = batch[1]
        return F.cross_entropy(self(batch[0]), self.state.y)


LABELS = {}


class KeepsLabelsInAGlobal(Plain):
    def training_step(self, batch, batch_idx):
        LABELS["y"] = batch[1]
        return F.cross_entropy(self(batch[0]), LABELS["y"])


class KeepsLabelsOnTheClass(Plain):
    def training_step(self, batch, batch_idx):
        type(self).y = batch[1]
        return F.cross_entropy(self(batch[0]), self.y)


class LossWithMemory:
    """A loss that keeps its target and is no module."""

    def prepare(self, y):
        self.target = F.one_hot(y, 3).double()

    def __call__(self, logits):
        return (logits - self.target).square().mean()


class KeepsLabelsInTheLoss(Plain):
    def __init__(self):
        super().__init__()
        self.loss = LossWithMemory()

    def training_step(self, batch, batch_idx):
        self.loss.prepare(batch[1])
        return self.loss(self(batch[0]))


class Remembers(nn.Module):
    def forward(self, x):
        self.seen = x
        self.number = float(x.detach().mean())
        return x


class SkipsThroughAttributes(Plain):
    """An early layer keeps its input in an attribute, from which a late stage fetches it."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.Sequential(nn.Tanh(), Remembers())

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        memory = self.net[1][1]
        return F.cross_entropy(logits + memory.seen[:, :3], batch[1])


class NumberThroughAttributes(SkipsThroughAttributes):
    """A number in an attribute connects two stages, which no graph shows."""

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) * (1 + self.net[1][1].number)


class AuxiliaryList(Layered):
    def __init__(self):
        super().__init__()
        self.aux = []

    def between(self, index, h):
        self.aux.append(h.square().mean())
        return h

    def training_step(self, batch, batch_idx):
        self.aux.clear()
        loss = super().training_step(batch, batch_idx)
        assert len(self.aux) == 7
        return loss + sum(self.aux)


class AuxiliaryLater(AuxiliaryList):
    """Auxiliary losses from the second epoch on. The first mini-batch has none."""

    def between(self, index, h):
        return super().between(index, h) if self.current_epoch else h

    def training_step(self, batch, batch_idx):
        self.aux.clear()
        return Plain.training_step(self, batch, batch_idx) + sum(self.aux)


class AuxiliaryNewList(AuxiliaryList):
    def training_step(self, batch, batch_idx):
        self.aux = []
        return Plain.training_step(self, batch, batch_idx) + sum(self.aux)


class AuxiliaryTakenOut(AuxiliaryList):
    """A list that is empty when a step begins and when it ends."""

    def training_step(self, batch, batch_idx):
        loss = Plain.training_step(self, batch, batch_idx)
        while self.aux:
            loss = loss + self.aux.pop()
        return loss


class AuxiliaryDict(AuxiliaryList):
    def __init__(self):
        super().__init__()
        self.aux = {"losses": {}}

    def between(self, index, h):
        self.aux["losses"][index] = h.square().mean()
        return h

    def training_step(self, batch, batch_idx):
        self.aux["losses"].clear()
        loss = Plain.training_step(self, batch, batch_idx)
        return loss + sum(self.aux["losses"].values())


class AuxiliaryDeque(AuxiliaryList):
    def __init__(self):
        super().__init__()
        self.aux = deque(maxlen=7)

    def training_step(self, batch, batch_idx):
        loss = Plain.training_step(self, batch, batch_idx)
        return loss + sum(self.aux)


class AuxiliaryTuple(AuxiliaryList):
    """A tuple whose containers change, although the tuple does not."""

    def __init__(self):
        super().__init__()
        self.aux, self.places = [], ([], {})

    def between(self, index, h):
        self.places[0].append(index)
        self.places[1][index] = h.square().mean()
        return h

    def training_step(self, batch, batch_idx):
        self.places[0].clear()
        loss = Plain.training_step(self, batch, batch_idx)
        return loss * len(self.places[0]) + sum(self.places[1].pop(index) for index in self.places[0])


class AuxiliarySlots(AuxiliaryList):
    """A list whose elements every stage overwrites in every step."""

    def __init__(self):
        super().__init__()
        self.aux = [None] * 7

    def between(self, index, h):
        self.aux[index] = h.square().mean()
        return h

    def training_step(self, batch, batch_idx):
        return Plain.training_step(self, batch, batch_idx) + sum(self.aux)


class AuxiliaryBuffer(Layered):
    """A tensor whose elements every stage overwrites in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("aux", torch.zeros(7))

    def between(self, index, h):
        self.aux[index] = h.detach().square().mean()
        return h

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.aux.sum()


class AuxiliaryCounter(Layered):
    """A Counter, whose update adds instead of replacing."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def training_step(self, batch, batch_idx):
        self.calls.clear()
        return super().training_step(batch, batch_idx) * self.calls["layer"] / 7

    def between(self, index, h):
        self.calls["layer"] += 1
        return h * self.calls["layer"] / 4


class AuxiliaryDeleted(Plain):
    def training_step(self, batch, batch_idx):
        assert not hasattr(self, "labels")
        self.labels = batch[1]
        loss = F.cross_entropy(self(batch[0]), self.labels)
        del self.labels
        return loss


class AuxiliarySum(Layered):
    """An attribute to which every stage adds."""

    def training_step(self, batch, batch_idx):
        self.penalty = 0.0
        return super().training_step(batch, batch_idx) + self.penalty

    def between(self, index, h):
        self.penalty = self.penalty + h.square().mean()
        return h


class Mode(nn.Module):
    def forward(self, x):
        return x if self.training else 0.5 * x


class EvaluatesInTheStep(Plain):
    def __init__(self):
        super().__init__()
        self.net[3], self.net[5] = Mode(), Mode()

    def training_step(self, batch, batch_idx):
        self.net.eval()
        logits = self(batch[0])
        self.net.train()
        return F.cross_entropy(logits, batch[1])


class Carries(Plain):
    """A hidden state that is carried from step to step."""

    def __init__(self):
        super().__init__()
        self.hidden = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.net[:4](x)
        if self.hidden is not None:
            h = h + 0.5 * self.hidden
        self.hidden = h.detach().mean(0)
        return F.cross_entropy(self.net[4:](h), y)


class CarriesOverABoundary(Carries):
    """A hidden state that the first stage reads and the last stage writes."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.hidden is not None:
            x = x + self.hidden.mean()
        logits = self.net(x)
        self.hidden = logits.detach().mean(0)
        return F.cross_entropy(logits, y)


class CarriesInAList(Carries):
    def __init__(self):
        super().__init__()
        self.hidden = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x + sum(self.hidden))
        self.hidden[:] = [logits.detach().mean()]
        return F.cross_entropy(logits, y)


class CarriesInABuffer(Carries):
    def __init__(self):
        super().__init__()
        del self.hidden
        self.register_buffer("hidden", torch.zeros(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x + self.hidden.mean())
        self.hidden.copy_(logits.detach().mean(0))
        return F.cross_entropy(logits, y)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = None

    def forward(self, x):
        self.state = x if self.state is None else x + 0.5 * self.state.detach().mean(0)
        return self.state


class CarriesDeepInside(Plain):
    def __init__(self):
        super().__init__()
        self.net[3] = Recurrent()


class CarriesTheLoss(Plain):
    """A loss that is divided by its running mean."""

    mean = 1.0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss / self.mean


class Anneals(Layered):
    """A number that grows with every step and is read in every stage."""

    beta = 0.0

    def training_step(self, batch, batch_idx):
        self.beta = min(1.0, self.beta + 0.1)
        return super().training_step(batch, batch_idx)

    def between(self, index, h):
        return h * (1 + self.beta)


class AnnealsWithTheSteps(Anneals):
    """A number that grows with global_step, so nothing is carried."""

    def training_step(self, batch, batch_idx):
        self.beta = min(1.0, 0.1 * self.global_step)
        return Layered.training_step(self, batch, batch_idx)


class Hyperparameters(AnnealsWithTheSteps):
    def __init__(self, beta=0.0):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        self.hparams.beta = 0.1 * batch_idx
        return Layered.training_step(self, batch, batch_idx)

    def between(self, index, h):
        return h * (1 + self.hparams.beta)


class LooksAtTheBatchFirst(Plain):
    """A number of the whole mini-batch, which a hook sets before the step and the last stage reads."""

    def on_train_batch_start(self, batch, batch_idx):
        self.scale = batch[0].abs().mean()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale


class CountsInABuffer(Plain):
    """A counter that the first stage raises and the last stage reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx) / self.count


class CountsInAnArray(Plain):
    """Counters per class in a numpy array, which the last stage reads."""

    def __init__(self):
        super().__init__()
        self.counts = np.ones(3)

    def training_step(self, batch, batch_idx):
        np.add.at(self.counts, batch[1].numpy(), 1)
        loss = super().training_step(batch, batch_idx)
        return loss / float(self.counts.max())


class RebindsABuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def training_step(self, batch, batch_idx):
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        return F.cross_entropy(self(batch[0]) + self.mean[:3], batch[1])


class RunningScale(Plain):
    """A buffer that the backward needs and that the next step changes in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        h = torch.tanh(self.net[0](x))
        self.scale.lerp_(h.detach().abs().mean(), 0.1)
        return self.net[2:](h / self.scale)


class Standardise(nn.Module):
    """A layer that writes and reads running statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.steps += 1
        self.mean.lerp_(x.detach().mean(0), 1 / self.steps)
        return x - self.mean


class RunningMean(Plain):
    def __init__(self):
        super().__init__()
        self.net[1], self.net[3], self.net[5] = (nn.Sequential(Standardise(), nn.Tanh()) for _ in range(3))


class BatchNorm(Plain):
    def __init__(self):
        super().__init__()
        self.net[1], self.net[3] = nn.BatchNorm1d(8), nn.BatchNorm1d(8)


class Queue(Plain):
    """MoCo: a slow encoder that the step moves, and a queue of its outputs, all in the last stage."""

    def __init__(self):
        super().__init__()
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(18, 3), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch, batch_idx):
        query = F.normalize(self.net(batch[0]), dim=1)
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            key = F.normalize(self.slow(batch[0] + 0.1), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().t()], 1)
        self.queue[(self.pointer + torch.arange(len(key))) % len(self.queue)] = key
        self.pointer += len(key)
        return F.cross_entropy(logits / 0.2, torch.zeros(len(key), dtype=torch.long))


class QueueInTheFirstStage(Queue):
    """A slow encoder that the first stage calls, and a queue that the last stage writes.

    This works because no later stage has any of the encoder's layers.
    """

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            key = F.normalize(self.slow(batch[0] + 0.1), dim=1)
        query = F.normalize(self.net(batch[0]), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().t()], 1)
        self.queue[: len(key)] = key
        return F.cross_entropy(logits / 0.2, torch.zeros(len(key), dtype=torch.long))


class Quantise(nn.Module):
    """A codebook of running means, as in VQ-VAE."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 8))

    def forward(self, x):
        index = torch.cdist(x.detach(), self.codes).argmin(1)
        code = self.codes[index]
        if self.training:
            self.codes.index_add_(0, index, 0.1 * (x.detach() - code))
        return x + (code - x).detach(), (x - code).square().mean()


class Codebook(Plain):
    def __init__(self):
        super().__init__()
        self.quantise = Quantise()

    def training_step(self, batch, batch_idx):
        code, commitment = self.quantise(self.net[:4](batch[0]))
        return F.cross_entropy(self.net[4:](code), batch[1]) + commitment


class MaskOnDemand(Plain):
    """A mask that is made again when the shape has changed, as positional encodings often are."""

    def __init__(self):
        super().__init__()
        self.mask = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.mask is None or len(self.mask) != len(x):
            self.mask = torch.linspace(0.5, 0.5, len(x))[:, None]
        return F.cross_entropy(self(x) * self.mask, y)


class CachedProperty(Plain):
    @functools.cached_property
    def scale(self):
        return torch.linspace(1, 2, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]) * self.scale, batch[1])


class CachedMask(Plain):
    @functools.lru_cache  # noqa: B019
    def mask(self, width):
        return torch.linspace(1, 2, width)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0] * self.mask(6)) * self.mask(3), batch[1])


class KeepsOutputs(Plain):
    """A module that collects outputs in the step, and logs and clears them at the end of the epoch.

    Lightning advises users to do this.
    """

    def __init__(self):
        super().__init__()
        self.outputs = []

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.outputs.append(logits.detach().sum(1))
        return F.cross_entropy(logits, batch[1])

    def on_train_epoch_end(self):
        outputs = torch.cat(self.outputs)
        assert len(outputs) == self.length
        self.log("mean", outputs.mean())
        self.outputs.clear()


class KeepsOutputsOfStages(Layered):
    """A module that collects outputs of all layers."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def between(self, index, h):
        self.outputs.append(h.detach().mean(1))
        return h

    def on_train_epoch_end(self):
        outputs = torch.cat(self.outputs)
        assert len(outputs) == 7 * self.length
        self.log("mean", outputs.mean())
        self.outputs.clear()


class MetricOfStages(Layered):
    """A metric that every stage updates."""

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def between(self, index, h):
        self.mean.update(h.mean(1))
        return h

    def on_train_epoch_end(self):
        self.log("mean", self.mean)


class LeavesTraces(Layered):
    """A module that draws, counts, keeps and logs, which an earlier run of the step could leave behind."""

    def __init__(self):
        super().__init__()
        self.net[1], self.net[3] = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.calls, self.kept, self.drawn, self.counts = 0, [], [], np.zeros(1)
        self.register_buffer("buffer", torch.zeros(2))
        self.random, self.generator = random.Random(1), torch.Generator().manual_seed(2)
        self.metric = MeanMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls += 1
        self.counts += 1
        self.buffer[0] += 1
        numbers = random.random(), np.random.rand(), torch.rand(()).item(), self.random.random()
        self.drawn = [*numbers, torch.rand((), generator=self.generator).item()]
        logits = self(x)
        self.buffer[1] += 1
        self.metric.update(logits.mean(1))
        self.kept.append(logits.detach().mean().item())
        self.logger.log_metrics({"mean": self.kept[-1]})
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_epoch=True)
        return loss * numbers[0]

    def traces(self):
        after = [random.random(), np.random.rand(), torch.rand(()).item(), self.random.random()]
        after.append(torch.rand((), generator=self.generator).item())
        state = {name: value.tolist() for name, value in self.state_dict().items()}
        kept = {"calls": self.calls, "counts": self.counts.tolist(), "kept": self.kept, "drawn": self.drawn}
        return state | kept | {"metric": self.metric.compute().item(), "random numbers": after}


class KeepsAGraph(Plain):
    """A module that leaves an activation with its graph, which nothing reads and nothing can copy."""

    def training_step(self, batch, batch_idx):
        self.last = self.net[:3](batch[0])
        return F.cross_entropy(self.net[3:](self.last), batch[1])


class NotCopyable(Plain):
    def __init__(self):
        super().__init__()
        self.lock, self.lines = threading.Lock(), (x for x in itertools.count())
        self.tree = {"children": []}
        self.tree["children"].append(self.tree)
        self.parent = [self]
        self.net[2].owner = self.parent

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with self.lock:
            return loss * (self.net[2].owner[0] is self)


class TakesFromAGenerator(Plain):
    def __init__(self):
        super().__init__()
        self.scales = itertools.cycle([1.0, 0.5, 0.25])

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * next(self.scales)


# ----------------------------------------------------------- tensors in place


class WritesIntoTensors(Plain):
    def forward(self, x):
        h = self.net[1](self.net[0](x)) * 1
        h[:, 0] = 0
        g = self.net[2](h.clone())
        g += h
        h = self.net[4](g)
        h[:, 1:3] += x[:, :2]
        return self.net[6](F.relu_(h) + g)


class WritesAcrossTheBoundary(Plain):
    """A late stage writes into a tensor of an early stage, also through views."""

    def forward(self, x):
        h = self.net[0](x) * 1
        view = h[:, :4]
        g = self.net[2](h.tanh())
        h += g
        h2 = self.net[4](view.tanh().repeat(1, 2))
        view.mul_(2)
        return self.net[6](h2 + h)


class WritesIntoTheBatch(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x.mul_(2)
        x[:, 0] = 0
        return F.cross_entropy(self(x), y)


class TakesTheBatchApart(Plain):
    def collate(self, samples):
        x, y = default_collate(samples)
        return {"x": x, "y": y, "temperature": torch.tensor(1.0)}

    def training_step(self, batch, batch_idx):
        y = batch.pop("y")
        batch["temperature"] += 1
        return F.cross_entropy(self(batch["x"]) / batch["temperature"], y)


class Constants(Layered):
    def between(self, index, h):
        positions = torch.arange(h.shape[1], dtype=h.dtype)
        return h @ torch.eye(h.shape[1], dtype=h.dtype) + 0.01 * positions + torch.tensor(0.1)


class Embeds(Plain):
    """An embedding with sparse gradients, whose forward renormalises rows in place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 6, max_norm=0.5, sparse=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x + self.table((x[:, 0] > 0).long())), y)


# ------------------------------------------------------------------ the batch


class TimeFirst(Plain):
    """Batches with the samples along the second dimension."""

    def collate(self, samples):
        x, y = default_collate(samples)
        return x.t().contiguous(), y.expand(2, -1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x.t()), y[0])


class TimeFirstSplit(TimeFirst):
    def split_batch(self, batch, num_microbatches):
        x, y = batch
        return list(zip(x.tensor_split(num_microbatches, 1), y.tensor_split(num_microbatches, 1), strict=True))


class WithNames(Plain):
    def collate(self, samples):
        x, y = default_collate(samples)
        return {"x": x, "y": y, "names": [f"sample {len(str(v))}" for v in y], "kind": "train", "none": None}

    def training_step(self, batch, batch_idx):
        assert batch["kind"] == "train"
        assert batch["none"] is None
        assert len(batch["names"]) == len(batch["x"])
        return F.cross_entropy(self(batch["x"]), batch["y"])


class TwoLoaders(Plain):
    """Two loaders, one with twice as many samples as the other."""

    def train_dataloader(self):
        data = Samples(length=18)
        return {"labelled": DataLoader(data, self.batch_size // 2), "more": DataLoader(data, self.batch_size)}

    def training_step(self, batch, batch_idx):
        x, y = batch["labelled"]
        return F.cross_entropy(self.net(x), y) + self.net(batch["more"][0]).square().mean()


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class NamedTuples(Plain):
    def collate(self, samples):
        return Pair(*default_collate(samples))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.x), batch.y)


@dataclass
class Example:
    x: torch.Tensor
    y: torch.Tensor


class Dataclasses(NamedTuples):
    def collate(self, samples):
        return Example(*default_collate(samples))


# ---------------------------------------------------- signatures and the loss


class BatchOnly(Plain):
    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class Keywords(Plain):
    def training_step(self, batch, batch_idx, dataloader_idx=0, *, scale=0.5):
        assert (batch_idx, dataloader_idx) == (int(batch_idx), 0)
        return F.cross_entropy(self(batch[0]), batch[1]) * scale


class StepInAnAttribute(Plain):
    def __init__(self):
        super().__init__()
        self.training_step = self.step

    @torch.enable_grad()
    def step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class MaskedMean(Plain):
    """A mean over some of the samples, of which micro-batches have different numbers."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y.where(x[:, 0] > 0, -100))


class SeveralLosses(Plain):
    def training_step(self, batch, batch_idx):
        h = self.net[:4](batch[0])
        logits = self.net[4:](h)
        losses = {"class": F.cross_entropy(logits, batch[1]), "hidden": h.square().mean(), "size": logits.abs().mean()}
        return {"loss": sum(losses.values()), "logits": logits.detach(), "kind": "train", **losses}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["loss"].numel() == 1  # pyright: ignore[reportOptionalSubscript]


class LossOfAnEarlyStage(Plain):
    """A loss of an early stage. The late stages run but do not contribute."""

    def training_step(self, batch, batch_idx):
        h = self.net[:3](batch[0])
        loss = F.cross_entropy(h[:, :3], batch[1])
        self.log("entropy", self.net[3:](h).softmax(1).log().mean())
        return loss


class NoGradient(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).detach()


class AlwaysNone(Plain):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class SometimesNone(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class NoneForSomeData(Plain):
    """A module that skips some micro-batches and not others."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch[0].sum() > 0 else loss


class NoneBeforeTheNetwork(Plain):
    """A module that leaves the step before its boundaries."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class GradientNorms(Plain):
    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self.net, norm_type=2))


class Logs(Layered):
    def __init__(self):
        super().__init__()
        self.accuracy, self.mean = MulticlassAccuracy(3, average="micro"), MeanMetric()

    def between(self, index, h):
        self.log(f"layer{index}", h.mean(), on_step=False, on_epoch=True)
        return h

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.mean.update(logits.mean(1))
        self.log("sum", (logits.argmax(1) == batch[1]).double().sum(), reduce_fx="sum", on_epoch=True, on_step=False)
        self.log("largest", logits.max(), reduce_fx=torch.max, on_epoch=True, on_step=False)
        self.log_dict({"accuracy": self.accuracy, "mean": self.mean}, on_epoch=True, on_step=False)
        self.log("loss", loss, prog_bar=True)
        return loss


class OwnLog(Plain):
    def __init__(self):
        super().__init__()
        self.lines = 0

    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True)
        self.log(name="twice", value=2 * loss, on_epoch=True)
        return loss


# ------------------------------------------------------ gradients and updates


class HalvesGradients(Plain):
    """A module that halves gradients in a hook, which subclasses may change."""

    def halve(self, factor=0.5):
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)

    def on_after_backward(self):
        self.halve()


class DropsGradients(HalvesGradients):
    momentum = 0.0

    def on_after_backward(self):
        self.halve(0.0)


class RemovesGradients(Plain):
    """A module that removes the gradient of the first layer in every step."""

    def on_after_backward(self):
        self.net[0].weight.grad = None


class ClipsAfterBackward(Plain):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_([p for p in self.parameters() if p.grad is not None], 0.01)


class HalvesBeforeTheStep(HalvesGradients):
    def on_after_backward(self):
        pass

    def on_before_optimizer_step(self, optimizer):
        self.halve()


class OwnClipping(HalvesBeforeTheStep):
    def on_before_optimizer_step(self, optimizer):
        pass

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5)


class OwnOptimizerStep(Plain):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure: Callable[[], Any]):
        for group in optimizer.param_groups:
            group["lr"] = self.lr / (1 + self.trainer.global_step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class EveryOtherStep(Plain):
    """A module that accumulates two mini-batches by skipping every other step and its clearing of gradients."""

    momentum = 0.0

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure: Callable[[], Any]):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class RatesPerLayer(Plain):
    def configure_optimizers(self):
        groups = [{"params": layer.parameters(), "lr": self.lr / (1 + i)} for i, layer in enumerate(self.net[::2])]
        return torch.optim.SGD(groups, self.lr, self.momentum)


class NeverAStep(Plain):
    """A module that never makes a step, as code does when gradients are not finite."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure: Callable[[], Any]):
        optimizer_closure()


class OwnZeroGrad(Plain):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class HalvesBeforeZeroGrad(HalvesBeforeTheStep):
    """A module that halves gradients in a hook that Lightning calls just before clearing them, without effect."""

    def on_before_optimizer_step(self, optimizer):
        pass

    def on_before_zero_grad(self, optimizer):
        self.halve()


class ChangesTheRate(Plain):
    def on_before_zero_grad(self, optimizer):
        optimizer.param_groups[0]["lr"] *= 0.9


class LineSearch(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), self.lr, max_iter=3)


class ScalesBeforeBackward(Plain):
    """A hook on a weight, with a number that is set between the forward and the backward."""

    def __init__(self):
        super().__init__()
        self.count = 1
        self.net[2].weight.register_hook(lambda gradient: gradient / self.count)

    def on_before_backward(self, loss):
        self.count += 1


class FreezesBeforeBackward(Plain):
    def on_before_backward(self, loss):
        self.net[6].requires_grad_(self.global_step % 2 == 0)

    def on_after_backward(self):
        self.net[6].requires_grad_(True)


class ClampsBeforeZeroGrad(Plain):
    """A module that clamps weights between the forward and the backward, where Lightning calls this hook."""

    def on_before_zero_grad(self, optimizer):
        for parameter in self.parameters():
            parameter.data.clamp_(-0.2, 0.2)


class TrainsATensor(Plain):
    """A module that trains a tensor that is no parameter of the module, as in soft actor-critic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shown", torch.zeros(3))
        self.log_scale = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x) * self.log_scale.exp(), y)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), self.log_scale], self.lr, self.momentum)

    def on_train_end(self):
        self.shown.copy_(self.log_scale.detach())


class TrainsAHiddenModule(TrainsATensor):
    """A module that trains a module in a list, where torch does not look for modules."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(3, 3, dtype=torch.float64)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.hidden[0](self(x)), y)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), *self.hidden[0].parameters()], self.lr, self.momentum)

    def on_train_end(self):
        self.shown.copy_(self.hidden[0].bias.detach())


class CountingSGD(torch.optim.SGD):
    """An optimizer whose steps shrink by a count that it keeps in its parameter groups."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    parameter.data.sub_(gradient, alpha=group["lr"] / group["count"])
        return loss


class CountsSteps(Plain):
    """An optimizer that counts, with a scheduler that changes the learning rate too."""

    def configure_optimizers(self):
        optimizer = CountingSGD(self.parameters(), self.lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class CountsStepsInAnAttribute(Plain):
    class Counting(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure)

    def configure_optimizers(self):
        return self.Counting(self.parameters(), self.lr)


class LogsTwice(Plain):
    """A module that logs the same name twice in a step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        for scale in (1.0, 3.0):
            self.log("loss", scale * loss, on_step=True, on_epoch=True)
        return loss


class ReadsOutputs(Plain):
    """A module that reads the step's output, as it was returned, in on_train_batch_end."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return {"loss": F.cross_entropy(logits, y), "number": 6, "more": {"logits": logits}}

    def on_train_batch_end(self, outputs: Any, batch, batch_idx):
        assert outputs["number"] == 6
        self.mean.copy_(outputs["more"]["logits"].mean(0))


class WritesForAHook(Plain):
    """A module that leaves values in the batch for on_train_batch_end."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def collate(self, samples):
        x, y = default_collate(samples)
        return {"x": x, "y": y, "notes": [], "key": object()}

    def on_train_batch_start(self, batch, batch_idx):
        self.first = batch

    def training_step(self, batch, batch_idx):
        assert batch is self.first
        batch["logits"] = self(batch["x"])
        return F.cross_entropy(batch["logits"], batch["y"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.mean.copy_(batch["logits"].detach().mean(0))


class ListsOfSamples(Plain):
    """A list of samples of different sizes, as in detection."""

    def collate(self, samples):
        return [(x[: 3 + k % 3], {"y": y, "name": str(k)}) for k, (x, y) in enumerate(samples)]

    def training_step(self, batch, batch_idx):
        x = torch.stack([F.pad(x, (0, 6 - len(x))) for x, _ in batch])
        return F.cross_entropy(self(x), torch.stack([torch.as_tensor(target["y"]) for _, target in batch]))


# ---------------------------------------------- parameters and their sharing


class WeightNorm(Plain):
    def __init__(self):
        super().__init__()
        for index in (0, 2, 4, 6):
            parametrizations.weight_norm(self.net[index])


class OldWeightNorm(Plain):
    """The old weight norm: a forward pre-hook sets the weight."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for index in (0, 2, 4, 6):
                nn.utils.weight_norm(self.net[index])


class Orthogonal(Plain):
    def __init__(self):
        super().__init__()
        for index in (2, 4):
            parametrizations.orthogonal(self.net[index])


class SpectralNorm(Plain):
    """Spectral norm, whose power iteration advances with every forward."""

    def __init__(self):
        super().__init__()
        for index in (0, 2, 4):
            parametrizations.spectral_norm(self.net[index])


class CachedParametrizations(WeightNorm):
    """Parametrizations that are computed once per step."""

    def training_step(self, batch, batch_idx):
        with parametrize.cached():
            return super().training_step(batch, batch_idx)


class Pruned(Plain):
    def __init__(self):
        super().__init__()
        from torch.nn.utils import prune

        for index in (0, 2, 4):
            prune.l1_unstructured(self.net[index], "weight", 0.5)


class Tied(Plain):
    def __init__(self):
        super().__init__()
        self.net[4].weight = self.net[2].weight


class TiedInOneStage(Layered):
    def __init__(self):
        super().__init__()
        self.net[3] = nn.Linear(8, 8)
        self.net[3].weight = self.net[2].weight


class CallsTwice(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y) + (self.net(-x) - self.net[:5](x)[:, :3]).square().mean()


class SharedInTime(Plain):
    """A cell that is called four times in one stage."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"in": nn.Linear(6, 8), "cell": nn.Linear(8, 8), "out": nn.Linear(8, 3)})

    def forward(self, x):
        h = self.net["in"](x)
        for _ in range(4):
            h = torch.tanh(self.net["cell"](h)) + h
        return self.net["out"](h)


class WeightPenalty(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * sum(p.square().sum() for p in self.parameters())


class PenaltyOnTheLastLayer(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * self.net[6].weight.abs().sum()


class SharedScale(Layered):
    """One parameter that all layers use."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def between(self, index, h):
        return h * self.scale


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)
        self.net[4].requires_grad_(False)


class FrozenStages(Plain):
    """Two stages whose parameters are all frozen."""

    def __init__(self):
        super().__init__()
        self.net[:4].requires_grad_(False)


class UnfreezesLater(Plain):
    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


class UnusedSometimes(Plain):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.net[:4](x)
        h = self.a(h) if self.trainer.fit_loop.batch_idx % 2 else self.b(h)
        return self.net[4:](h)


# ------------------------------------------------------------------ the code


class DependsOnValues(Layered):
    def between(self, index, h):
        while h.abs().max() > 0.5:
            h = h / 2
        return h if h.sum() > 0 else h + 0.1


class Stops(nn.Module):
    def forward(self, x):
        raise FloatingPointError("not today")


class Tries(Plain):
    def __init__(self):
        super().__init__()
        self.fragile = Stops()

    def forward(self, x):
        try:
            h = self.net[:4](x)
            h = self.fragile(h)
        except FloatingPointError:
            h = self.net[3](self.net[2](self.net[1](self.net[0](x))))
        except BaseException as error:
            raise AssertionError("not of the user's making") from error
        else:
            raise AssertionError("fragile has not raised")
        return self.net[4:](h)


class TriesInOneStage(Tries):
    def forward(self, x):
        h = self.net[:4](x)
        try:
            return self.net[4:](self.fragile(h))
        except FloatingPointError:
            return self.net[4:](h)


class Generates(Plain):
    """A step with generators and closures."""

    def states(self, x):
        for layer in self.net:
            x = layer(x)
            yield x

    def training_step(self, batch, batch_idx):
        *hidden, logits = self.states(batch[0])
        loss = lambda: F.cross_entropy(logits, batch[1])  # noqa: E731
        return loss() + sum(map(lambda h: h.square().mean(), hidden))  # noqa: C417


class AveragesWeights(Plain):
    def configure_callbacks(self):
        return [EMAWeightAveraging(decay=0.9)]


class StochasticallyAveragesWeights(Plain):
    def configure_callbacks(self):
        return [StochasticWeightAveraging(0.05, swa_epoch_start=1)]


class ConfiguresItsModel(Plain):
    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = perceptron().double()


class CompiledLayer(Plain):
    def __init__(self):
        super().__init__()
        self.net[3] = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend="eager")


class CompiledAroundABoundary(Plain):
    def __init__(self):
        super().__init__()
        self.compiled = torch.compile(self.net, backend="eager")

    def forward(self, x):
        return self.compiled(x)


class CompiledInPlace(Plain):
    def __init__(self):
        super().__init__()
        self.compile(backend="eager")


class Scripted(Plain):
    def __init__(self):
        super().__init__()
        self.net[3] = torch.jit.trace(nn.Tanh(), torch.randn(2, 8))


class CallsForward(Plain):
    """A module that calls the layers' forward, which skips the hooks that begin stages."""

    def forward(self, x):
        for layer in self.net:
            x = layer.forward(x)
        return x


class InAThread(Plain):
    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.net, x).result()


class SkipsABoundary(Plain):
    """The second mini-batch does not call the layer with which a stage begins."""

    def training_step(self, batch, batch_idx):
        layers = [layer for index, layer in enumerate(self.net) if index != 2 or batch_idx != 1]
        return F.cross_entropy(nn.Sequential(*layers)(batch[0]), batch[1])


class ChangesTheOrder(Plain):
    def training_step(self, batch, batch_idx):
        a, b = (self.net[4], self.net[2]) if batch_idx == 1 else (self.net[2], self.net[4])
        return F.cross_entropy(self.net[6](b(a(self.net[0](batch[0])))), batch[1])


class DetectsAnomalies(Plain):
    """A module that sets a switch of the whole process over boundaries."""

    def training_step(self, batch, batch_idx):
        with torch.autograd.set_detect_anomaly(True):
            return super().training_step(batch, batch_idx)


class SilencesWarnings(Plain):
    def training_step(self, batch, batch_idx):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "of this step")
            return super().training_step(batch, batch_idx)


class RedirectsOutput(Plain):
    def training_step(self, batch, batch_idx):
        with contextlib.redirect_stdout(io.StringIO()) as written:
            print(batch_idx)
            loss = super().training_step(batch, batch_idx)
            print(batch_idx)
        return loss * len(written.getvalue())


class SwitchesBackends(Plain):
    def training_step(self, batch, batch_idx):
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel([SDPBackend.MATH]):
            return super().training_step(batch, batch_idx)


class SetsThreads(Plain):
    def training_step(self, batch, batch_idx):
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            torch.set_num_threads(before)


class ForbidsSavedTensorHooks(Plain):
    def training_step(self, batch, batch_idx):
        with disable_saved_tensors_hooks("not here"):
            return super().training_step(batch, batch_idx)


class PatchesAFunction(Plain):
    """A module that replaces a function during the step by one that calls the original."""

    def training_step(self, batch, batch_idx):
        cross_entropy = F.cross_entropy
        with mock.patch.object(F, "cross_entropy", lambda logits, y: 2 * cross_entropy(logits, y)):
            return super().training_step(batch, batch_idx)


class HoldsALock(Plain):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def training_step(self, batch, batch_idx):
        with self.lock:
            return super().training_step(batch, batch_idx)


class HoldsAReentrantLock(Plain):
    def __init__(self):
        super().__init__()
        self.lock = threading.RLock()

    def training_step(self, batch, batch_idx):
        with self.lock:
            return super().training_step(batch, batch_idx)


class RunsACoroutine(Plain):
    def training_step(self, batch, batch_idx):
        async def step():
            return Plain.training_step(self, batch, batch_idx)

        return asyncio.run(step())


class DifferentiatesForward(Plain):
    """A loss with a directional derivative."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        with dual_level():
            logits, slope = unpack_dual(self(make_dual(x, torch.ones_like(x))))
        return F.cross_entropy(logits, y) + 0.1 * slope.square().mean()


class PerceptronWithScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = perceptron(), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.net(x) * self.scale


class ScaledAtTheEnd(Plain):
    """A parameter of the module around all layers, used after them, as in CLIP."""

    def __init__(self):
        super().__init__()
        self.net = PerceptronWithScale()


class ViewOfAParameter(Plain):
    """A view of a parameter that the first stage makes and a later stage uses, as in CaiT."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 8))

    def forward(self, x):
        token = self.token.expand(len(x), -1)
        return self.net[4:](self.net[:4](x) + token)


class SkipsLayersAtRandom(Plain):
    """LayerDrop of layers with which stages begin."""

    def forward(self, x):
        x = self.net[0](x)
        for layer in (self.net[2], self.net[4]):
            if random.random() < 0.5:
                x = layer(torch.tanh(x))
        return self.net[6](x)


class PenaltyLater(Plain):
    """A penalty on a layer of another stage, which starts after the first epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.net[0].weight.square().mean() if self.current_epoch else 0)


class ReplacesAParameter(Plain):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[2].weight = nn.Parameter(self.net[2].weight.detach() * 0.5)
            self.trainer.strategy.setup_optimizers(self.trainer)


class ReplacesALayer(Plain):
    """A module that replaces the layer with which a stage begins."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            torch.manual_seed(0)
            self.net[2] = nn.Linear(8, 8).to(self.net[0].weight)
            self.trainer.strategy.setup_optimizers(self.trainer)


class AddsALayer(Plain):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            torch.manual_seed(0)
            layer = nn.Linear(8, 8).to(self.net[0].weight)
            self.net[1] = nn.Sequential(nn.Tanh(), layer)
            self.trainer.optimizers[0].add_param_group({"params": [*layer.parameters()]})


class DividesByAFixedNumber(Plain):
    """A module that divides a sum by the size of the mini-batch, in a network with dropout."""

    def __init__(self):
        super().__init__()
        self.net[3] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y, reduction="sum") / self.batch_size


# ---------------------------------- what runs before the first update could leave


class Average:
    def __init__(self):
        self.sum = self.count = 0.0

    def update(self, value, count):
        self.sum += value * count
        self.count += count


class AveragesInObjects(Plain):
    """Objects in a dict, with lists and arrays inside, as in many training loops."""

    def __init__(self):
        super().__init__()
        self.meters = {"loss": Average()}
        self.history = types.SimpleNamespace(values=[], inner=types.SimpleNamespace(seen=np.zeros(1)))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.meters["loss"].update(loss.item(), len(batch[0]))
        self.history.values += [*batch[1]]
        self.history.inner.seen += len(batch[0])
        return loss

    def on_train_epoch_end(self):
        self.log("mean", self.meters["loss"].sum / self.meters["loss"].count)
        self.log("number", float(len(self.history.values)))
        self.log("seen", self.history.inner.seen.item())


class AnnealsBy(Plain):
    """A loss whose weight grows with the steps."""

    def steps(self):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        return F.cross_entropy(out, y) + self.steps() / 20 * out.square().mean()


class Steps:
    number = 0

    def __call__(self):
        self.number += 1
        return self.number


class AnnealsInAnObject(AnnealsBy):
    def __init__(self):
        super().__init__()
        self.steps = Steps()


STEPS = Counter()


class AnnealsInAGlobal(AnnealsBy):
    def __init__(self):
        super().__init__()
        STEPS.clear()

    def steps(self):
        STEPS["number"] += 1
        return STEPS["number"]


class AnnealsOnTheClass(AnnealsBy):
    number = 0

    def __init__(self):
        super().__init__()
        AnnealsOnTheClass.number = 0

    def steps(self):
        AnnealsOnTheClass.number += 1
        return self.number


class AnnealsInAClosure(AnnealsBy):
    def __init__(self):
        super().__init__()
        number = 0

        def steps():
            nonlocal number
            number += 1
            return number

        self.steps = steps


class AnnealsOutOfReach(AnnealsBy):
    """An iterator in a list, whose position cannot be read."""

    def __init__(self):
        super().__init__()
        self.counts = [itertools.count(1)]

    def steps(self):
        return next(self.counts[0])


NOISE = {}


class GeneratorsInContainers(Plain):
    def __init__(self):
        super().__init__()
        generators = [torch.Generator().manual_seed(k) for k in range(4)]
        self.by_name, self.listed, NOISE["global"] = {"noise": generators[0]}, [generators[1]], generators[3]
        self.noise = functools.partial(torch.rand, generator=generators[2])
        self.nested = types.SimpleNamespace(inner=types.SimpleNamespace(generator=np.random.default_rng(1)))

    def training_step(self, batch, batch_idx):
        generators = self.by_name["noise"], self.listed[0], NOISE["global"]
        numbers = [torch.rand((), generator=generator) for generator in generators]
        return super().training_step(batch, batch_idx) * (
            1 + sum(numbers) + self.noise(()) + self.nested.inner.generator.random()
        )


class HiddenTeacher(Plain):
    """A teacher in a list, where it is no submodule. It follows the network."""

    def __init__(self):
        super().__init__()
        self.hidden = [copy.deepcopy(self.net).double().requires_grad_(False)]
        with torch.no_grad():
            self.hidden[0][0].weight.add_(0.5)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for teacher, student in zip(self.hidden[0].parameters(), self.net.parameters(), strict=True):
                teacher.lerp_(student, 0.1)
            target = self.hidden[0](batch[0])
        return F.mse_loss(self(batch[0]), target)


class HiddenBatchNorm(Plain):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.BatchNorm1d(6).double().requires_grad_(False)]

    def forward(self, x):
        return super().forward(self.hidden[0](x))

    def on_train_epoch_end(self):
        self.log("mean", self.hidden[0].running_mean.sum())


class SchedulesInTheStep(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]

    def training_step(self, batch, batch_idx):
        self.lr_schedulers().step()
        return super().training_step(batch, batch_idx)


class SchedulesItsOwnInTheStep(SchedulesInTheStep):
    def configure_optimizers(self):
        (optimizer,), (self.scheduler,) = super().configure_optimizers()
        return optimizer

    def lr_schedulers(self):
        return self.scheduler


class OfTheFirstStep(Plain):
    """A module that does something lasting in its first step."""

    is_ready = False

    def training_step(self, batch, batch_idx):
        if not self.is_ready:
            self.prepare()
            self.is_ready = True
        return super().training_step(batch, batch_idx)


class HooksOfTheFirstStep(OfTheFirstStep):
    def prepare(self):
        self.net[3].register_forward_hook(lambda module, args, output: output * 0.5)
        self.net[1].register_full_backward_hook(lambda module, before, after: (before[0] * 2,))


def halve(parameter):
    parameter.grad *= 0.5


class ParameterHooksOfTheFirstStep(OfTheFirstStep):
    def prepare(self):
        self.net[2].weight.register_hook(lambda gradient: gradient * 0.5)
        self.net[4].weight.register_post_accumulate_grad_hook(halve)


class WeightNormOfTheFirstStep(OfTheFirstStep):
    def prepare(self):
        parametrizations.weight_norm(self.net[4])


class LayerOfTheFirstStep(OfTheFirstStep):
    def prepare(self):
        torch.manual_seed(0)
        self.extra = nn.Linear(3, 3).double()
        self.optimizers().add_param_group({"params": [*self.extra.parameters()]})

    def forward(self, x):
        return self.extra(super().forward(x))


class HiddenStates(Plain):
    """A model of transformers, which registers hooks in the first call that asks for hidden states."""

    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=4,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def training_step(self, batch, batch_idx):
        output = self.bert(inputs_embeds=self.net[0](batch[0]).unsqueeze(1), output_hidden_states=True)
        self.log("number", float(len(output.hidden_states)))
        logits = self.net[6](output.last_hidden_state[:, 0])
        return F.cross_entropy(logits, batch[1]) + output.hidden_states[1].square().mean()


class Lazy(Plain):
    def __init__(self):
        super().__init__()
        self.net[0], self.net[4] = nn.LazyLinear(8), nn.LazyLinear(8)


class ResizesABuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.empty(0))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.last.resize_(logits.shape).copy_(logits.detach())
        return F.cross_entropy(logits, batch[1])


class ReadOnly(dict):
    def __setitem__(self, key, value):
        raise TypeError("is read-only")

    def clear(self):
        raise TypeError("is read-only")

    def update(self, *args, **kwargs):
        raise TypeError("is read-only")


class ContainersOfItsOwn(Plain):
    def __init__(self):
        super().__init__()
        self.constants = ReadOnly(a=1)

    def training_step(self, batch, batch_idx):
        dict.__setitem__(self.constants, "b", batch_idx)
        return super().training_step(batch, batch_idx)


class BackwardInTheStep(Plain):
    """A module that calls backward in the step. Lightning clears the gradient."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx).backward()
        return super().training_step(batch, batch_idx)


class UpdatesInTheBackward(Plain):
    """A module that updates each parameter as soon as its gradient is known."""

    def configure_optimizers(self):
        for parameter in self.parameters():
            optimizer = torch.optim.SGD([parameter], self.lr)
            parameter.register_post_accumulate_grad_hook(lambda parameter, optimizer=optimizer: optimizer.step())


class WritesIntoTheDataSet(Plain):
    def training_step(self, batch, batch_idx):
        self.trainer.train_dataloader.dataset.x.mul_(1.01)
        return super().training_step(batch, batch_idx)
