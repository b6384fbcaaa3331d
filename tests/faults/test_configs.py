"""Any command line trains, or is refused in a line: never a traceback, a hang, or a machine without memory.

`tests/generated.py` draws the commands, the same on every run, and judges what becomes of them.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_refused
from generated import judge_commands
from processes import train_py

from gaplab import config as configs

EXAMPLES = 600


def test_every_command_trains_or_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = time.monotonic()
    counts = judge_commands(EXAMPLES, tmp_path)
    said = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    with capsys.disabled():
        print(f"\n{counts.total()} commands in {time.monotonic() - start:.0f} s: {said}")
    assert counts.total() >= 500
    assert counts["trained"] >= 100
    assert counts["refused"] >= 100


TYPED = [
    "model=", "model=null", "model=[mlp,cnn]", "+model=cnn", "~model", "model@data=cnn", "=", "''=1", "+", "~nope=1",
    "++nope=1", "model.bn", "model.bn.x=1", "model..bn=1", "model.bn=[true]", "model.bn='true '",
    "model.dropout=1e309", "model.dropout=nan", "model.dropout=${model.dropout}", "model.dropout=${nowhere}",
    "model.dropout=${nope:1}", "model.dropout=${", "model.hidden_dims=5", "model.hidden_dims=[a]",
    "model.hidden_dims=[[1]]", "model.hidden_dims=[null]", "model.hidden_dims=[1.5]", f"seed={'9' * 400}",
    f"seed={'9' * 5000}", "seed=1.5", "seed=null", "seed=4294967296", "seed={a: 1}",
    "name=\udcff", "data.root=''", "data.root='a\nb'", "paths.outputs=~nobody_of_that_name/x",
    "trainer.max_epochs=1e3", "trainer.devices=0", "optimizer.betas=[0.9]", "optimizer.betas=[]",
    "scheduler.name=cosine_", "tracking.uri=null", "tracking.tags=[a]", "allowed_targets=[]", "allowed_targets=[[a]]",
    "hydra.nope=1", "hydra/launcher=nope", "experiment=../data/mnist", "claim=nope", "sweep.resume=latest",
    "sweep.dry_run=true",
]  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_refused_on_the_command_line(typed: str, tmp_path: Path):
    done = train_py("tracking=none", f"paths.outputs={tmp_path / 'outputs'}", typed, cwd=tmp_path)
    assert_refused(done, "error: ")
    assert done.stderr.strip().isprintable()
    assert list(tmp_path.iterdir()) == []


SWEPT = [
    "model.bn=true,maybe", "model.dropout=0,0.5,1", "'seed=range(3)'", "seed=range(-1,2)", "seed=range(0,3,0)",
    "seed=choice()", "model=mlp,nope", "model.hidden_dims=[1],[0]", "optimizer.lr=interval(0,1)",
    "optimizer.lr=glob(*)", "model.bn=true,true", "claim=overfitting,dropout_redundant", "sweep.resume=nowhere",
    "hydra.sweep.dir=x", "name=a,\udcff", "trainer.max_epochs=1,0", "model.init=a,b,", "seed=1,${nowhere}",
    "hydra/launcher=nope",
]  # fmt: skip


@pytest.mark.parametrize("typed", SWEPT)
def test_what_is_refused_of_a_sweep(typed: str, tmp_path: Path):
    done = train_py("-m", "tracking=none", f"paths.outputs={tmp_path / 'outputs'}", typed, cwd=tmp_path)
    assert_refused(done, "error: ")
    assert done.stderr.strip().isprintable()
    assert list(tmp_path.iterdir()) == []


REPORTED = [
    "sweep=nowhere", "sweep=[]", "sweep=null", "sweep={a: 1}", f"sweep={'x' * 5000}", "sweep=[a,b]",
    f"sweep={'0' * 32}", "runs=[nowhere]", "runs=5", "runs={a: 1}", f"runs=[{'x' * 5000}]", f"runs=[{'a' * 32}]",
    "metrics=[]", "metrics=5", "margin=0", "margin=nan", "margin=[1]", "claim=nope", "output=''", "paths.outputs=''",
    "tracking.uri=x", "nope=1", "sweep=${nowhere}", "metrics=[nope]", "model.bn=true", "sweep=\udcff", "tracking=nope",
]  # fmt: skip


@pytest.mark.parametrize("typed", REPORTED)
def test_what_is_refused_of_a_report(typed: str, tmp_path: Path):
    script = configs.PROJECT / "src" / "report.py"
    done = subprocess.run(
        [sys.executable, str(script), f"paths.outputs={tmp_path / 'outputs'}", typed],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert_refused(done, "error: ")
    assert done.stderr.strip().isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [["--cfg", "job"], ["--help"], ["--cfg", "job", "--resolve"], ["--info"]])
@pytest.mark.parametrize("typed", ["model.bn=true", "model=nope", "model.bn=maybe", "name=${nowhere}", "="])
def test_what_only_looks_at_the_config(option: list[str], typed: str, tmp_path: Path):
    done = train_py(typed, *option, cwd=tmp_path)
    assert done.returncode in (0, 2)
    if done.returncode == 2:
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith("error: ")
    else:
        assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
