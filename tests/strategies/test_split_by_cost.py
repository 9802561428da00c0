"""These tests train with stages that are balanced by the cost model."""

import lightning as L
import pytest
import torch
from lightning_modules import MLP, loader, make_trainer

from aimc_pl.cost import MARINELLA_2018, RASCH_2024, stage_cost
from aimc_pl.strategies import AnalogPipelineStrategy


def fit(split_at, **kwargs):
    L.seed_everything(0)
    module = MLP().double()
    strategy = AnalogPipelineStrategy(3, "async", 4, split_at=split_at)
    trainer = make_trainer(strategy, max_epochs=1, **kwargs)
    trainer.fit(module, loader(module, shuffle=False))
    trainer.save_checkpoint("last.ckpt")
    return module, torch.load("last.ckpt", weights_only=True)["aimc_pl"]["split_at"]


class Count(L.Callback):
    """Counts the work of each batch before and after it."""

    def __init__(self):
        self.works = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.works.append(trainer.strategy.count_work(batch, batch_idx, RASCH_2024))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.on_train_batch_start(trainer, module, batch, batch_idx)


@pytest.mark.slow
def test_stages_by_cost_train_as_the_same_stages_by_name():
    by_cost, names = fit("cost")
    assert len(names) == 2
    assert fit("cost")[1] == names
    by_name, _ = fit(names)
    for a, b in zip(by_cost.parameters(), by_name.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_counting_changes_nothing_and_is_the_same_before_and_during_a_run():
    count = Count()
    counted, _ = fit("cost", callbacks=[count])
    plain, _ = fit("cost")
    for a, b in zip(counted.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(count.works[0]) == 3
    first = [works for works in count.works if works[0].batch == count.works[0][0].batch]
    assert len(first) > 2
    assert all(works == first[0] for works in first)
    for hardware in (RASCH_2024, MARINELLA_2018):
        assert all(stage_cost(work, hardware).forward.seconds > 0 for work in first[0])
