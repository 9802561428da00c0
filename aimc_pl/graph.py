"""The autograd graph of one micro-batch, cut where its stages begin.

A stage's backward is torch's own engine. It starts from the gradients that later stages have left at the stage's edges
and is stopped where the stage begins: autograd numbers its nodes as they are made and runs ready nodes from the newest,
so that a node made right before a stage (its *sentinel*) runs after all nodes of the stage and before all earlier ones.
Nothing runs twice, and hooks of tensors and modules run as in an undivided backward.
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
    """Follows the forward of one micro-batch, then runs its backward stage by stage.

    Args:
        anchor: a tensor of one element that requires grad, on the device of the network.
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
        """The forward of the next stage follows."""
        with torch.enable_grad():
            self._sentinels.append(_Sentinel.apply(self._anchor))
        self._starts.append(next_sequence_number())
        self._pending.append({})
        self._crossing.append({})
        self._guards.append([])

    def end_stage(self) -> None:
        """The forward of the stage is over, or waits."""
        self._ends.append(next_sequence_number())

    def close(self, loss: Tensor, gradient: Tensor) -> list[list[Tensor]]:
        """Find what crosses from stage to stage, once the forward of the last stage is over.

        Args:
            loss: where the backward starts.
            gradient: with respect to it.

        Returns:
            For every stage, the leaf tensors that it uses and that require grad.

        Raises:
            UsageError: if the loss depends on what was computed outside of this forward.
        """
        num_stages = len(self._starts)
        leaves: list[dict[Node, list[tuple[Node, int]]]] = [{} for _ in range(num_stages)]
        root, output, _ = get_gradient_edge(loss)
        if loss.grad_fn is None:  # a parameter itself, or a constant that a step returns to learn nothing
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
                    # The stage it belongs to is found when it is visited; a sentinel is never reached.
                    into = max(self.stage_that_made(following_number), 0)
                    self._crossing[stage].setdefault(node, []).append((index, into, (following, output)))
        self._share_leaves(leaves, seen)
        self._pending[self._stage_of(root, sequence_number(root))][root, seen[root]] = gradient
        return [[leaf.variable for leaf in uses] for uses in leaves]  # pyright: ignore[reportAttributeAccessIssue], leaves have it

    @property
    def has_views_across(self) -> bool:
        """Whether a stage uses what an earlier one has made of a single leaf tensor, as views are."""
        edges = [edge for crossing in self._crossing for edges in crossing.values() for _, _, edge in edges]
        return any(_is_made_of_a_leaf(node) for node, _ in edges if sequence_number(node) != LEAF)

    def backward(self, stage: int, *, hooked: bool = False) -> None:
        """Backpropagate through a stage, from the last to the first; every stage once.

        The leaf tensors' gradients are added to. A leaf that several stages use gets its gradient with the first of
        these stages, once. Without :meth:`close` there is nothing to do.

        Args:
            stage: 0 … M−1.
            hooked: whether there are hooks of several tensors. torch tells these that a node will be executed, but of
                a root only if it is not alone.
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
        """The stage in whose forward a node of this sequence number was made; −1 if none."""
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
        """Let the gradients of a leaf that several stages use meet in the first of them.

        In the others the engine must not come to the leaf, also where nothing else leads to its first use: that use is
        a root too (a guard), which would be run after the sentinel.
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


class _StageIsOver(Exception):  # noqa: N818, an event and no error
    """Raised inside the engine to end the backward of a stage."""


class _Sentinel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride], torch passes these
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride], torch passes these
        raise _StageIsOver


def _capture(edges: list[tuple[int, int, Edge]], pending: list[dict[Edge, Tensor]]) -> Callable[..., None]:
    """A hook of a node that takes the gradients of some of its inputs to the stages that have made these."""

    def hook(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
        for index, stage, edge in edges:
            gradient = grad_inputs[index]
            if gradient is not None:
                known = pending[stage].get(edge)
                pending[stage][edge] = gradient if known is None else _sum(known, gradient)

    return hook


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return b + a if a.is_sparse else a + b  # torch adds a sparse tensor to a dense one only


@contextmanager
def _without_report() -> Iterator[None]:
    """Anomaly detection reports every exception in a backward; that of a sentinel is no anomaly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error detected in _SentinelBackward")
        yield
