"""A sweep's jobs as an array of Slurm jobs, `hydra/launcher=slurm`; run as a module, it is such a job.

It calls sbatch, squeue and scancel itself. What else submits to Slurm from Python asks sacct how a job ended, so where
there is no accounting it waits for ever for one that was killed, and it pickles what is saved here as plain config.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig, OmegaConf

POLL_S = 5.0  # between two questions to the controller, which has other users
SILENCE_S = 600.0  # of the controller, until it is given up
STOP_WAIT_S = 60.0  # for running jobs to save their checkpoints
SHARED_S = 70.0  # until a file written on another machine must be seen: NFS remembers for 60 s that there was none
LOG = "slurm.log"  # in a job's folder: what it printed
TIME_IS_UP = signal.SIGUSR2  # SIGTERM is for who wants the job to end for good
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL",
)  # fmt: skip
NEVER = ("requeued held", "requeued in held state", "JobHoldMaxRequeue", "DependencyNeverSatisfied")
SCRIPT = """\
#!/bin/bash
jobs=({jobs})
folder={sweep}/${{jobs[SLURM_ARRAY_TASK_ID]}}
exec >>"$folder"/{log} 2>&1 || exit 1
trap '' {signal}  # until Python listens
export PYTHONPATH={path}
{setup}
exec {python} -m hydra_plugins.gaplab_slurm "$folder" {requeues}
"""


@dataclass
class SlurmLauncherConf:
    _target_: str = MISSING
    partition: str | None = MISSING
    account: str | None = MISSING
    qos: str | None = MISSING
    timeout_min: int = MISSING
    signal_delay_s: int = MISSING
    max_num_timeout: int = MISSING
    array_parallelism: int = MISSING
    cpus_per_task: int = MISSING
    mem: str | None = MISSING
    gpus: str | None = MISSING
    gres: str | None = MISSING
    setup: list[str] = MISSING
    additional_parameters: dict[str, Any] = MISSING


ConfigStore.instance().store(group="schema", name="SlurmLauncherConf", node=SlurmLauncherConf, provider="gaplab")


class SlurmLauncher(Launcher):
    """Submits the saved jobs of a sweep as one array, waits for them, and cancels what is left when it is left itself.

    Its keys are those of `conf/hydra/launcher/slurm.yaml`.
    """

    def __init__(self, setup: Any, additional_parameters: Any, **keys: Any) -> None:
        self._keys = keys
        self._setup = list(setup)
        self._others: Any = OmegaConf.to_container(additional_parameters)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises UserError where Slurm is not to be had, and for keys out of range."""
        from gaplab.errors import UserError

        for name in ("timeout_min", "array_parallelism", "cpus_per_task"):
            if self._keys[name] < 1:
                raise UserError(f"hydra.launcher.{name}={self._keys[name]}: must be 1 or more")
        for name in ("max_num_timeout", "signal_delay_s"):
            if self._keys[name] < 0:
                raise UserError(f"hydra.launcher.{name}={self._keys[name]}: must be 0 or more")
        missing = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
        if missing:
            raise UserError(f"hydra/launcher=slurm: no {missing[0]} here; type it on a machine that submits to Slurm")
        self._sweep = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs in the folders that `job_overrides` name. Raises TrainingError when Slurm does not answer."""
        from gaplab.errors import TrainingError

        folders = [self._sweep / name for (name,) in job_overrides]
        name = f"gaplab-{self._sweep.name}"
        _call("scancel", f"--name={name}", "--state=PENDING")  # of an earlier start that was killed
        submitted = _call(*self._sbatch(name, len(folders)), script=self._script([one.name for one in folders]))
        if submitted.returncode != 0:
            reason = TrainingError(f"Slurm takes no such job: {_last_line(submitted.stderr)}")
            return [JobReturn(status=JobStatus.FAILED, _return_value=reason) for _ in folders]
        array = submitted.stdout.strip().partition(";")[0]
        try:
            states = _wait(array, len(folders))
        except TrainingError:  # its jobs may well go on
            raise
        except BaseException:
            try:
                _call("scancel", "--state=PENDING", array)
                _wait(array, len(folders), STOP_WAIT_S)
            finally:
                _call("scancel", array)
            raise
        return [_returned(folder, *state) for folder, state in zip(folders, states, strict=True)]

    def _sbatch(self, name: str, count: int) -> list[str]:
        keys = self._keys
        options = {
            "job-name": name,
            "array": f"0-{count - 1}%{keys['array_parallelism']}",
            "ntasks": 1,
            "time": keys["timeout_min"],
            "signal": f"B:{TIME_IS_UP.name.removeprefix('SIG')}@{keys['signal_delay_s']}",
            "requeue": True,
            "open-mode": "append",
            "output": os.devnull,
            **{name.replace("_", "-"): keys[name] for name in ("partition", "account", "qos", "mem", "gpus", "gres")},
            "cpus-per-task": keys["cpus_per_task"],
            **self._others,
        }
        said = {name: value for name, value in options.items() if value is not None and value is not False}
        return ["sbatch", "--parsable"] + [
            f"--{name}" if value is True else f"--{name}={value}" for name, value in said.items()
        ]

    def _script(self, names: list[str]) -> str:
        source = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        return SCRIPT.format(
            jobs=" ".join(map(shlex.quote, names)),
            sweep=shlex.quote(str(self._sweep)),
            log=LOG,
            signal=TIME_IS_UP.name,
            path=shlex.quote(path),
            setup="\n".join(self._setup),
            python=shlex.quote(sys.executable),
            requeues=self._keys["max_num_timeout"],
        )


def _call(*words: str, script: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, input=script, capture_output=True, text=True)


def _wait(array: str, count: int, limit_s: float = float("inf")) -> list[tuple[str, str]]:
    """The state in which each job of the array ended, and Slurm's reason. Raises TrainingError after `SILENCE_S`."""
    from gaplab.errors import TrainingError

    states: dict[int, tuple[str, str]] = {}
    begin = heard = time.monotonic()
    while time.monotonic() - begin < limit_s:
        asked = _call("squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%K|%T|%r")
        now = time.monotonic()
        gone = "Invalid job id" in asked.stderr  # all have ended, some minutes ago
        if asked.returncode == 0 or gone:
            heard = now
            lines = [line.strip().split("|", 2) for line in asked.stdout.splitlines()]
            # what was cancelled before it began has no index any more: N/A
            seen = {int(index): (state, reason) for index, state, reason in lines if index.isdecimal()}
            for index, (state, reason) in seen.items():
                if state == "PENDING" and any(word in reason.replace("_", " ") for word in NEVER):
                    _call("scancel", f"{array}_{index}")
            states |= seen
            if all(index not in seen or seen[index][0] in ENDED for index in range(count)):
                return [states.get(index, ("ended", "unknown")) for index in range(count)]
        elif now - heard > SILENCE_S:
            raise TrainingError(f"Slurm does not answer: {_last_line(asked.stderr)}")
        time.sleep(POLL_S)
    return []


