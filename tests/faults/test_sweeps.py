"""A sweep that is told to stop: its jobs, in whatever process, leave a checkpoint, and go on from there."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import differences, measured
from processes import train_py

from gaplab import config

KEYS = ["trainer.max_epochs=40", "data.train_size=3000", "data.valid_size=500", "figures=false", "trainer.threads=1"]
JOBS = ["model.bn=true", "model.dropout=0.2", "seed=0,1,2,3"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("undisturbed")
    assert train_py("-m", *KEYS, *JOBS, f"paths.outputs={outputs}", "tracking=none").returncode == 0
    (folder,) = (outputs / "sweeps").iterdir()
    return folder


def statuses(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in sorted(folder.glob("*/result.json"))}


@pytest.mark.parametrize(
    ("launcher", "signum", "status"),
    [("basic", signal.SIGTERM, 143), ("joblib", signal.SIGTERM, 143), ("joblib", signal.SIGINT, 130)],
)
def test_a_stopped_sweep_leaves_checkpoints_and_goes_on(launcher, signum, status, undisturbed, tmp_path):
    script = config.PROJECT / "src" / "train.py"
    sweep = subprocess.Popen(
        [sys.executable, str(script), "-m", *KEYS, *JOBS, f"hydra/launcher={launcher}", f"paths.outputs={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def second_job_is_in_its_third_epoch() -> bool:
        return any(("gap/acc", 3) in measured(job) for job in tmp_path.glob("sweeps/*/1_*"))

    while not second_job_is_in_its_third_epoch():
        assert sweep.poll() is None
        time.sleep(0.02)
    sweep.send_signal(signum)
    begin = time.monotonic()
    output, error = sweep.communicate()
    seconds = time.monotonic() - begin
    print(f"\n{launcher}, signal {signum}: stopped in {seconds:.1f} s")
    assert sweep.returncode == status, error
    assert "interrupted" in error
    assert "python src/train.py -m sweep.resume=" in output
    assert seconds < 8
    (folder,) = (tmp_path / "sweeps").iterdir()
    first = statuses(folder)
    assert set(first.values()) <= {"FINISHED", "KILLED"}
    assert list(first.values()).count("KILLED") in (1, 2)
    done = train_py("-m", "sweep.resume=latest", f"paths.outputs={tmp_path}", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert set(statuses(folder).values()) == {"FINISHED"}
    for job in folder.glob("*/result.json"):
        assert differences(job.parent, undisturbed / job.parent.name) == []
        if first.get(job.parent.name) == "KILLED":
            assert "going on from last.ckpt, after " in (job.parent / "console.log").read_text()
