"""The journal: every parameter, metric and tag of a run in order, on disk before it is sent anywhere.

One JSON object a line, each with `time` (seconds since 1970) and `event`:
`run` (name, uri, experiment, artifacts; once more for each attempt), `params`, `tags` (values), `metrics` (step,
values), `dataset`, `artifact` (path, folder), `child` (path: the folder of a run inside this one), and last `finish`
(status). What a report adds to a run that has ended stands between `reopen` and `close`. The uri may hold a password:
the file is its owner's alone.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gaplab.config import MLflow, Tracking
from gaplab.files import read_json

SEND_WAIT_S = 60
RECEIPT_WAIT_S = 5
LARGEST = 1e100  # of a metric; what is larger, or not a number, can only have been put there
FIELDS: dict[str, type] = {
    "name": str, "uri": str, "path": str, "status": str, "digest": str, "values": dict, "profile": dict, "step": int,
}  # fmt: skip
NEEDED = {
    "params": ("values",), "tags": ("values",), "metrics": ("step", "values"), "dataset": ("digest", "profile"),
    "child": ("path",),
}  # fmt: skip


def journal_of(folder: Path) -> Path:
    return folder / "journal.jsonl"


def read_journal(folder: Path) -> Iterator[dict[str, Any]]:
    """The events in a run's folder so far; a line that a crash cut off is left out, and one that says no event."""
    if not journal_of(folder).is_file():
        return
    with journal_of(folder).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_event(event):
                yield event


def _is_event(found: Any) -> bool:
    """Whether it has the fields that are read back, each of its kind."""
    if not (isinstance(found, dict) and isinstance(found.get("event"), str)):
        return False
    if not all(isinstance(found.get(name, kind()), kind) for name, kind in FIELDS.items()):
        return False
    if not all(name in found for name in NEEDED.get(found["event"], ())):
        return False
    if found["event"] == "metrics":
        step, values = found["step"], found["values"].values()
        return 0 <= step < 2**53 and all(type(one) in (int, float) and abs(one) <= LARGEST for one in values)
    return True


def read_receipt(folder: Path) -> dict[str, Any]:
    """What the sender has done of a journal: `run_id` in MLflow, and `sent` bytes. Empty before it began."""
    return read_json(folder / "mlflow.json")


class Tracker:
    """Writes the journal of a run; with MLflow, a process of its own follows the journal and sends it.

    The sender shares nothing with training but the file: it costs no step, a server that is slow or gone cannot stop
    the run, and if this process dies the sender sends the rest and ends the MLflow run. A folder that has a journal
    already goes on with it, in the same MLflow run.

    Args:
        folder: of the run or sweep.
        settings: config group `tracking`; None for a job inside a sweep, whose sender sends for all of its jobs.
        name, tags: of the run.
    """

    def __init__(self, folder: Path, settings: Tracking | None, name: str, tags: dict[str, str]) -> None:
        self._open(folder)
        self._sender: subprocess.Popen[bytes] | None = None
        self._sweep = folder.parent if settings is None else None
        if isinstance(settings, MLflow):
            self._write(
                "run", name=name, uri=settings.uri, experiment=settings.experiment, artifacts=settings.artifacts
            )
            self.tags(tags | settings.tags)
            self._sender = _start_sender(folder)
        else:
            self._write("run", name=name)
            self.tags(tags)

    @classmethod
    def reopen(cls, folder: Path) -> "Tracker | None":
        """To add to a run that has ended; None when it is not in MLflow. To be ended by `close`."""
        if "run_id" not in read_receipt(folder):
            return None
        tracker = cls.__new__(cls)
        tracker._open(folder)
        tracker._sweep = None
        tracker._write("reopen")
        tracker._sender = _start_sender(folder)
        return tracker

    def _open(self, folder: Path) -> None:
        self._folder = folder
        path = journal_of(folder)
        cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "a", encoding="utf-8", opener=_private)  # noqa: SIM115 (open for the whole run)
        if cut_off:
            self._file.write("\n")

    def params(self, values: dict[str, Any]) -> None:
        self._write("params", values={name: str(value) for name, value in values.items()})

    def tags(self, values: dict[str, str]) -> None:
        self._write("tags", values=values)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Finite values are written; each that is not becomes the tag `nonfinite/<name>` = step."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._write("metrics", step=step, values=finite)
        if lost := values.keys() - finite.keys():
            self.tags({f"nonfinite/{name}": str(step) for name in sorted(lost)})

    def dataset(self, name: str, digest: str, source: str, profile: dict[str, Any]) -> None:
        self._write("dataset", name=name, digest=digest, source=source, profile=profile)

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, to be put into `folder` among the run's artifacts."""
        self._write("artifact", path=str(path), folder=folder)

    def child(self, folder: Path) -> None:
        """The folder of a run inside this one, whose journal begins when that run does."""
        self._write("child", path=str(folder))

    def wait_for_run(self) -> None:
        """Until the run is in MLflow, or cannot get there."""
        deadline = time.monotonic() + SEND_WAIT_S
        while self._sender and self._sender.poll() is None and time.monotonic() < deadline:
            if read_receipt(self._folder):
                return
            time.sleep(0.05)

    def finish(self, status: str, wait_s: float = SEND_WAIT_S) -> str | None:
        """End the run as FINISHED, FAILED or KILLED; MLflow's id of it, or None when there is none (yet)."""
        self._write("finish", status=status)
        return self._end(wait_s)

    def close(self) -> None:
        """End what `reopen` began; the run's status stays."""
        self._write("close")
        self._end(SEND_WAIT_S)

    def _end(self, wait_s: float) -> str | None:
        os.fsync(self._file.fileno())
        self._file.close()
        if self._sender is not None:
            self._wait_for(self._sender, wait_s)
        elif self._sweep and read_receipt(self._sweep):  # its sender sees this run within moments
            deadline = time.monotonic() + RECEIPT_WAIT_S
            while not read_receipt(self._folder) and time.monotonic() < deadline:
                time.sleep(0.05)
        run_id = read_receipt(self._folder).get("run_id")
        return None if run_id is None else str(run_id)

    def _wait_for(self, sender: "subprocess.Popen[bytes]", wait_s: float) -> None:
        try:
            code = sender.wait(wait_s)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            reason = "it is still being sent in the background" if code is None else self._failure()
            print(
                f"MLflow does not have the whole run: {reason}; nothing is lost, it is all in "
                f"{journal_of(self._folder)}",
                file=sys.stderr,
            )

    def _failure(self) -> str:
        log = self._folder / "mlflow.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return lines[-1] if lines else "the sender ended without a word"

    def _write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), "event": event, **fields}, ensure_ascii=False) + "\n")
        self._file.flush()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _start_sender(folder: Path) -> "subprocess.Popen[bytes]":
    source = str(Path(__file__).resolve().parents[2])
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    with (folder / "mlflow.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gaplab.tracking.mlflow", str(folder), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the training; the sender goes on to the end of the journal
        )
