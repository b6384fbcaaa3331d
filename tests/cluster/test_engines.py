"""The same sweep by joblib, Slurm and Ray: the same results, and the same behaviour when something goes wrong."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killing import differences, measured
from processes import train_py
from slurm import one_node, wait_until

from gaplab import config as configs

SMALL = ["data.train_size=1000", "data.valid_size=500", "trainer.max_epochs=2", "figures=false"]
LONG = ["data.train_size=20000", "data.valid_size=5000", "trainer.max_epochs=120", "figures=false", "model.bn=true"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.mem=1500M"]
ENGINES = {"joblib": ["hydra/launcher=joblib"], "slurm": SLURM, "ray": ["hydra/launcher=ray"]}


def sweep_of(outputs: Path) -> Path:
    (folder,) = (outputs / "sweeps").iterdir()
    return folder


def results(outputs: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(sweep_of(outputs).glob("*/result.json"))]


def statuses(outputs: Path) -> list[str]:
    return [result["status"] for result in results(outputs)]


def started(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(configs.PROJECT / "src" / "train.py"), "-m", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def holder(job: Path) -> int | None:
    """The process that holds the job in a folder."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(job / ".lock") and (job / "splits.npz").exists():
                return int(link.parts[2])
        except OSError:
            continue
    return None


def job_in_epoch(outputs: Path, number: int, epoch: int) -> bool:
    return any(("gap/acc", epoch) in measured(job) for job in outputs.glob(f"sweeps/*/{number}_*"))


