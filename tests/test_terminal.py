"""Output that a narrow or an ASCII terminal, or nobody, reads."""

import io
import os
import subprocess
import sys

import pytest
from conftest import composed
from rich.console import Console

from gaplab import cli
from gaplab import config as configs
from gaplab.live import print_outcome
from gaplab.result import RunResult, print_summary


def shown(width: int) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False)
    values = {
        "train_acc": 0.9876,
        "valid_acc": 0.9654,
        "gap_acc": 0.0222,
        "gap_acc_low": 0.0111,
        "gap_acc_high": 0.0333,
    }
    result = RunResult("r", "FINISHED", 0, "c", "h", epochs=10, test_acc=0.9543, best=values | {"epoch": 7}, **values)
    print_summary(console, result, composed("tracking=none"))
    done = {"status": "FINISHED", "test_acc": 0.9321, **values}
    labels = ["model.bn=true model.dropout=0.5"] * 2
    print_outcome(console, ["0", "1"], labels, [done, done], [False] * 2, "resume", "report", None)
    return file.getvalue()


@pytest.mark.parametrize("width", [120, 60, 40])
def test_every_number_of_a_table_is_whole_at_any_width(width: int):
    text = shown(width)
    for number in ("0.9876", "0.9654", "+2.22", "[+1.11, +3.33]", "0.9543", "0.9876 ± 0.0000", "2.22 ± 0.00", "0.9321"):
        assert number in text
    assert "…" not in text
    assert ("valid  0.9654" in text) == (width < 70)


@pytest.mark.parametrize("word", ["--help", "seed=×"])
def test_an_ascii_terminal_gets_ascii(word: str):
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii",
        "PYTHONCOERCECLOCALE": "0",
    }
    script = configs.PROJECT / "src" / "train.py"
    done = subprocess.run([sys.executable, str(script), word], env=environment, capture_output=True)
    assert done.returncode == (0 if word == "--help" else 2)
    assert b"Traceback" not in done.stderr
    assert (done.stdout + done.stderr).isascii()


def test_what_ascii_lacks_is_written_out(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    cli._print_in_any_encoding()
    print("0.97 ± 0.01 – José …", flush=True)
    assert stream.buffer.getvalue() == b"0.97 +- 0.01 - Jos\\xe9 ...\n"
    assert os.environ["PYTHONIOENCODING"] == "ascii:backslashreplace"


def test_a_reader_that_has_gone_is_no_traceback():
    script = f"'{sys.executable}' '{configs.PROJECT / 'src' / 'train.py'}' --help | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")
