"""These tests check that arguments are verified before work starts."""

from pathlib import Path

import pytest

from aimc_pl.studies.arguments import sweep_parser


def test_the_folder_is_made_and_wrong_numbers_are_refused(tmp_path, capsys):
    parser = sweep_parser("a study", seeds=3)
    args = parser.parse_args(["--folder", "new"])
    assert (args.folder, args.seeds, args.jobs, args.quick) == (Path("new"), 3, None, False)
    assert (tmp_path / "new").is_dir()
    for wrong in (["--seeds", "0"], ["--jobs", "-1"], ["--seeds", "two"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        assert f"must be a whole number of at least 1, got '{wrong[1]}'" in capsys.readouterr().err


def test_a_quick_run_cannot_be_sent_to_the_folder_of_the_results(capsys):
    parser = sweep_parser("a study", seeds=3)
    args = parser.parse_args(["--quick"])
    assert (args.folder, args.seeds, args.jobs, args.quick) == (Path(), 1, 1, True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--quick", "--folder", "docs/results"])
    assert "not allowed with argument" in capsys.readouterr().err