def queue() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_node(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def swept(slurm, tmp_path_factory) -> dict[str, Path]:
    """The outputs of 8 jobs, by each engine."""
    found = {}
    for engine, words in ENGINES.items():
        found[engine] = tmp_path_factory.mktemp(engine)
        done = train_py("-m", *SMALL, "model.bn=false,true", "seed=range(4)", *words, f"paths.outputs={found[engine]}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        assert "8/8  " in done.stdout
    return found


def test_the_report_is_the_same_by_every_engine(swept):
    tables = {}
    for engine, outputs in swept.items():
        command = [sys.executable, str(configs.PROJECT / "src" / "report.py"), f"paths.outputs={outputs}"]
        subprocess.run(command, check=True, capture_output=True)
        with (sweep_of(outputs) / "report" / "runs.csv").open() as file:
            rows = list(csv.DictReader(file))
        tables[engine] = [{name: row[name] for name in row if not name.startswith("time/")} for row in rows]
    assert len(tables["joblib"]) == 8
    assert tables["slurm"] == tables["joblib"]
    assert tables["ray"] == tables["joblib"]
    for engine in ("slurm", "ray"):
        for job in sweep_of(swept[engine]).glob("*/result.json"):
            assert differences(job.parent, sweep_of(swept["joblib"]) / job.parent.name) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_the_sweep_is_one_run_with_its_jobs_below(engine: str, swept):
    from mlflow import MlflowClient

    outputs = swept[engine]
    subprocess.run([sys.executable, str(configs.PROJECT / "src/sync.py"), f"paths.outputs={outputs}"], check=True)
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("gaplab").experiment_id])
    parent = json.loads((sweep_of(outputs) / "mlflow.json").read_text())["run_id"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert len(children) == 8
    assert {run.info.status for run in [*children, client.get_run(parent)]} == {"FINISHED"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("undisturbed")
    done = train_py("-m", *LONG, "seed=0", "tracking=none", f"paths.outputs={outputs}")
    assert done.returncode == 0, done.stderr
    return outputs


def same_bits(outputs: Path, undisturbed: Path) -> None:
    (job,) = sweep_of(outputs).glob("0_*")
    (other,) = sweep_of(undisturbed).glob("0_*")
    assert differences(job, other) == []
    assert "going on from last.ckpt, after " in (job / "console.log").read_text()


def out_of_time(outputs: Path, *words: str) -> "subprocess.Popen[str]":
    """A sweep by Slurm of one job, whose time is up soon after its third epoch."""
    keys = ["hydra.launcher.signal_delay_s=60", *words]
    sweep = started(*LONG, "seed=0", "tracking=none", *SLURM, *keys, f"paths.outputs={outputs}")
    wait_until(lambda: job_in_epoch(outputs, 0, 3))
    set_limit(minutes=1)
    return sweep


def set_limit(minutes: int) -> None:
    job = subprocess.run(["squeue", "--noheader", "--format=%A"], capture_output=True, text=True, check=True).stdout
    subprocess.run(["scontrol", "update", f"JobId={job.strip()}", f"TimeLimit={minutes}"], check=True)


def test_a_job_out_of_time_is_requeued_and_comes_to_the_same_bits(slurm, undisturbed, tmp_path):
    sweep = out_of_time(tmp_path)
    (log,) = sweep_of(tmp_path).glob("0_*/slurm.log")
    wait_until(lambda: "out of time: saved, and requeued" in log.read_text())
    set_limit(minutes=60)
    output, error = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, output + error
    assert "KILLED" not in output
    same_bits(tmp_path, undisturbed)


def test_a_job_out_of_requeues_goes_on_by_resume(slurm, undisturbed, tmp_path):
    key = "hydra.launcher.max_num_timeout=0"
    sweep = out_of_time(tmp_path, key)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert "KILLED: out of time after 0 requeues; raise hydra.launcher.timeout_min" in output
    assert f"sweep.resume={sweep_of(tmp_path)} hydra/launcher=slurm " in output
    assert key in output
    done = train_py("-m", "sweep.resume=latest", "hydra/launcher=ray", f"paths.outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    same_bits(tmp_path, undisturbed)


@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_a_stopped_sweep_saves_what_runs_and_cancels_what_waits(engine: str, slurm, undisturbed, tmp_path):
    words = [*LONG, "seed=0,1,2,3", "tracking=none", *ENGINES[engine], f"paths.outputs={tmp_path}"]
    sweep = started(*words)
    wait_until(lambda: job_in_epoch(tmp_path, 0, 3))
    sweep.send_signal(signal.SIGTERM)
    output, error = sweep.communicate(timeout=90)
    assert sweep.returncode == 143, error + output
    assert error.endswith("interrupted\n")
    assert f"hydra/launcher={engine}" in output
    assert statuses(tmp_path) in (["KILLED"], ["KILLED", "KILLED"])
    wait_until(lambda: queue() == "")  # Slurm clears up after those that it cancelled
    for job in sweep_of(tmp_path).glob("[123]_*"):  # the first is enough to see that nothing is lost
        shutil.rmtree(job)
    listed = json.loads((sweep_of(tmp_path) / "sweep.json").read_text())
    (sweep_of(tmp_path) / "sweep.json").write_text(json.dumps(listed | {"jobs": listed["jobs"][:1]}))
    done = train_py("-m", "sweep.resume=latest", "hydra/launcher=joblib", f"paths.outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    same_bits(tmp_path, undisturbed)


@pytest.mark.parametrize(("engine", "reason"), [("slurm", "Slurm: FAILED ("), ("ray", "Ray: WorkerCrashedError: ")])
def test_a_killed_job_is_recorded_and_the_others_go_on(engine: str, reason: str, slurm, tmp_path):
    words = [*SMALL, "trainer.max_epochs=10", "seed=0,1,2,3", *ENGINES[engine], f"paths.outputs={tmp_path}"]
    sweep = started(*words)
    wait_until(lambda: any(holder(job) for job in tmp_path.glob("sweeps/*/1_*")))
    (job,) = tmp_path.glob("sweeps/*/1_*")
    os.kill(holder(job), signal.SIGKILL)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert statuses(tmp_path) == ["FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert f"{job.name}  FAILED: {reason}" in output
    events = [json.loads(line) for line in (job / "journal.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finish"
    assert events[-1]["status"] == "FAILED"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("hydra.launcher.partition=nowhere", "Slurm takes no such job: sbatch: error: Batch job submission failed: "),
        ("hydra.launcher.mem=150M", r"Slurm: (OUT_OF_MEMORY|FAILED \(JobLaunchFailure\))"),
        ("hydra.launcher.setup=['echo no such module; exit 3']", r"Slurm: FAILED \(NonZeroExitCode\): no such module"),
    ],
)
def test_what_slurm_refuses_or_kills_is_told(word: str, reason: str, slurm, tmp_path):
    done = train_py("-m", *SMALL, "seed=0,1", "tracking=none", *SLURM, word, f"paths.outputs={tmp_path}")
    assert done.returncode == 1
    assert done.stderr == "error: 2 of 2 jobs did not finish\n"
    assert re.search(f"_seed=0  FAILED: {reason}", done.stdout), done.stdout
    assert statuses(tmp_path) == ["FAILED", "FAILED"]


def test_jobs_that_outlive_their_sweep_are_waited_for(slurm, undisturbed, tmp_path):
    words = [*LONG, "seed=0", "tracking=none", *SLURM, f"paths.outputs={tmp_path}"]
    sweep = started(*words)
    wait_until(lambda: job_in_epoch(tmp_path, 0, 3))
    sweep.kill()
    sweep.communicate()
    done = train_py("-m", "sweep.resume=latest", *SLURM, f"paths.outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "still runs in a process that outlived its sweep; it is waited for" in done.stdout
    (job,) = sweep_of(tmp_path).glob("0_*")
    (other,) = sweep_of(undisturbed).glob("0_*")
    assert differences(job, other) == []
    assert "going on" not in (job / "console.log").read_text()
    wait_until(lambda: queue() == "")
