"""The logger in this module writes what a run logs for TensorBoard, all stages of a quantity into one chart."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

_OF_A_STAGE = re.compile(r"((?:staleness|devices)(?:/[a-z]+)?)[/_]stage_(\d+)")


class RunBoard(TensorBoardLogger):
    """Lightning's ``TensorBoardLogger``, with one chart for all stages of a quantity and one colour for each stage.

    TensorBoard has a chart for each name and a colour for each run. So the values of stage 3, such as
    ``staleness/drift_stage_3``, become the series ``staleness/drift`` of a run of their own, in the folder ``stage_03``
    of the run. The arguments are those of ``TensorBoardLogger``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writers: dict[int, Any] = {}
        """torch's ``SummaryWriter`` of each stage."""

    def writer_and_tag(self, name: str) -> tuple[Any, str]:
        """Return the ``SummaryWriter`` and the tag with which values of this name are written."""
        if not (of_a_stage := _OF_A_STAGE.fullmatch(name)):
            return self.experiment, name
        tag, stage = of_a_stage[1], int(of_a_stage[2])
        if stage not in self._writers:
            # This import takes a second, and only the process that logs needs it.
            from torch.utils.tensorboard import SummaryWriter

            # With two digits, TensorBoard sorts the stages by their numbers.
            self._writers[stage] = SummaryWriter(str(Path(self.log_dir, f"stage_{stage:02}")))
        return self._writers[stage], tag

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        of_stages = [name for name in metrics if _OF_A_STAGE.fullmatch(name)]
        # TensorBoard lists the runs in the order of their first values.
        for name in sorted(of_stages, key=lambda name: int(name.rpartition("_")[2])):
            writer, tag = self.writer_and_tag(name)
            writer.add_scalar(tag, metrics[name], step)
        super().log_metrics({name: value for name, value in metrics.items() if name not in of_stages}, step)

    @override
    @rank_zero_only
    def save(self) -> None:
        super().save()
        for writer in self._writers.values():
            writer.flush()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        for writer in self._writers.values():
            writer.close()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_writers": {}}


def name_of(tag: str, folder: str) -> str:
    """Return the name of the values that have this tag in the folder of a stage."""
    return f"{tag}{'_' if '/' in tag else '/'}stage_{int(folder.removeprefix('stage_'))}"


@rank_zero_only
def add_histogram(trainer: "pl.Trainer", name: str, edges: Sequence[float], counts: Sequence[float]) -> None:
    """Give every TensorBoard logger of a trainer a histogram with a bar of ``counts[k]`` values between two edges.

    Args:
        trainer: the trainer.
        name: the name of what is counted.
        edges: the edges of the bars, one more than there are bars.
        counts: the number of values in each bar.
    """
    centres = [(left + right) / 2 for left, right in pairwise(edges)]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            writer, tag = logger.writer_and_tag(name) if isinstance(logger, RunBoard) else (logger.experiment, name)
            writer.add_histogram_raw(
                tag,
                # TensorBoard draws the first and the last bar from and to these.
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(count * centre for count, centre in zip(counts, centres, strict=True)),
                sum_squares=sum(count * centre**2 for count, centre in zip(counts, centres, strict=True)),
                bucket_limits=edges[1:],
                bucket_counts=counts,
                global_step=trainer.global_step,
            )
