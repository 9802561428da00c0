import pytest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """What Lightning writes lands in the test's folder."""
    monkeypatch.chdir(tmp_path)
