import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # pytest's workers share the processors


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Run the test in its own folder, so that what Lightning writes stays there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _seeded():
    """Give each test the same random numbers in every run, so that none fails by chance."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Compute on one thread, as separate processes do. Another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
