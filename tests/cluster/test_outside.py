"""Ranks that a real torchrun and a real srun start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import composed
from ranks_forked import run_ranks
from slurm import one_node
from test_devices import farthest, trained  # type: ignore[import-not-found]

from gaplab import config as configs

WORDS = ["model.bn=true", "tracking=none", "figures=false", "trainer.accelerator=cpu", "trainer.threads=1"]
WORDS += ["data.train_size=2000", "data.valid_size=500", "trainer.max_epochs=2"]
TRAIN = str(configs.PROJECT / "src" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SRUN = ["srun", "--quiet", "--ntasks", "2", "--overcommit", "--mem", "3000M", "--kill-on-bad-exit", sys.executable]


@pytest.fixture(scope="module", params=["torchrun", "srun"])
def launcher(request, tmp_path_factory):
    if request.param == "torchrun":
        yield TORCHRUN
        return
    with one_node(tmp_path_factory.mktemp("slurm")):
        yield SRUN


def launched(launcher: list[str], outputs: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [*launcher, TRAIN, *words, f"paths.outputs={outputs}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run_of(outputs: Path) -> tuple[Path, dict]:
    (folder,) = (outputs / "runs").iterdir()
    return folder, json.loads((folder / "result.json").read_text())


def test_the_ranks_that_exist_are_used_and_the_first_one_prints(launcher, tmp_path):
    done = launched(launcher, tmp_path, *WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, result = run_of(tmp_path)
    assert (result["status"], result["device"]) == ("FINISHED", "2 x cpu")
    assert done.stdout.count("epoch 2/2") == 1
    run_ranks(composed(*WORDS), tmp_path / "inside", 2)
    assert farthest(trained(folder), trained(tmp_path / "inside")) == 0
    again = launched(launcher, tmp_path, "resume=latest")
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.bn=perhaps"], "model.bn"),
        (["-m", "seed=0,1"], "each rank would run the whole sweep"),
        (["trainer.devices=4"], "leave trainer.devices out"),
        (["data.root=/nowhere"], "data.root=/nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_rank_waits(launcher, words, said, tmp_path):
    done = launched(launcher, tmp_path, *words)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: " in line and "srun" not in line.partition(":")[0]]
    assert sum(said in line for line in errors) == 1, done.stderr
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_fails_is_named(launcher, tmp_path):
    fails = tmp_path / "fails.py"
    fails.write_text(
        "import os\n"
        "from gaplab.nn.mlp import MLP\n"
        "class Fails(MLP):\n"
        "    def forward(self, x):\n"
        "        if os.environ['RANK'] == '1':\n"
        "            raise ValueError('no such thing')\n"
        "        return super().forward(x)\n"
    )
    command = ["env", f"PYTHONPATH={tmp_path}", *launcher]
    words = [*WORDS, "model._target_=fails.Fails", "allowed_targets=[gaplab,torch,torchvision,fails]"]
    done = launched(command, tmp_path, *words)
    assert done.returncode != 0
    assert "error: rank 1: ValueError: no such thing" in done.stderr
    assert run_of(tmp_path)[1]["status"] == "FAILED"
