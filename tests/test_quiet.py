"""This test checks what a program with a Trainer prints: nothing that only Lightning's developers can use."""

import subprocess
import sys

import pytest

PROGRAM = """
import aimc_pl
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils._pytree import LeafSpec

trainer = pl.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False)
trainer.fit(BoringModel())
pl.Trainer(logger=False)
print("Their own:")
LeafSpec()
"""


@pytest.mark.slow
def test_a_program_shows_the_messages_of_the_run_and_no_others(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "default", "-u", "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    lightning, own = run.stdout.split("Their own:")
    assert "Tip" not in lightning
    assert "LeafSpec" not in lightning
    assert "`Trainer.fit` stopped" in lightning  # what else Lightning says
    assert "LeafSpec" in own
