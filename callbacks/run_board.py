"""The logger in this module writes what a run logs for TensorBoard, all stages of a quantity into one chart."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from aimc_pl.stage_names import tag_and_folder


class RunBoard(TensorBoardLogger):
    """Lightning's ``TensorBoardLogger``, with one chart for all stages of a quantity and one colour for each stage.

    TensorBoard has a chart for each name and a colour for each run. So the values of stage 3, such as
    ``staleness/drift_stage_3``, become the series ``staleness/drift`` of a run of their own, in the folder ``stage_03``
    of the run. The arguments are those of ``TensorBoardLogger``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writers: dict[str, Any] = {}
        """torch's ``SummaryWriter`` for the folder of each stage."""

    def writer_and_tag(self, name: str) -> tuple[Any, str]:
        """Return the ``SummaryWriter`` and the tag with which values of this name are written."""
        of_a_stage = tag_and_folder(name)
        if of_a_stage is None:
            return self.experiment, name
        tag, folder = of_a_stage
        if folder not in self._writers:
            # This import takes a second, and only the process that logs needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._writers[folder] = SummaryWriter(str(Path(self.log_dir, folder)))
        return self._writers[folder], tag

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        of_stages = {name: place[1] for name in metrics if (place := tag_and_folder(name))}
        # TensorBoard lists the runs in the order of their first values.
        for name in sorted(of_stages, key=of_stages.__getitem__):
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
