"""A journal as the queue of what is yet to be sent. How far it came is in the receipt beside it."""

import platform
import re
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from gaplab.files import read_json
from gaplab.notes import NOTE
from gaplab.tracking.journal import append, journal_of, parsed, read_receipt, write_receipt


class Entry(NamedTuple):
    """An event, the attempt it belongs to (from 1), and where in the journal it ends, in bytes."""

    event: dict[str, Any]
    attempt: int
    end: int


class Journal:
    """One journal as it grows, and the MLflow run that it becomes.

    Attributes:
        run_id: None until the run is in MLflow.
        id: the run's own, which MLflow knows it by as well; None in a journal that is older than ids.
        store: the event that says where MLflow is; None in a job of a sweep, and without MLflow.
        host: the machine of the newest attempt, where its lock can be seen.
        attempts: how often the run was begun.
        ended: whether the newest event is the end of the run, or of what a report added to it.
        reopened: whether the newest beginning is a report's.
        waiting: the events yet to be sent, in order.
        measured: the value of each (metric, step) sent so far.
        described: the description sent last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._receipt = read_receipt(folder)
        self.run_id: str | None = self._receipt.get("run_id")
        self.id: str | None = None
        self.store: dict[str, Any] | None = None
        self.host: str | None = None
        self.attempts = 0
        self.ended = self.reopened = False
        self.waiting: deque[Entry] = deque()
        self.measured: dict[tuple[str, int], float] = {}
        self.described: str | None = None
        path = journal_of(folder)
        size = path.stat().st_size if path.is_file() else 0
        self._sent = self._receipt.get("sent", 0)
        if self.run_id is None or self._sent > size:  # not of this journal: better twice, which MLflow sees, than never
            self._sent = 0
        self._seen = 0
        self._time = 0.0
        self._rest = b""

    def read(self) -> list[tuple[dict[str, Any], bool]]:
        """The events written since the last call, each with whether it is yet to be sent."""
        path = journal_of(self.folder)
        if not path.is_file() or path.stat().st_size == self._seen + len(self._rest):
            return []
        with path.open("rb") as file:  # not kept open: a sweep may have more jobs than a process may have files
            file.seek(self._seen)
            *lines, self._rest = file.read().split(b"\n")
        found = []
        for line in lines:
            self._seen += len(line) + 1
            if (event := parsed(line)) is None:  # cut off by a crash
                continue
            self._follow(event)
            entry = Entry(event, self.attempts, self._seen)
            if new := self._seen > self._sent:
                self.waiting.append(entry)
            else:
                self._note(event)
            found.append((event, new))
        return found

    def _follow(self, event: dict[str, Any]) -> None:
        word, self._time = event["event"], event["time"]
        if word in ("run", "reopen"):
            self.reopened = word == "reopen"
        if word == "run":
            self.attempts += 1
            self.host = event.get("host")
            self.id = self.id or (str(event["id"]) if re.fullmatch("[0-9a-f]{32}", str(event.get("id"))) else None)
            self.store = self.store or (event if isinstance(event.get("uri"), str) else None)
        self.ended = word == ("close" if self.reopened else "finish")

    def _note(self, event: dict[str, Any]) -> None:
        if event["event"] == "metrics" and isinstance(event.get("values"), dict):
            self.measured |= {(name, event.get("step", 0)): value for name, value in event["values"].items()}
        if event["event"] == "tags":
            self.described = event["values"].get(NOTE, self.described)

    def measured_before(self, name: str, step: int, value: float) -> bool:
        """Whether a later attempt has measured the same once more: the same value, or a time, which never is."""
        before = self.measured.get((name, step))
        return before is not None and (before == value or name.startswith("time/"))

    def sent(self) -> None:
        """The first that waits is sent, or never will be."""
        entry = self.waiting.popleft()
        self._note(entry.event)
        self._sent = entry.end

    def save(self, problem: str | None = None) -> None:
        """Write the receipt. Raises OSError."""
        receipt = {"run_id": self.run_id, "sent": self._sent, "problem": problem}
        if receipt != self._receipt:
            write_receipt(self.folder, receipt)
            self._receipt = receipt

    def end_as_killed(self) -> bool:
        """Write the end that the writer did not live to; False while somebody holds the folder, or may do so on another
        machine. Raises OSError."""
        from filelock import FileLock, Timeout

        if self.host not in (None, platform.node()):
            return False
        if not journal_of(self.folder).is_file():  # deleted meanwhile; a lock would make the folder anew
            return False
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                self.read()
                if not self.ended:
                    said = read_json(self.folder / "result.json").get("status")
                    status = said if said in ("FINISHED", "FAILED") else "KILLED"
                    word = {"event": "close"} if self.reopened else {"event": "finish", "status": status}
                    append(self.folder, **word, time=self._time)
                self.read()
        except Timeout:
            return False
        return True