def _returned(folder: Path, state: str, reason: str) -> JobReturn:
    from gaplab.errors import TrainingError

    deadline = time.monotonic() + SHARED_S
    while state == "COMPLETED" and not (folder / "result.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    if state == "COMPLETED":
        return JobReturn(status=JobStatus.COMPLETED)
    with suppress(OSError):
        (folder / "result.json").read_bytes()  # its own account comes first
        return JobReturn(status=JobStatus.FAILED)
    why = "" if reason in ("None", "unknown") else f" ({reason})"
    try:
        said = _last_line((folder / LOG).read_text(errors="replace"))
    except OSError:
        said = f"it could not write {folder / LOG}: is that on a file system which the nodes share?"
    cause = TrainingError(f"Slurm: {state}{why}{': ' * bool(said)}{said}")
    return JobReturn(status=JobStatus.FAILED, _return_value=cause)


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def main(folder: Path, requeues: int) -> int:
    """Be the Slurm job that runs the saved job in `folder`; when its time is up, save and requeue it, `requeues` times.

    Returns the exit status.
    """
    time_is_up = False

    def save_and_requeue(_signum: int, _frame: object) -> None:
        nonlocal time_is_up
        time_is_up = True
        os.kill(os.getpid(), signal.SIGTERM)  # saved as when told to stop

    signal.signal(TIME_IS_UP, save_and_requeue)
    from gaplab import cli, interrupt, sweep
    from gaplab.files import read_json, write_whole

    try:
        sweep.run_saved(folder)
    except interrupt.Interrupted as stop:
        if time_is_up and not (folder.parent / sweep.STOP).exists():
            if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < requeues:
                print("out of time: saved, and requeued", flush=True)
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
            else:
                error = f"out of time after {requeues} requeues; raise hydra.launcher.timeout_min or max_num_timeout"
                result = read_json(folder / "result.json") | {"status": "KILLED", "error": error}
                write_whole(folder / "result.json", json.dumps(result, indent=2) + "\n")
        return stop.exit_status
    except Exception as error:
        return cli.report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
