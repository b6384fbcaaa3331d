"""A multirun as one thing: killed and gone on with, in parallel or in turn, nothing is run twice and nothing lost."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import DIGITS, assert_refused, sent, train_py
from processes import Forked

from gaplab import config as configs
from gaplab import sweep
from gaplab.analysis import runs as analysis
from gaplab.errors import UserError
from gaplab.files import held
from gaplab.notes import NOTE
from gaplab.tracking.journal import read_journal

JOBS = ["model.bn=false,true", "seed=0,1"]
SMALL = ["trainer.max_epochs=2", "data.train_size=1500", "data.valid_size=500", "figures=false"]
SMALL += [f"data.root={DIGITS}", "data.num_train=4000"]
NUMBERS = ("train_acc", "valid_acc", "gap_acc", "train_loss", "valid_loss", "test_acc", "test_loss", "best")


def wait_until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def results(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A sweep of four jobs, one of which cannot be finished, killed in its second job and gone on with."""
    outputs = tmp_path_factory.mktemp("outputs")
    arguments = [*SMALL, f"paths.outputs={outputs}", *JOBS, "optimizer.lr=0.001,1e30", "trainer.max_epochs=3"]
    process = Forked("-m", *arguments)

    def in_second_job() -> bool:
        done = list(outputs.glob("sweeps/*/1_*/splits.npz"))
        return bool(done)

    wait_until(in_second_job)
    process.kill()
    process.communicate()
    (folder,) = (outputs / "sweeps").iterdir()
    first = results(folder)
    finished = {name: result["fit_s"] for name, result in first.items() if result["status"] != "RUNNING"}
    done = train_py("-m", f"paths.outputs={outputs}", "sweep.resume=latest")
    sent(folder)
    return outputs, folder, finished, done


def test_a_killed_sweep_goes_on_where_it_was(resumed):
    _, folder, finished, done = resumed
    found = results(folder)
    assert len(found) == 8
    assert len(finished) in (1, 2)
    kept = [name for name, seconds in finished.items() if found[name]["fit_s"] == seconds]
    assert [name for name in finished if finished and found[name]["status"] == "FINISHED"] == kept
    assert Counter(result["status"] for result in found.values()) == {"FINISHED": 4, "FAILED": 4}
    attempts = {
        path.parent.name: sum(event["event"] == "run" for event in read_journal(path.parent))
        for path in folder.glob("*/config.yaml")
    }
    assert sum(attempts.values()) <= 8 + 2  # the job that was killed, and the failed one if it had already failed
    assert f"{len(kept)} of them finished" in done.stdout
    description = json.loads((folder / "sweep.json").read_text())
    assert "optimizer.lr=0.001,1e30" in description["overrides"]
    assert len(description["resumed"]) == 1


def test_failed_jobs_are_told_and_the_rest_goes_on(resumed):
    _, _, _, done = resumed
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: 4 of 8 jobs did not finish"
    assert "the loss is nan at step" in done.stdout or "the loss is inf at step" in done.stdout
    assert "python src/train.py -m sweep.resume=" in done.stdout
    assert "model.bn=true optimizer.lr=0.001" in done.stdout


