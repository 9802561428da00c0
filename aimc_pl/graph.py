"""The autograd graph of one micro-batch, cut where its stages begin.

The backward of a stage is a call of torch's own engine. It starts from the gradients that later stages have left at the
edges of the stage, and it must stop where the stage begins. autograd numbers nodes in the order in which they are made,
and of the nodes that are ready it runs the newest first. A node that is made right before a stage, the *sentinel* of
the stage, therefore runs after all nodes of the stage and before all earlier nodes. It stops the engine by an
exception. Nothing runs twice, and hooks of tensors and modules run as in an undivided backward.
"""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from aimc_pl.errors import UsageError
from aimc_pl.private_torch import LEAF, next_sequence_number, sequence_number, zeros_at

Edge = tuple[Node, int]


class CutGraph:
    """The graph of one micro-batch. It follows the forward, and then runs the backward stage by stage.

    Args:
        anchor: the input of all sentinels: a tensor of one element that requires grad, on the device of the network.
    """

    def __init__(self, anchor: Tensor) -> None:
        self._anchor = anchor
        self._sentinels: list[Tensor] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._pending: list[dict[Edge, Tensor]] = []
        self._crossing: list[dict[Node, list[tuple[int, int, Edge]]]] = []
        self._guards: list[list[GradientEdge]] = []

    def begin_stage(self) -> None:
        """Mark the start of the next stage's forward. Nodes that are made from now on belong to that stage."""
        with torch.enable_grad():
            self._sentinels.append(_Sentinel.apply(self._anchor))
        self._starts.append(next_sequence_number())
        self._pending.append({})
        self._crossing.append({})
        self._guards.append([])

    def end_stage(self) -> None:
        """Mark the end of the current stage's forward. Nodes that are made from now on belong to no stage."""
        self._ends.append(next_sequence_number())

    def close(self, loss: Tensor, gradient: Tensor) -> list[list[Tensor]]:
        """Find the edges of the graph that cross from stage to stage. Call it after the forward of the last stage.

        Args:
            loss: the tensor at which the backward starts.
            gradient: the gradient with respect to ``loss``.

        Returns:
            For every stage, the leaf tensors that it uses and that require grad.

        Raises:
            UsageError: if the loss depends on a value that was computed outside of this forward.
        """
        num_stages = len(self._starts)
        leaves: list[dict[Node, list[tuple[Node, int]]]] = [{} for _ in range(num_stages)]
        root, output, _ = get_gradient_edge(loss)
        if loss.grad_fn is None:  # It is a parameter, or a constant that a step returns to learn nothing.
            self._pending[-1][root, output] = gradient
            return [*([] for _ in range(num_stages - 1)), [loss]]
        todo = [(root, sequence_number(root))]
        seen = {root: output}
        while todo:
            node, number = todo.pop()
            stage = self._stage_of(node, number)
            start = self._starts[stage]
            for index, (following, output) in enumerate(node.next_functions):
                if following is None:
                    continue
                following_number = sequence_number(following)
                if following_number == LEAF:
                    leaves[stage].setdefault(following, []).append((node, index))
                    continue
                if following not in seen:
                    seen[following] = output
                    todo.append((following, following_number))
                if following_number < start:
                    # The node's stage is checked when the node is visited. No edge leads to a sentinel.
                    into = max(self.stage_that_made(following_number), 0)
                    self._crossing[stage].setdefault(node, []).append((index, into, (following, output)))
        self._share_leaves(leaves, seen)
        self._pending[self._stage_of(root, sequence_number(root))][root, seen[root]] = gradient
        return [[leaf.variable for leaf in uses] for uses in leaves]  # pyright: ignore[reportAttributeAccessIssue], leaves have it

    @property
    def has_views_across(self) -> bool:
        """Whether a stage uses a value that an earlier stage has made from a single leaf tensor, such as a view."""
        edges = [edge for crossing in self._crossing for edges in crossing.values() for _, _, edge in edges]
        return any(_is_made_of_a_leaf(node) for node, _ in edges if sequence_number(node) != LEAF)

    def backward(self, stage: int, *, hooked: bool = False) -> None:
        """Backpropagate through a stage. Call it once for every stage, from the last to the first.

        Gradients are added to those of the leaf tensors. A leaf that several stages use gets its gradient once, in the
        backward of the first of these stages. Without a call of :meth:`close`, nothing is done.

        Args:
            stage: the index of the stage, 0 … M−1.
            hooked: whether hooks are registered with several tensors. Such a hook asks torch which nodes a backward
                will execute, and torch includes a root in its answer only if there are other roots.
        """
        pending, self._pending[stage] = self._pending[stage], {}
        crossing, self._crossing[stage] = self._crossing[stage], {}
        guards, self._guards[stage] = self._guards[stage], []
        for node, edges in crossing.items():
            node.register_hook(_capture(edges, self._pending))
        del crossing
        if not pending:
            return
        roots: list[Any] = [GradientEdge(*edge) for edge in pending]
        gradients = [*pending.values()]
        if stage or hooked:
            sentinel = self._sentinels[stage]
            roots += [sentinel, *guards]
            gradients += [sentinel.detach(), *map(zeros_at, guards)]
        pending.clear()
        try:
            with _without_report() if torch.is_anomaly_enabled() else nullcontext():
                torch.autograd.backward(roots, gradients)
        except _StageIsOver:
            pass

    def stage_that_made(self, number: int) -> int:
        """Return the stage during whose forward the node with this sequence number was made, or −1 if there is none."""
        return bisect_right(self._starts, number) - 1

    def _stage_of(self, node: Node, number: int) -> int:
        stage = self.stage_that_made(number)
        if stage < 0 or number >= self._ends[stage]:
            raise UsageError(
                f"the loss depends on a value ({node.name()}) that was computed outside of this micro-batch's "
                "training_step, by an earlier one or a hook: compute it inside, or detach it"
            )
        return stage

    def _share_leaves(self, leaves: Sequence[dict[Node, list[tuple[Node, int]]]], outputs: dict[Node, int]) -> None:
        """Collect the gradients of a leaf that several stages use in the first of these stages.

        In the backward of the other stages the engine must not run the leaf's node. A node of the first stage that uses
        the leaf is therefore one more root there (a *guard*). The leaf waits for the guard, and the guard would only
        run after the sentinel, which stops the engine.
        """
        first: dict[Node, int] = {}
        for stage, uses in enumerate(leaves):
            for leaf, edges in uses.items():
                if first.setdefault(leaf, stage) < stage:
                    guard, _ = leaves[first[leaf]][leaf][0]
                    self._guards[stage].append(GradientEdge(guard, outputs[guard]))
                    for node, index in edges:
                        self._crossing[stage].setdefault(node, []).append((index, first[leaf], (leaf, 0)))


def _is_made_of_a_leaf(node: Node) -> bool:
    while sequence_number(node) != LEAF:
        following = [function for function, _ in node.next_functions if function is not None]
        if len(following) != 1:
            return False
        (node,) = following
    return True


class _StageIsOver(Exception):  # noqa: N818, an event, not an error
    """Raised inside the engine to end the backward of a stage."""


class _Sentinel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride], torch passes these
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride], torch passes these
        raise _StageIsOver


def _capture(edges: list[tuple[int, int, Edge]], pending: list[dict[Edge, Tensor]]) -> Callable[..., None]:
    """Return a hook of a node that passes the gradients of some of its inputs to the stages that made the inputs."""

    def hook(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
        for index, stage, edge in edges:
            gradient = grad_inputs[index]
            if gradient is not None:
                known = pending[stage].get(edge)
                pending[stage][edge] = gradient if known is None else _sum(known, gradient)

    return hook


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return b + a if a.is_sparse else a + b  # A sparse tensor must be the second operand.


@contextmanager
def _without_report() -> Iterator[None]:
    """Context manager that keeps anomaly detection from reporting the exception of a sentinel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error detected in _SentinelBackward")
        yield
