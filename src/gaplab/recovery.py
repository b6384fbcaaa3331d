"""Runs whose process is gone without a word: SIGKILL, a crash of the machine. The next start records them as KILLED."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gaplab import config as configs
from gaplab.config import MLflow, Tracking
from gaplab.errors import UserError
from gaplab.files import read_json, refuse_links
from gaplab.result import RunResult
from gaplab.tracking.journal import has_ended, start_sender
from gaplab.tracking.outbox import Journal


def recover(outputs: Path, tracking: Tracking) -> list[Path]:
    """End every run and sweep below `outputs` whose process on this machine is gone, with its jobs; their folders.

    MLflow hears of those in the store of `tracking` or in the one beside them, in the background: a folder may be
    somebody else's. Where nothing is amiss, this reads the last bytes of each journal.
    """
    stores = {f"sqlite:///{outputs / 'mlflow.db'}", tracking.uri if isinstance(tracking, MLflow) else None}
    ended = []
    for folder in (folder for kind in ("runs", "sweeps") for folder in sorted((outputs / kind).glob("*"))):
        if has_ended(folder) and any((folder / name).exists() for name in ("result.json", "sweep.json")):
            continue
        for journal in _ended(folder):
            ended.append(journal.folder)
            if journal.store is not None and journal.store["uri"] in stores:
                start_sender(journal.folder)
    return ended


def _ended(folder: Path) -> Iterator[Journal]:
    """The journals below a folder that ended just now; those of runs that are still going are left alone."""
    for one in [*(path.parent for path in sorted(folder.glob("*/journal.jsonl"))), folder]:
        journal = Journal(one)
        with suppress(OSError, UserError):  # a disk that cannot be written: the next start tries again
            refuse_links(one)
            journal.read()
            if journal.attempts == 0 or journal.host is None:
                continue
            ended_before = journal.ended
            if journal.end_as_killed():
                _record(one, journal.run_id or journal.id or "")
                if not ended_before:
                    yield journal


def _record(folder: Path, run_id: str) -> None:
    if read_json(folder / "result.json") or (folder / "sweep.json").exists():
        return
    config = configs.load(folder / "config.yaml")
    result = RunResult(run_id, "KILLED", config.seed, configs.condition(config), configs.config_hash(config))
    result.error = "its process ended without a word"
    result.write(folder)
