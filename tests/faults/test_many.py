"""Sixteen starts at once on an empty outputs folder, five times, all into one new SQLite store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gaplab import config

STARTS, ROUNDS = 16, 5
RUN = ["trainer.max_epochs=1", "data.train_size=500", "data.valid_size=200", "figures=false", "trainer.threads=1"]


@pytest.mark.parametrize("attempt", range(ROUNDS))
def test_sixteen_starts_at_once_all_finish_and_all_are_in_the_store(attempt: int, tmp_path: Path):
    script = config.PROJECT / "src" / "train.py"
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), *RUN, f"seed={seed}", f"paths.outputs={tmp_path / 'outputs'}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(STARTS)
    ]
    said = [run.communicate()[1] for run in runs]
    results = [json.loads(path.read_text()) for path in (tmp_path / "outputs" / "runs").glob("*/result.json")]
    finished = sum(result["status"] == "FINISHED" for result in results)
    print(f"\n{finished} of {STARTS} finished")
    assert [run.returncode for run in runs] == [0] * STARTS, said
    assert finished == STARTS
    for line in filter(None, said):  # a busy machine may keep the sender past the run's end, no more than that
        assert "still being sent" in line
    in_time = subprocess.run(
        [sys.executable, str(config.PROJECT / "src" / "sync.py"), f"paths.outputs={tmp_path / 'outputs'}"],
        capture_output=True,
        text=True,
    )
    assert in_time.returncode == 0, in_time.stderr
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    found = [run for one in client.search_experiments() for run in client.search_runs([one.experiment_id])]
    assert sorted(run.data.params["seed"] for run in found) == sorted(map(str, range(STARTS)))
    assert {run.info.status for run in found} == {"FINISHED"}
