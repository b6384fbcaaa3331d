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
    """An event, the attempt it belongs to (from 1), where in the journal it ends, in bytes, and the names of its values
    that are to be sent: all of them, or those that were refused before."""

    event: dict[str, Any]
    attempt: int
    end: int
    names: frozenset[str] | None = None

    @property
    def values(self) -> dict[str, Any]:
        """Of params, tags or metrics."""
        values = self.event["values"].items()
        return {name: value for name, value in values if self.names is None or name in self.names}


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
        waiting: the events yet to be sent, in order; those that were refused by an earlier sender are among them.
        refused: why MLflow refused what, by the end of the event and the name of the value, or "" for the event.
        params, measured: the names of the parameters, and the value of each (metric, step), sent so far.
        held: why nothing of it can be sent now: its run is deleted in MLflow.
        checked: whether this process has compared what is sent with what MLflow has.
        described: the description sent last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: str | None = None
        self.checked = False
        self._begin()

    def _begin(self) -> None:
        self._receipt = read_receipt(self.folder)
        self.run_id: str | None = self._receipt.get("run_id")
        self.id: str | None = None
        self.store: dict[str, Any] | None = None
        self.host: str | None = None
        self.attempts = 0
        self.ended = self.reopened = False
        self.waiting: deque[Entry] = deque()
        self.params: set[str] = set()
        self.measured: dict[tuple[str, int], float] = {}
        self.described: str | None = None
        self._homes: list[Path] = []
        path = journal_of(self.folder)
        size = path.stat().st_size if path.is_file() else 0
        self._sent = self._receipt.get("sent", 0)
        if self.run_id is None or self._sent > size:  # not of this journal: better twice, which MLflow sees, than never
            self._sent = 0
        self.refused = {int(end): names for end, names in self._receipt.get("refused", {}).items() if self._sent}
        self._seen = 0
        self._time = 0.0
        self._rest = b""

    def restart(self, run_id: str | None) -> None:
        """Send everything once more, to the run `run_id` or to a new one. Raises OSError."""
        write_receipt(self.folder, {"run_id": run_id})
        self._begin()
        self.read()

    def locate(self, path: str) -> Path:
        """A path that the journal names, also where the folder was moved since."""
        for home in self._homes:
            if Path(path).is_relative_to(home):
                return self.folder / Path(path).relative_to(home)
        return Path(path)

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
            refused = self.refused.get(self._seen)
            if new := self._seen > self._sent:
                self.waiting.append(Entry(event, self.attempts, self._seen))
            else:
                self._note(Entry(event, self.attempts, self._seen))
                if refused is not None:
                    self.waiting.append(
                        Entry(event, self.attempts, self._seen, None if "" in refused else frozenset(refused))
                    )
            found.append((event, new))
        return found

    def _follow(self, event: dict[str, Any]) -> None:
        word, self._time = event["event"], event["time"]
        if word in ("run", "reopen"):
            self.reopened = word == "reopen"
        if word == "run":
            self.attempts += 1
            self.host = event.get("host")
            self.id = str(event["id"]) if re.fullmatch("[0-9a-f]{32}", str(event.get("id"))) else self.id
            if isinstance(event.get("folder"), str):
                self._homes.insert(0, Path(event["folder"]))
            self.store = self.store or (event if isinstance(event.get("uri"), str) else None)
        self.ended = word == ("close" if self.reopened else "finish")

    def _note(self, entry: Entry) -> None:
        event, refused = entry.event, self.refused.get(entry.end, {})
        if event["event"] not in ("params", "tags", "metrics") or not isinstance(event.get("values"), dict):
            return
        values = {name: value for name, value in event["values"].items() if name not in refused}
        if event["event"] == "params":
            self.params |= values.keys()
        elif event["event"] == "metrics":
            self.measured |= {(name, event.get("step", 0)): value for name, value in values.items()}
        else:
            self.described = values.get(NOTE, self.described)

    def measured_before(self, name: str, step: int, value: float) -> bool:
        """Whether a later attempt has measured the same once more: the same value, or a time, which never is."""
        before = self.measured.get((name, step))
        return before is not None and (before == value or name.startswith("time/"))

    def sent(self, refused: dict[str, str]) -> None:
        """The first that waits is sent, but for what MLflow refused of it, by name and reason."""
        entry = self.waiting.popleft()
        self.refused.pop(entry.end, None)
        if refused:
            self.refused[entry.end] = refused
        self._note(entry)
        self._sent = max(self._sent, entry.end)

    def save(self, problem: str | None = None) -> None:
        """Write the receipt. Raises OSError."""
        refused = {str(end): names for end, names in self.refused.items()} or None
        receipt = {"run_id": self.run_id, "sent": self._sent, "problem": problem, "refused": refused}
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
