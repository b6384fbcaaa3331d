"""The folder of the run or the sweep that a path, a name, an id or `latest` stands for, by one rule for every command.

`latest` is what began last by the time in its journal, seconds since 1970. The names of folders hold local time, which
goes back when summer time ends or a machine changes zones, and copying a folder changes the times of its files.
"""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from gaplab import config as configs
from gaplab.errors import UserError
from gaplab.files import plain
from gaplab.machine import command
from gaplab.tracking.journal import read_journal, read_receipt

CONFIG, SWEEP = "config.yaml", "sweep.json"  # what makes a folder that of a run, and of a sweep


def find_run(outputs: Path, name: str, key: str, needs: str = CONFIG, resumable: bool = False) -> Path | None:
    """The folder of a run or of a job of a sweep; None for an MLflow id that no folder here has. Raises UserError.

    Prints on stderr which folder it took where the name leaves a choice.

    Args:
        outputs: folder of runs and sweeps.
        name: `latest`, a path, a name in `outputs/runs`, that of a job (of several sweeps, the newest one's),
            `<sweep>/<job>`, or the run's id in MLflow.
        key: what the name was typed for.
        needs: a file that the latest run must have.
        resumable: refuse jobs, which their sweep resumes.
    """
    runs, sweeps = outputs / "runs", outputs / "sweeps"
    if name == "latest":
        alone = [folder for folder in runs.glob("*") if (folder / needs).is_file()]
        jobs = [folder for folder in sweeps.glob("*/*") if (folder / needs).is_file()]
        candidates = alone if resumable else alone + jobs
        if not candidates:
            which = "" if needs == CONFIG else " that has finished an epoch"
            raise UserError(f"{key}=latest: no run in {runs if resumable else outputs}{which}")
        latest, newest = _newest(candidates), _newest(alone + jobs)
        newer = f"; {plain(newest.relative_to(outputs))} is newer, but a job of a sweep: {_resume(newest.parent)}"
        _tell(outputs, f"{key}=latest", latest, "" if newest == latest else newer)
        return latest
    if configs.is_run_id(name):
        receipts = (*runs.glob("*/mlflow.json"), *sweeps.glob("*/*/mlflow.json"))
        matches = [path.parent for path in receipts if read_receipt(path.parent).get("run_id") == name]
        if not matches:
            return None
    else:
        places = (configs.folder(key, name), runs / name, sweeps / name)
        matches = [folder for folder in places if (folder / CONFIG).is_file() or (folder / SWEEP).is_file()]
    jobs = [sweep / name for sweep in sweeps.glob("*") if (sweep / name / CONFIG).is_file()]
    if not matches and jobs:
        matches = [_newest(jobs)]
        if len(jobs) > 1:
            _tell(outputs, f"{key}={name}", matches[0], f", the newest of {len(jobs)} jobs with this name")
    if not matches:
        raise UserError(f"{key}={name}: no run there (no {CONFIG}), nor in {runs}, nor a job of that name")
    folder = matches[0]
    if resumable:
        for sweep in (folder, folder.parent):
            if (sweep / SWEEP).is_file():
                raise UserError(f"{key}={name}: of a sweep; go on with {_resume(sweep)}")
    if (folder / SWEEP).is_file():
        raise UserError(f"{key}={name}: a sweep; name one of the jobs in it")
    return folder


def find_sweep(outputs: Path, name: str, key: str) -> Path:
    """The folder of a sweep by its path, its name in `outputs/sweeps`, or `latest`; as `find_run`."""
    sweeps = outputs / "sweeps"
    if name == "latest":
        candidates = [path.parent for path in sweeps.glob(f"*/{SWEEP}")]
        if not candidates:
            raise UserError(f"no sweep in {sweeps}; run one with {command('train', '-m')} …")
        latest = _newest(candidates)
        _tell(outputs, f"{key}=latest", latest)
        return latest
    for folder in (configs.folder(key, name), sweeps / name):
        if (folder / SWEEP).is_file():
            return folder
    raise UserError(f"{key}={name}: no sweep there (no {SWEEP}), nor in {sweeps}")


def _newest(folders: Iterable[Path]) -> Path:
    return max(folders, key=lambda folder: (_began(folder), folder.name))


def _began(folder: Path) -> float:
    """Seconds since 1970; of a folder without a journal, the time of its oldest file."""
    with suppress(OSError):
        for event in read_journal(folder):
            return float(event["time"])
    return min((path.stat().st_mtime for path in folder.iterdir() if path.is_file()), default=0.0)


def _resume(sweep: Path) -> str:
    return command("train", "-m", f"sweep.resume={sweep}")


@cache
def _tell(outputs: Path, typed: str, folder: Path, more: str = "") -> None:
    """Once, however often a command looks; under torchrun and srun, by one rank of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{typed} is {plain(folder.relative_to(outputs))}{more}", file=sys.stderr)
