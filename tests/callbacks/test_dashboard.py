"""This test checks that every chart of TensorBoard's page shows something."""

import re

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from aimc_pl.callbacks import ClockMonitor, Dashboard, DeviceNoise, StalenessMonitor, WriteNoise
from aimc_pl.data import Digits
from aimc_pl.models import MLP
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier


def test_every_chart_has_data(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(2, "async", 2, split_at=["network.3"]),
        callbacks=[ClockMonitor(), StalenessMonitor(), DeviceNoise([WriteNoise(0.01)]), Dashboard()],
        logger=logger,
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(MLP([64, 8, 10])), Digits(batch_size=8))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Learning", "Pipeline", "Devices"]
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    assert [*charts] == [
        "accuracy against epoch",
        "accuracy against clock cycle",
        "training loss",
        "staleness per stage",
        "weight drift between forward and update",
        "computation density",
        "speedup in clock cycles",
        "noise per layer",
    ]
    for title, patterns in charts.items():
        for pattern in patterns:
            assert any(re.fullmatch(pattern, tag) for tag in events.Tags()["scalars"]), title
        assert patterns, title
