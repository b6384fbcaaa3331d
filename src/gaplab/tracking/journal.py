"""The journal: every parameter, metric and tag of a run in order, on disk before it is sent anywhere.

One JSON object a line, each with `time` (seconds since 1970) and `event`:
`run` (name, id, folder, host, uri, experiment, artifacts; once more for each attempt, with the same id), `params`,
`tags` (values), `metrics` (step, values), `dataset`, `artifact` (path inside the folder, folder), `child` (path: the
folder of a run directly inside this one), and last `finish` (status). What is added to a run that has ended stands
between `reopen` and `close`: its `model`, or what a report says. The uri may hold a password: the file is its owner's
alone.
"""

import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from gaplab.config import USUAL_TARGETS, MLflow, Tracking, elsewhere
from gaplab.files import read_json, write_whole
from gaplab.machine import command
from gaplab.tracking.environment import of_child

SEND_WAIT_S = 7.0  # all waits of a command together; MLflow's own start beside it costs some seconds more
RUN_WAIT_S = 6.0
PROBLEM_WAIT_S = 2.0
LARGEST = 1e100  # of a metric; what is larger, or not a number, can only have been put there
FIELDS: dict[str, type] = {
    "name": str, "host": str, "uri": str, "path": str, "status": str, "digest": str, "values": dict, "profile": dict,
    "step": int,
}  # fmt: skip
NEEDED = {
    "metrics": ("step", "values"), "params": ("values",), "tags": ("values",), "dataset": ("digest", "profile"),
    "child": ("path",), "artifact": ("path",),
}  # fmt: skip


def journal_of(folder: Path) -> Path:
    return folder / "journal.jsonl"


def read_journal(folder: Path) -> Iterator[dict[str, Any]]:
    """The events in a run's folder so far; what is no whole event is left out."""
    if not journal_of(folder).is_file():
        return
    with journal_of(folder).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (event := parsed(line)) is not None:
                yield event


def has_ended(folder: Path) -> bool:
    """Whether the newest event of a run is its end, or there is no run; read from the last bytes."""
    try:
        with journal_of(folder).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            *_, last = b"", *file.read().splitlines()
    except OSError:
        return True
    event = parsed(last)
    return event is not None and event["event"] in ("finish", "close")


