"""`make ui` where it cannot serve: one line, status 2; what it serves is seen by tests/ui."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_refused

from gaplab import config as configs
from gaplab.errors import TrainingError
from gaplab.tracking import ui


def ui_py(*words: str) -> "subprocess.CompletedProcess[str]":
    script = str(configs.PROJECT / "src" / "ui.py")
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=60)


def test_without_runs_one_line_says_how_to_make_one(tmp_path: Path):
    assert_refused(ui_py(f"paths.outputs={tmp_path}"), f"nothing to show yet: no {tmp_path}/mlflow.db; ")


def test_a_port_in_use_is_one_line_with_another(tmp_path: Path):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ui_py(f"paths.outputs={tmp_path}", f"port={port}")
    assert_refused(done, f"port={port}: cannot be used (Address already in use); take another: ")


def test_a_port_that_is_none_is_refused(tmp_path: Path):
    assert_refused(ui_py(f"paths.outputs={tmp_path}", "port=70000"), "port=70000: must be a number in [1, 65535]")


def test_a_server_that_ends_by_itself_is_told_with_its_last_word_and_leaves_nobody(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "mlflow.db").write_text("no database")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho broken\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr("gaplab.tracking.server.sys.executable", str(fake))
    settings = configs.Ui(port=0, paths=configs.Paths(str(tmp_path)))
    with pytest.raises(TrainingError, match=r"ended with status 3: broken; all its words are in .*ui.log"):
        ui.ui(settings)
