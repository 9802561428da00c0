"""These tests train with stages that are balanced by the cost model."""

import lightning as L
import pytest
import torch
from lightning_modules import MLP, DictBatch, loader, make_trainer
from torch.utils.data import DataLoader

from aimc_pl.cost import MARINELLA_2018, RASCH_2024, stage_cost
from aimc_pl.private_torch import tree_map
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


@pytest.mark.slow
@pytest.mark.parametrize(("make", "numbers"), [(MLP, 6 + 1), (DictBatch, 6 + 2)])
def test_autocast_and_dictionaries_change_no_counts(make, numbers):
    works = []
    for precision in ("32-true", "bf16-mixed"):
        L.seed_everything(0)
        module, count = make(), Count()
        trainer = make_trainer(
            AnalogPipelineStrategy(2, "sync", 1), precision=precision, callbacks=[count], max_epochs=1
        )
        samples = [
            tree_map(lambda x: x.float() if x.is_floating_point() else x, sample) for sample in loader(module).dataset
        ]
        trainer.fit(module, DataLoader(samples, batch_size=8))
        works.append(count.works)
        # The 19 samples have 6 inputs, a label and maybe a weight.
        found = [sum(work.batch for work in each) for each in count.works[::2]]
        assert found == [8 * numbers, 8 * numbers, 3 * numbers]
    full, mixed = works[0][0], works[1][0]
    for name in ("gradient_flops", "parameters", "trained", "kept"):
        assert sum(getattr(work, name) for work in full) == sum(getattr(work, name) for work in mixed), name
    assert sum(work.trained for work in full) == sum(parameter.numel() for parameter in module.parameters())