def parsed(line: str | bytes) -> dict[str, Any] | None:
    """The event in a line of a journal, or None when a crash cut it off, or it is no event of gaplab's."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if _is_event(event) else None


def _is_event(found: Any) -> bool:
    """Whether it has the fields that are read back, each of its kind."""
    if not (isinstance(found, dict) and isinstance(found.get("event"), str)):
        return False
    if not isinstance(found.get("time"), int | float) or not abs(found["time"]) < 1e12:
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
    """What the sender has done of a journal: `run_id` in MLflow once that is known, `sent` bytes, a `problem` while
    MLflow does not take the rest, and what it `refused`: {end of the event in bytes: {name of the value: reason}}.
    Empty before it began, and when the file is damaged."""
    receipt = read_json(folder / "mlflow.json")
    run_id, sent, problem = receipt.get("run_id"), receipt.get("sent", 0), receipt.get("problem")
    refused = receipt.get("refused", {})
    good = (
        (run_id is None or (isinstance(run_id, str) and re.fullmatch(r"[\w-]{1,256}", run_id)))
        and (type(sent) is int and sent >= 0)
        and (problem is None or isinstance(problem, str))
        and isinstance(refused, dict)
        and all(end.isdecimal() and isinstance(names, dict) for end, names in refused.items())
    )
    return receipt if good else {}


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """What is None is left out. Raises OSError."""
    known = {name: value for name, value in receipt.items() if value is not None}
    write_whole(folder / "mlflow.json", json.dumps(known) + "\n")


def append(folder: Path, event: str, **fields: Any) -> None:
    """Add an event to a journal that nobody else writes. Raises OSError."""
    with _opened(folder) as file:
        _write(file, event, **fields)
        os.fsync(file.fileno())


class Tracker:
    """Writes the journal of a run; with MLflow, a process of its own follows the journal and sends it.

    The sender shares nothing with training but the file: it costs no step, a server that is slow or gone cannot stop
    the run, and if this process dies the sender sends the rest and ends the MLflow run as KILLED. A folder that has a
    journal already goes on with it, in the same MLflow run.

    Args:
        folder: of the run or sweep.
        settings: config group `tracking`; None for a job inside a sweep, whose sender sends for all of its jobs.
        name, tags: of the run.
        allowed_targets: packages beyond the usual ones that its config may name when its model is logged.

    Attributes:
        id: of the run, the same for every attempt.
    """

    def __init__(
        self,
        folder: Path,
        settings: Tracking | None,
        name: str,
        tags: dict[str, str],
        allowed_targets: Sequence[str] = USUAL_TARGETS,
    ) -> None:
        last = _last_run(folder)
        if _is_copy(folder, last):  # of a run that is still there, and whose run in MLflow is not this one's
            (folder / "mlflow.json").unlink(missing_ok=True)
            last = {}
        self.id = str(last.get("id") or secrets.token_hex(16))
        run = {"name": name, "id": self.id, "folder": str(folder.absolute()), "host": platform.node()}
        self._open(folder)
        if isinstance(settings, MLflow):
            store = {"uri": settings.uri, "experiment": settings.experiment, "artifacts": settings.artifacts}
            self._write("run", **run, **store)
            self.tags(settings.tags | tags)
            self._start(allowed_targets)
        else:
            self._write("run", **run)
            self.tags(tags)

    @classmethod
    def of_rank(cls, folder: Path | None) -> "Tracker":
        """To add to a run that another process begins and ends; None: to add nothing."""
        tracker = cls.__new__(cls)
        tracker._folder = folder or Path()
        tracker._file = _opened(folder) if folder else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return tracker

    @classmethod
    def reopen(cls, folder: Path) -> "Tracker | None":
        """To add to a run that nobody writes any more, and to be ended by `close`; None for one without MLflow."""
        events = list(read_journal(folder))
        if not any(event["event"] == "run" and "uri" in event for event in events):
            return None
        tracker = cls.__new__(cls)
        tracker._open(folder)
        if [event["event"] for event in events if event["event"] in ("run", "finish")][-1] == "run":
            tracker._write("finish", status="KILLED", time=events[-1]["time"])
        tracker._write("reopen")
        tracker._start()
        return tracker

    def _open(self, folder: Path) -> None:
        self._folder = folder
        self._file = _opened(folder)
        self._sender: subprocess.Popen[bytes] | None = None
        self._not_started: str | None = None
        self._patience = SEND_WAIT_S
        self._needed = sys.maxsize  # bytes of the journal that `finish` waits for to be sent

    def _start(self, allowed_targets: Sequence[str] = USUAL_TARGETS) -> None:
        """Training goes on without a sender too: what it would have sent stays in the journal."""
        try:
            receipt = read_receipt(self._folder)
            if receipt.pop("problem", None) is not None:  # an earlier sender's
                write_receipt(self._folder, receipt)
            self._sender = start_sender(self._folder, allowed_targets)
        except OSError as error:
            self._not_started = f"its process could not be started ({error.strerror})"

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
        sizes = ", ".join(f"{profile[split]} {split}" for split in ("train", "valid", "test") if profile.get(split))
        self.tags({"data": f"{name}: {sizes}"})  # runs on other samples are told apart in MLflow's lists by it

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, to be put into `folder` among the run's artifacts."""
        self._write("artifact", path=str(path), folder=folder)

    def child(self, folder: Path) -> None:
        """The folder of a run inside this one, whose journal begins when that run does."""
        self._write("child", path=str(folder))

    def wait_for_run(self) -> None:
        """Until the run is in MLflow, but not long: this is part of the time that tracking may add."""
        start = time.monotonic()
        while self._sender and self._sender.poll() is None and time.monotonic() - start < RUN_WAIT_S:
            receipt = read_receipt(self._folder)
            if "run_id" in receipt:
                return
            if "problem" in receipt:
                break
            time.sleep(0.05)
        self._patience -= time.monotonic() - start

    def finish(self, status: str, wait_s: float = SEND_WAIT_S, model: bool = False) -> str | None:
        """End the run as FINISHED, FAILED or KILLED; MLflow's id of it, or None when there is none (yet).

        Waits until all is sent, for `wait_s` seconds at most, then says that the sender goes on by itself; who is in a
        hurry knows. With `model` the sender then logs the run's model as well, which is not waited for.
        """
        line = _line("finish", status=status)
        if model:  # in one piece: a sender that sees the end of a journal leaves
            self._needed = os.fstat(self._file.fileno()).st_size + len(line.encode())
            line += "".join(map(_line, ("reopen", "model", "close")))
        self._file.write(line)
        self._file.flush()
        return self._end(wait_s)

    def close(self) -> None:
        """End what `reopen` began; the run's status stays."""
        self._write("close")
        self._end(SEND_WAIT_S)

    def _end(self, wait_s: float) -> str | None:
        os.fsync(self._file.fileno())
        self._file.close()
        if self._sender is not None:
            self._wait_for(self._sender, min(wait_s, self._patience))
        elif self._not_started:
            self._tell(f": {self._not_started}; nothing is lost: {self._sync()}")
        return read_receipt(self._folder).get("run_id")

    def _wait_for(self, sender: "subprocess.Popen[bytes]", wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        since = None  # when there is a problem, it is waited for less, yet for long enough to see that it is over
        while (code := sender.poll()) is None and (now := time.monotonic()) < deadline:
            receipt = read_receipt(self._folder)
            if receipt.get("sent", 0) >= self._needed:
                threading.Thread(target=sender.wait, daemon=True).start()
                return
            problem = receipt.get("problem")
            since = None if problem is None else since or now
            if since is not None and now - since > PROBLEM_WAIT_S:
                break
            time.sleep(0.05)
        problem = read_receipt(self._folder).get("problem")
        if code is None:
            threading.Thread(target=sender.wait, daemon=True).start()
        if code == 0:
            return
        if problem is not None:
            self._tell(f": {problem}; nothing is lost: {self._sync()}")
        elif code is None and wait_s >= PROBLEM_WAIT_S:
            self._tell(f" yet: it is being sent in the background; should that fail, {self._sync()}")
        elif code is not None:
            self._tell(f": {self._last_word()}; nothing is lost, it is all in {journal_of(self._folder)}")

    def _tell(self, what: str) -> None:
        print(f"MLflow does not have the whole run{what}", file=sys.stderr)

    def _sync(self) -> str:
        outputs = self._folder.parent.parent
        return (
            f"{command('sync', *elsewhere(outputs))} sends the rest of {journal_of(self._folder).relative_to(outputs)}"
        )

    def _last_word(self) -> str:
        log = self._folder / "mlflow.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return lines[-1] if lines else "its sender ended without a word"

    def _write(self, event: str, **fields: Any) -> None:
        _write(self._file, event, **fields)


def _last_run(folder: Path) -> dict[str, Any]:
    """The newest event that began a run in a folder; empty when there is none."""
    return next((event for event in reversed(list(read_journal(folder))) if event["event"] == "run"), {})


def _is_copy(folder: Path, last: dict[str, Any]) -> bool:
    """Whether the run that `last` began is another folder's, which is still there; a folder that was moved is none."""
    origin = Path(str(last.get("folder", folder)))
    if not origin.is_dir() or origin.resolve() == folder.resolve():
        return False
    return _last_run(origin).get("id") == last.get("id")


def _opened(folder: Path) -> TextIO:
    """A journal, to be written on after its last whole line."""
    path = journal_of(folder)
    cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")
    file = open(path, "a", encoding="utf-8", opener=_private)  # noqa: SIM115 (open for the whole run)
    if cut_off and path.stat().st_size:
        file.write("\n")
    return file


def _write(file: TextIO, event: str, **fields: Any) -> None:
    file.write(_line(event, **fields))
    file.flush()


def _line(event: str, **fields: Any) -> str:
    return json.dumps({"time": time.time(), "event": event, **fields}, ensure_ascii=False) + "\n"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def start_sender(folder: Path, allowed_targets: Sequence[str] = USUAL_TARGETS) -> "subprocess.Popen[bytes]":
    environment = {
        name: value for name, value in of_child().items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    with (folder / "mlflow.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gaplab.tracking.mlflow", str(folder), str(os.getpid()), ",".join(allowed_targets)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the training; the sender goes on to the end of the journal
        )
