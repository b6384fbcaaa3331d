"""Sixteen starts at once on an empty outputs folder, five times, all into one new SQLite store: once as a person types
them, and four times with torch imported already, which is the harder race."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import composed
from killing import run_forked, wait_for

from gaplab import config

STARTS = 16
RUN = ["trainer.max_epochs=1", "data.train_size=500", "data.valid_size=200", "figures=false", "trainer.threads=1"]
RUN += ["tracking.log_model=false"]  # 80 exports would take most of the time


def typed(outputs: Path) -> list[int]:
    script = config.PROJECT / "src" / "train.py"
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), *RUN, f"seed={seed}", f"paths.outputs={outputs}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for seed in range(STARTS)
    ]
    return [run.wait() for run in runs]


def forked(outputs: Path) -> list[int]:
    outputs.mkdir()
    configurations = [composed(*RUN, f"seed={seed}", f"paths.outputs={outputs}") for seed in range(STARTS)]
    children = [run_forked(one, None, output=outputs.parent / "said") for one in configurations]
    return [wait_for(child) for child in children]


@pytest.mark.parametrize("start", [typed, *[forked] * 4])
def test_sixteen_starts_at_once_all_finish_and_all_are_in_the_store(start, tmp_path: Path):
    assert start(tmp_path / "outputs") == [0] * STARTS
    results = [json.loads(path.read_text()) for path in (tmp_path / "outputs" / "runs").glob("*/result.json")]
    finished = sum(result["status"] == "FINISHED" for result in results)
    print(f"\n{finished} of {STARTS} finished")
    assert finished == STARTS
    # a busy machine may keep a sender past its run's end
    sync = subprocess.run(
        [sys.executable, str(config.PROJECT / "src" / "sync.py"), f"paths.outputs={tmp_path / 'outputs'}"],
        capture_output=True,
        text=True,
    )
    while "going" in sync.stdout:
        sync = subprocess.run(sync.args, capture_output=True, text=True)
    assert sync.returncode == 0, sync.stderr
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    found = [run for one in client.search_experiments() for run in client.search_runs([one.experiment_id])]
    assert sorted(run.data.params["seed"] for run in found) == sorted(map(str, range(STARTS)))
    assert {run.info.status for run in found} == {"FINISHED"}