def test_parent_and_children_are_right_in_mlflow(resumed):
    from mlflow import MlflowClient

    outputs, folder, _, _ = resumed
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "gaplab"]
    runs = client.search_runs([experiment.experiment_id])
    parent = json.loads((folder / "mlflow.json").read_text())["run_id"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert len(runs) == 9
    assert sorted(run.data.tags["job"] for run in children) == sorted(results(folder))
    for run in children:
        result = results(folder)[run.data.tags["job"]]
        assert (run.info.status, run.info.run_id) == (result["status"], result["run_id"])
        if result["status"] == "FINISHED":
            history = client.get_metric_history(run.info.run_id, "gap/acc")
            assert [metric.step for metric in history] == [1, 2, 3]
            assert history[-1].value == result["gap_acc"]
    assert client.get_run(parent).info.status == "FAILED"
    assert client.get_run(parent).data.metrics["sweep/failed"] == 4
    note = client.get_run(parent).data.tags[NOTE]
    assert note.startswith("4 of 8 runs finished.")
    assert "the loss is" in note
    assert "| `optimizer.lr`&emsp; | `0.001`, `1e+30`&emsp; |" in note
    assert "8 runs of mlp on mnist, 3 epochs: every condition with seeds 0 to 1." in note
    assert str(outputs) not in note
    assert {run.data.tags["arm"] for run in children} == {
        f"bn={bn} lr={lr}" for bn in ("false", "true") for lr in ("0.001", "1e+30")
    }
    finished = next(run for run in children if run.info.status == "FINISHED")
    assert finished.data.tags[NOTE].startswith("**Gap ")


def test_a_sweep_reads_the_same_from_mlflow_as_from_its_folder(resumed):
    outputs, folder, _, _ = resumed
    parent = json.loads((folder / "mlflow.json").read_text())["run_id"]
    here = analysis.collect(outputs, "", ["latest"], []).runs
    there = analysis.collect(outputs, f"sqlite:///{outputs}/mlflow.db", [parent], []).runs
    assert {run.run_id for run in here} == {run.run_id for run in there}
    there = sorted(there, key=lambda run: [one.run_id for one in here].index(run.run_id))
    for one, other in zip(here, there, strict=True):
        assert (one.name, one.seed, one.status, one.settings) == (other.name, other.seed, other.status, other.settings)
        assert (one.diverged, one.classes, one.digest) == (other.diverged, other.classes, other.digest)
        assert one.metrics == other.metrics
        assert one.history["gap/acc"] == other.history["gap/acc"] if one.status == "FINISHED" else True


@pytest.mark.full
def test_more_seeds_are_added_to_a_sweep_and_jobs_run_side_by_side_with_the_same_bits(resumed, tmp_path):
    _, folder, _, _ = resumed
    arguments = [*SMALL, f"paths.outputs={tmp_path}", "trainer.max_epochs=3", "tracking=none", "optimizer.lr=0.001"]
    done = train_py("-m", *arguments, *JOBS, "hydra/launcher=joblib")
    assert done.returncode == 0, done.stderr
    (other,) = (tmp_path / "sweeps").iterdir()
    pairs = 0
    for result in results(other).values():
        (twin,) = [one for one in results(folder).values() if one["config_hash"] == result["config_hash"]]
        assert {name: result[name] for name in NUMBERS} == {name: twin[name] for name in NUMBERS}
        pairs += 1
    assert pairs == 4
    done = train_py("-m", *arguments, "model.bn=false,true", "seed=0,1,2", "sweep.resume=latest", "++sweep.dry_run=yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" finished ") == 4
    assert "4_model.bn=false_seed=2" in done.stdout
    assert "2 jobs to run, 1 at a time: about " in done.stdout
    assert len(list(other.glob("*/config.yaml"))) == 4


BAD = {
    "model.bn=false,true model.dropout=0,0.5,1.5": "model.dropout=1.5: must be a number in [0, 1)",
    "model.bn=false,true model.initt=a,b": 'model.initt: no such key in model; did you mean "init"?',
    "seed=0,0": "two jobs are the same: [seed=0] and [seed=0]",
    "data.train_size=500,500.0": "two jobs are the same: [data.train_size=500] and [data.train_size=500.0]",
    "data.train_size=1.0,null": "two jobs are the same: [data.train_size=1.0] and [data.train_size=null]",
    "data.train_size=0.01,0.1,1": "data.train_size=1: one sample, beside fractions; 1.0 means all",
    "model.bn=true,false seed=range(3,0)": "seed=range(3,0): no value in it, so there is nothing to run",
    "model=glob(zz*)": "model=glob(zz*): no value in it, so there is nothing to run",
    "sweep.resume=latest": "no sweep in ",
    "seed=0,1 sweep.resume=nowhere": "nowhere: no sweep there",
    "claim=overfitting,higher_lr": "claim=overfitting: has a sweep of its own",
    "seed=0,1 hydra.sweep.dir=x": "hydra.sweep: gaplab names the folders of a sweep itself",
    "claim=overfiting": 'claim=overfiting: did you mean "overfitting"?',
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_wrong_job_stops_the_sweep_before_it_starts(arguments: str, tmp_path: Path):
    done = train_py("-m", f"paths.outputs={tmp_path / 'outputs'}", *arguments.split(), cwd=tmp_path)
    assert_refused(done, BAD[arguments])
    assert list(tmp_path.iterdir()) == []


def test_another_sweeper_is_refused(tmp_path: Path):
    done = train_py("-m", f"paths.outputs={tmp_path}", "hydra/sweeper=basic", "seed=0,1")
    assert done.returncode == 2
    assert "hydra/sweeper: only gaplab's keeps a sweep together" in done.stderr


@pytest.mark.parametrize("word", ["claim=overfitting", "sweep.resume=latest", "sweep.dry_run=true"])
def test_what_is_said_of_a_sweep_needs_one(word: str, tmp_path: Path):
    done = train_py(f"paths.outputs={tmp_path / 'outputs'}", word, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("said of a sweep; add -m\n")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_by_one_process(tmp_path: Path):
    with held(tmp_path, "mine"):
        hold = f"held(Path({str(tmp_path)!r}), 'no').__enter__()"
        code = f"from pathlib import Path; from gaplab.files import held; {hold}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(configs.PROJECT / "src")},
            capture_output=True,
            text=True,
        )
    assert done.stderr.endswith(f"{tmp_path}: no\n")


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs.PROJECT / "conf/claim").glob("*.yaml")))
def test_every_claim_composes_all_of_its_jobs(name: str):
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
        whole = compose("train", [f"claim={name}"], return_hydra_config=True)
        params = [f"{key}={value}" for key, value in whole.hydra.sweeper.params.items()]
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
        ends = [configs.from_hydra(compose("train", [f"claim={name}", *job])) for job in (jobs[0], jobs[-1])]
    assert ends[0].sweep.claim == name.removesuffix("_full")
    assert configs.config_hash(ends[0]) != configs.config_hash(ends[1])
    if name.endswith("_full") and name != "identity_full":
        assert len({job[-1] for job in jobs}) >= 6  # seeds


@pytest.mark.parametrize("name", ["../x", "/etc", ".", "", "a/b", ".git", 5, None])
def test_the_jobs_of_a_sweep_are_folders_inside_it(name, tmp_path: Path):
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [{"folder": name, "overrides": []}]}))
    with pytest.raises(UserError, match=r"sweep\.json: .* is not the folder of a job inside this sweep"):
        sweep.saved_jobs(tmp_path)


def test_a_sweep_with_a_link_is_not_gone_on_with(tmp_path: Path):
    (tmp_path / "sweep.json").write_text('{"jobs": []}')
    (tmp_path / "0_job").symlink_to(tmp_path.parent)
    with pytest.raises(UserError, match="0_job: a link, to "):
        sweep.saved_jobs(tmp_path)
