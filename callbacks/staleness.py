"""The callback in this module measures the staleness of the weights that the pipeline trains with."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, override

import lightning.pytorch as pl
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from aimc_pl.arguments import check_flag
from aimc_pl.callbacks.attach import attach, gathered, merged
from aimc_pl.callbacks.recent import Recent, means, note
from aimc_pl.callbacks.run_board import add_histogram
from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Event, Observer
from aimc_pl.stage import StageInfo
from aimc_pl.strategies.private_lightning import should_log
from aimc_pl.weights import read_gradients, read_weights


class StalenessMonitor(Callback, Observer):
    """Measure the staleness of every update and, at logged steps, its effect on weights and gradients.

    The staleness of an update is the number of updates of the same stage between the forward of a micro-batch and the
    update from it. The callback logs for each stage m:

    - ``staleness/stage_m``: the mean over the updates since the last log, and ``staleness/max_stage_m``, the maximum.
    - ``staleness/drift_stage_m``: the norm of the weights' change between the forward of a micro-batch and its update,
      relative to the norm of the weights.
    - ``staleness/cosine_stage_m``, with ``cosine=True``.
    - ``staleness/rate_factor_stage_m``, if the strategy has remedies: the mean factor of the learning rate.

    At the end of every epoch TensorBoard also gets a histogram, ``staleness/counts``, of all updates of all stages so
    far. The first update whose staleness is not the schedule's closed form is warned about.

    Args:
        cosine: whether to log the cosine between two gradients of a stage: the one that it holds after a backward, and
            the one of the same micro-batch if all stages use their current weights. Under schedules that update once
            per mini-batch, the first is the sum over the micro-batches so far. The second takes a forward and a
            backward of the whole network for every stage and micro-batch of a logged step. These leave no trace, and
            draw other random numbers for dropout and noise. This needs all stages in one process.

    Attributes:
        counts: for each stage, how often each staleness was measured.
        mismatches: the number of updates whose staleness was not the closed form.
    """

    def __init__(self, cosine: bool = False) -> None:
        check_flag("cosine", cosine)
        self.cosine = cosine
        self.counts: dict[int, Counter[int]] = defaultdict(Counter)
        self.mismatches = 0
        self._here: set[int] | None = None
        self._recent: Recent = {}

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._strategy = attach(self, trainer)
            self._schedule = self._strategy.schedule
            self._here = None
            self._recent.clear()
            if self.cosine and self._strategy.is_multiprocess:
                raise UsageError(
                    "StalenessMonitor(cosine=True) compares with the gradient of the whole network, which no process "
                    "holds with one stage in each: set Trainer(devices=1)"
                )

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._module = pl_module
        self._seen: dict[tuple[int, int], Tensor] = {}
        self._samples: dict[int, tuple[Any, ...]] = {}

    @override
    def on_start(self, stages: Sequence[StageInfo]) -> None:
        self._here = {stage.index for stage in stages}
        # A checkpoint holds the values of all stages. Each process keeps those of its own stages.
        for name in [name for name in self._recent if int(name.rpartition("_")[2]) not in self._here]:
            del self._recent[name]

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        # Micro-batches that enter at a logged step are followed through the pipeline.
        if should_log(trainer):
            parts = self._strategy.split_batch(batch)
            entered = self._strategy.num_entered
            self._samples |= {entered + k: (part, batch_idx) for k, part in enumerate(parts)}

    @override
    def on_forward(self, event: Event) -> None:
        if event.microbatch in self._samples and event.stage.parameters:
            self._seen[event.stage.index, event.microbatch] = read_weights(event.stage.parameters)

    @override
    def on_backward(self, event: Event) -> None:
        seen = self._seen.pop((event.stage.index, event.microbatch), None)
        if seen is None:
            return
        drift = (read_weights(event.stage.parameters) - seen).norm() / seen.norm()
        note(self._recent, f"drift_stage_{event.stage.index}", drift.item())
        if self.cosine:
            note(self._recent, f"cosine_stage_{event.stage.index}", self._cosine(event))
        if event.stage.index == min(self._here or ()):
            del self._samples[event.microbatch]

    @override
    def on_update(self, event: Event) -> None:
        stage = event.stage.index
        self.counts[stage][event.staleness] += 1
        note(self._recent, f"stage_{stage}", float(event.staleness))
        if self._strategy.settings.remedies:
            note(self._recent, f"rate_factor_stage_{stage}", self._strategy.rate_factor)
        if event.staleness != event.predicted:
            if not self.mismatches:
                warnings.warn(
                    f"Stage {stage} updated with a staleness of {event.staleness} in clock {event.clock}, "
                    f"and the schedule predicts {event.predicted}",
                    stacklevel=2,
                )
            self.mismatches += 1

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not should_log(trainer):
            return
        recent: Recent = merged(self._strategy.gather(self._recent))
        values = means(recent)
        for stage in range(self._schedule.num_stages):
            if measured := recent.get(f"stage_{stage}"):
                _, _, values[f"max_stage_{stage}"] = measured
        pl_module.log_dict({f"staleness/{name}": value for name, value in values.items()}, on_step=True, on_epoch=False)
        self._recent.clear()

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        counts = merged(self._strategy.gather(self._counts_here()))
        # Between processes a Counter becomes a plain dictionary.
        self.counts.update({stage: Counter(times) for stage, times in counts.items()})
        total = sum(self.counts.values(), Counter())
        if total:
            bars = range(max(total) + 1)
            edges = [-0.5, *(staleness + 0.5 for staleness in bars)]
            add_histogram(trainer, "staleness/counts", edges, [total[staleness] for staleness in bars])

    @override
    def state_dict(self) -> dict[str, Any]:
        counts = merged(gathered(self, self._counts_here()))
        return {
            "counts": {stage: dict(times) for stage, times in counts.items()},
            "mismatches": sum(gathered(self, self.mismatches)),
            "recent": merged(gathered(self, self._recent)),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not hasattr(self, "_strategy"):
            # This is an evaluation, which has no staleness.
            return
        # Between processes a Counter becomes a plain dictionary.
        self.counts.update({stage: Counter(times) for stage, times in state_dict["counts"].items()})
        self.mismatches = state_dict["mismatches"] if self._strategy.is_global_zero else 0
        self._recent.update(state_dict["recent"])

    def _counts_here(self) -> dict[int, Counter[int]]:
        return {stage: counts for stage, counts in self.counts.items() if self._here is None or stage in self._here}

    def _cosine(self, event: Event) -> float:
        stale = read_gradients(self._module, event.stage.parameters)
        part, batch_idx = self._samples[event.microbatch]
        current = self._strategy.gradients(part, batch_idx, event.stage.parameters)
        return F.cosine_similarity(stale, current, 0).item()
