# SPDX-License-Identifier: Apache-2.0
"""`locmoe`: arguments, exit codes, one line for an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_locmoe import cli
from tests.unit.report.run_folder import make_run


def test_report_prints_the_files_it_wrote(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "report"), "--no-model"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == str(tmp_path / "report" / "routing.html")
    assert sorted(printed) == sorted(str(path) for path in (tmp_path / "report").iterdir())


def test_an_error_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "absent")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("locmoe report: `RUN_DIR`")
    assert captured.err.count("\n") == 1


def test_an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(make_run(tmp_path / "run")), "--output", str(tmp_path / "file")]) == 1
    assert "locmoe report:" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["unknown"], ["report"]])
def test_wrong_arguments_are_exit_code_2(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_every_subcommand_has_help():
    for add in cli.SUBCOMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([add.__name__.removeprefix("add_"), "--help"])
        assert stop.value.code == 0


def test_as_a_module():
    completed = subprocess.run(
        [sys.executable, "-m", "hf_locmoe.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "report" in completed.stdout
