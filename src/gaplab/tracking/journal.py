"""The journal: every parameter, metric and tag of a run in order, on disk before it is sent anywhere.

One JSON object a line, each with `time` (seconds since 1970) and `event`:
`run` (name, uri, experiment, artifacts), `params`, `tags` (values), `metrics` (step, values), `dataset`, `artifact`
(path, folder) and, last, `finish` (status). The uri may hold a password: the file is its owner's alone.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gaplab.config import MLflow, Tracking

SEND_WAIT_S = 60


class Tracker:
    """Writes the journal of a run; with MLflow, a process of its own follows the journal and sends it.

    The sender shares nothing with training but the file: it costs no step, a server that is slow or gone cannot stop
    the run, and if this process dies the sender sends the rest and ends the MLflow run.
    """

    def __init__(self, folder: Path, settings: Tracking, name: str, tags: dict[str, str]) -> None:
        self._path = folder / "journal.jsonl"
        self._file = open(self._path, "a", encoding="utf-8", opener=_private)  # noqa: SIM115 (open for the whole run)
        self._sender: subprocess.Popen[bytes] | None = None
        if isinstance(settings, MLflow):
            self._write(
                "run", name=name, uri=settings.uri, experiment=settings.experiment, artifacts=settings.artifacts
            )
            self.tags(tags | settings.tags)
            self._sender = _start_sender(self._path)
        else:
            self._write("run", name=name)
            self.tags(tags)

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

    def finish(self, status: str) -> str | None:
        """End the run as FINISHED, FAILED or KILLED; MLflow's id of it, or None when there is none (yet)."""
        self._write("finish", status=status)
        os.fsync(self._file.fileno())
        self._file.close()
        if self._sender is None:
            return None
        try:
            code = self._sender.wait(SEND_WAIT_S)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            reason = "it is still being sent in the background" if code is None else self._failure()
            print(
                f"MLflow does not have the whole run: {reason}; nothing is lost, it is all in {self._path}",
                file=sys.stderr,
            )
        receipt = self._path.with_name("mlflow.json")
        return str(json.loads(receipt.read_text())["run_id"]) if receipt.is_file() else None

    def _failure(self) -> str:
        log = self._path.with_name("mlflow.log")
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return lines[-1] if lines else "the sender ended without a word"

    def _write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), "event": event, **fields}, ensure_ascii=False) + "\n")
        self._file.flush()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _start_sender(journal: Path) -> "subprocess.Popen[bytes]":
    source = str(Path(__file__).resolve().parents[2])
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    with journal.with_name("mlflow.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gaplab.tracking.mlflow", str(journal), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the training; the sender goes on to the end of the journal
        )
