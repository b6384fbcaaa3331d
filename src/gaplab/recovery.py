"""Runs whose process is gone without a word: SIGKILL, a crash of the machine. The next start records them as KILLED."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gaplab import config as configs
from gaplab.config import PROJECT
from gaplab.errors import UserError
from gaplab.result import RunResult
from gaplab.tracking.journal import has_ended
from gaplab.tracking.outbox import Journal


def recover(outputs: Path) -> list[Path]:
    """End every run and sweep below `outputs` whose process is gone, with its jobs, as KILLED; their folders.

    MLflow hears of it from a process of its own, in the background. Where nothing is amiss, this reads the last bytes
    of each journal.
    """
    folders = [folder for kind in ("runs", "sweeps") for folder in sorted((outputs / kind).glob("*"))]
    ended = [journal for folder in folders if not has_ended(folder) for journal in _ended(folder)]
    if any(journal.store is not None for journal in ended):
        subprocess.Popen(
            [sys.executable, str(PROJECT / "src" / "sync.py"), f"paths.outputs='{outputs}'"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return [journal.folder for journal in ended]


def _ended(folder: Path) -> Iterator[Journal]:
    """The journals below a folder that ended just now; those of runs that are still going are left alone."""
    for one in [*(path.parent for path in sorted(folder.glob("*/journal.jsonl"))), folder]:
        journal = Journal(one)
        journal.read()
        if journal.ended:
            continue
        try:
            if journal.end_as_killed():
                _record(one, journal.run_id or journal.id or "")
                yield journal
        except OSError:  # a disk that cannot be written; the next start tries again
            continue


def _record(folder: Path, run_id: str) -> None:
    if (folder / "result.json").exists() or (folder / "sweep.json").exists():
        return
    try:
        config = configs.load(folder / "config.yaml")
    except UserError:
        return
    result = RunResult(run_id, "KILLED", config.seed, configs.condition(config), configs.config_hash(config))
    result.error = "its process ended without a word"
    result.write(folder)
