"""The sender: follows a journal and puts it into MLflow.

Run as `python -m gaplab.tracking.mlflow <journal> <pid of the writer>`. It ends with status 0 when the journal is
sent, and with 1 and one line of reason when MLflow did not take something.
"""

import contextlib
import getpass
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# the whole wait for a server that does not answer stays below 10 s; no request leaves for anyone but the server
for name, value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(name, value)


def follow(journal: Path, writer: int) -> Iterator[dict[str, Any]]:
    """The events of a journal as they are written, up to `finish`; if the writer dies first, `finish` as FAILED."""
    with journal.open(encoding="utf-8") as file:
        line = ""
        while True:
            alive = os.getppid() == writer
            line += file.readline()
            if line.endswith("\n"):
                event = json.loads(line)
                line = ""
                yield event
                if event["event"] == "finish":
                    return
            elif not alive:
                yield {"time": time.time(), "event": "finish", "status": "FAILED"}
                return
            else:
                time.sleep(0.1)


class Sender:
    """One MLflow run, created from the journal's `run` event."""

    def __init__(self, start: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        with _initializing(start["uri"]):
            self.client = MlflowClient(tracking_uri=start["uri"])
            experiment = self._experiment(start["experiment"], start["artifacts"] or _beside(start["uri"]))
        source = {"mlflow.source.name": "src/train.py", "mlflow.source.type": "LOCAL", "mlflow.user": getpass.getuser()}
        run = self.client.create_run(experiment, start_time=_ms(start), tags=source, run_name=start["name"])
        self.run_id: str = run.info.run_id

    def _experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(
                    self.client.create_experiment(
                        name, artifacts, tags={"mlflow.experimentKind": "custom_model_development"}
                    )
                )
            except MlflowException:  # another start was faster
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def send(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        match event["event"]:
            case "params":
                items = list(event["values"].items())
                for start in range(0, len(items), 100):  # the most that one call takes
                    self.client.log_batch(self.run_id, params=[Param(*item) for item in items[start : start + 100]])
            case "tags":
                self.client.log_batch(self.run_id, tags=[RunTag(*item) for item in event["values"].items()])
            case "metrics":
                when = _ms(event)
                metrics = [Metric(name, value, when, event["step"]) for name, value in event["values"].items()]
                self.client.log_batch(self.run_id, metrics=metrics)
            case "dataset":
                dataset = Dataset(
                    name=event["name"],
                    digest=event["digest"],
                    source_type="local",
                    source=json.dumps({"uri": event["source"]}),
                    profile=json.dumps(event["profile"]),
                )
                tag = InputTag("mlflow.data.context", "training")
                self.client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])
            case "artifact":
                self.client.log_artifact(self.run_id, event["path"], event["folder"] or None)
            case "finish":
                self.client.set_terminated(self.run_id, event["status"], _ms(event))


def _beside(uri: str) -> str | None:
    """The artifact folder beside a SQLite store; None leaves the choice to a server."""
    return str(Path(uri.removeprefix("sqlite:///")).with_name("artifacts")) if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _initializing(uri: str) -> Iterator[None]:
    """Let one process at a time create a SQLite store: two at once would both try, and one fail."""
    from filelock import FileLock

    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    with FileLock(database.with_name(f".{database.name}.lock")):
        yield


def _ms(event: dict[str, Any]) -> int:
    return round(event["time"] * 1000)


def main(journal: Path, writer: int) -> int:
    events = follow(journal, writer)
    try:
        sender = Sender(next(events))
        journal.with_name("mlflow.json").write_text(json.dumps({"run_id": sender.run_id}) + "\n")
    except Exception as error:  # whatever MLflow or the network came up with
        return _complain([error])
    failures: list[Exception] = []
    for event in events:
        try:
            sender.send(event)
        except Exception as error:  # the other events, and the end of the run above all, are to arrive all the same
            failures.append(error)
    return _complain(failures)


def _complain(failures: list[Exception]) -> int:
    for error in failures[:1]:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        print((str(error).strip().partition("\n")[0] or type(error).__name__) + more, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
