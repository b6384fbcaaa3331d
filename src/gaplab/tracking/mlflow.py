"""The sender: follows the journal of a run, or of a sweep and all of its jobs, and puts it into MLflow.

Run as `python -m gaplab.tracking.mlflow <folder> <pid of the writer> <allowed package,…>`. Events go out in order.
One that MLflow does not take now is sent again until it does. What MLflow refuses, such as a tag of a name that it does
not allow, is kept in the receipt with the reason, and the rest is sent. It ends with status 0 when everything is sent,
and with 1 and one line of reason when not; another sender, or `python src/sync.py`, then continues.

The store is asked, not remembered: before anything is sent, a run that is in MLflow is compared with its journal, and
sent once more where MLflow lacks something of it. Nothing is there twice: a run is looked for by its own id (the tag
`gaplab.id`) before it is created, and MLflow keeps a metric of the same name, time, step and value once.
"""

import contextlib
import getpass
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gaplab.config import USUAL_TARGETS, masked
from gaplab.files import read_json, write_whole
from gaplab.notes import NOTE
from gaplab.tracking import dashboard
from gaplab.tracking.environment import of_child, settle
from gaplab.tracking.outbox import Entry, Journal

HTTP_TIMEOUT_S = 20  # nobody waits for the sender
PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
GIVE_UP_S = 8.0
BATCH = {"metrics": 1000, "params": 100, "tags": 100}  # the most that one call takes
GAP = re.compile(r"(best/)?gap/acc(?!\w*_pp)\w*")
PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
PASSING_STATUS = (401, 403, 404, 407, 408, 409, 425, 429)  # 404: a proxy whose server is away


class RefusedError(Exception):
    """What MLflow will not take as it is."""


class LostError(RefusedError):
    """What can never be sent, so that nobody needs to hear of it twice: a file that is gone, a damaged event."""


class DeletedError(Exception):
    """A run that a person has deleted in MLflow, or that is not there any more."""


class ModelError(Exception):
    """A model that is not logged yet."""


class Sender:
    """Puts events into the MLflow that `store` names. Raises whatever MLflow or the network come up with.

    Args:
        store: the event that names it.
        allowed_targets: packages that the config of a run may name when its model is logged.
    """

    def __init__(self, store: dict[str, Any], allowed_targets: Sequence[str] = USUAL_TARGETS) -> None:
        settle()
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # who sends tries again by himself
        given = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "")
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(HTTP_TIMEOUT_S, int(given) if given.isdigit() else 0))
        from mlflow import MlflowClient

        self._uri = uri = store["uri"]
        self._name, self._artifacts = str(store.get("experiment")), store.get("artifacts") or _beside(uri)
        self._allowed_targets = allowed_targets
        self._experiment: str | None = None
        with _initializing(uri):
            self.client = MlflowClient(uri, uri)
            self._find_experiment()

    def _find_experiment(self) -> Any:
        """The experiment by its name, or None; asking shows whether the store answers, and makes a SQLite one."""
        found = self.client.get_experiment_by_name(self._name)
        if found is not None and found.lifecycle_stage == "active":
            self._experiment = str(found.experiment_id)
            self._show(self._experiment, found.tags)
        return found

    def _make_experiment(self) -> str:
        """The id of the experiment, made when there is none: a run that has one already needs none of this name."""
        from mlflow.exceptions import MlflowException

        if self._experiment is None and (found := self._find_experiment()) is not None and self._experiment is None:
            raise RefusedError(f"the experiment {found.name} is deleted in MLflow; restore it, or name another")
        if self._experiment is None:
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                self._experiment = str(self.client.create_experiment(self._name, self._artifacts, tags=tags))
            except MlflowException:  # another start was faster
                if self._find_experiment() is None or self._experiment is None:
                    raise
            else:
                self._show(self._experiment, {})
        return self._experiment

    def _show(self, experiment: str, tags: dict[str, str]) -> None:
        """Describe the experiment and give its pages gaplab's views; no reason to keep a run from MLflow."""
        with contextlib.suppress(Exception):  # of MLflow, the network
            for name, value in dashboard.missing(tags).items():
                self.client.set_experiment_tag(experiment, name, value)

    def look_up(self, journal: Journal) -> Any:
        """The run of a journal in MLflow, or None. Raises DeletedError when it is deleted there."""
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        run = None
        if journal.run_id is not None:
            try:
                run = self.client.get_run(journal.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            if run is not None and run.data.tags.get("gaplab.id", journal.id) != journal.id:  # another folder's receipt
                run = None
        if run is None and journal.id is not None and self._experiment is not None:
            wanted = f"tags.`gaplab.id` = '{journal.id}'"
            run = next(iter(self.client.search_runs([self._experiment], wanted, ViewType.ALL, max_results=1)), None)
        if run is not None and run.info.lifecycle_stage != "active":
            raise DeletedError(f"{journal.folder}: its run is deleted in MLflow; restored there, it gets the rest")
        return run

    def check(self, journal: Journal, parent: str | None) -> None:
        """Compare what was sent with what MLflow has, and restart the journal where something is missing. Artifacts are
        not compared. Raises DeletedError."""
        if journal.run_id is None:
            return
        run = self.look_up(journal)
        if run is None or run.info.run_id != journal.run_id or not self._has_all(run, journal, parent):
            journal.restart(None if run is None else run.info.run_id)

    def _has_all(self, run: Any, journal: Journal, parent: str | None) -> bool:
        """Whether it has every parameter and metric, each epoch of the metric with the most, and the right parent."""
        given = run.data.tags.get("mlflow.parentRunId")
        if parent is not None and given != parent and not self._exists(given):
            return False
        steps: dict[str, set[int]] = {}
        for name, step in journal.measured:
            steps.setdefault(name, set()).add(step)
        if not (journal.params <= run.data.params.keys() and steps.keys() <= run.data.metrics.keys()):
            return False
        longest = max(steps, key=lambda name: len(steps[name]), default=None)
        if longest is None:
            return True
        return steps[longest] <= {point.step for point in self.client.get_metric_history(run.info.run_id, longest)}

    def _exists(self, run_id: str | None) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return run_id is not None and self.client.get_run(run_id) is not None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def begin(self, journal: Journal, entry: Entry, parent: str | None) -> None:
        """Create the run, or set it running once more; `parent` is the run of the sweep that it belongs to."""
        tags = {"attempt": str(entry.attempt)}
        if parent is not None:
            tags |= {"mlflow.parentRunId": parent, "job": journal.folder.name}
        run = self.look_up(journal)
        if run is not None:
            journal.run_id = run.info.run_id
            self.client.update_run(journal.run_id, "RUNNING")
            for name, value in tags.items():
                self.client.set_tag(journal.run_id, name, value, synchronous=True)
            return
        tags |= {"mlflow.source.name": "src/train.py", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
        tags |= {"gaplab.id": journal.id} if journal.id else {}
        experiment = self.client.get_run(parent).info.experiment_id if parent else self._make_experiment()
        run = self.client.create_run(experiment, _ms(entry.event), tags, str(entry.event.get("name")))
        journal.run_id = run.info.run_id

    def send(self, journal: Journal, entry: Entry, parent: str | None = None) -> dict[str, str]:
        """Send the event of an entry; what MLflow refuses of its values, by name, with the reason. Raises RefusedError
        for what is no event at all."""
        if entry.event["event"] == "run":
            self.begin(journal, entry, parent)
            return {}
        if journal.run_id is None:
            raise RefusedError(f"{journal.folder}: {entry.event['event']} before the run began")
        try:
            calls = list(self._calls(journal, journal.run_id, entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LostError(f"{journal.folder}: a damaged event ({type(error).__name__}: {error})") from None
        refused: dict[str, str] = {}
        for call in calls:
            refused |= call() or {}
        return refused

    def _calls(self, journal: Journal, run_id: str, entry: Entry) -> Iterator[Callable[[], dict[str, str] | None]]:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        event = entry.event
        match event["event"]:
            case "params":
                params = [Param(name, str(value)) for name, value in entry.values.items() if name not in journal.params]
                yield from self._batches(run_id, "params", params)
            case "tags":
                tags = [RunTag(name, str(value)) for name, value in entry.values.items() if name != NOTE]
                yield from self._batches(run_id, "tags", tags)
                if note := entry.values.get(NOTE):
                    yield partial(self._describe, journal, run_id, str(note))
            case "metrics":
                when, step = _ms(event), int(event["step"])
                new = {
                    name: float(value)
                    for name, value in entry.values.items()
                    if not journal.measured_before(name, step, value)
                }
                metrics = [Metric(name, value, when, step) for name, value in (new | _in_points(new)).items()]
                yield from self._batches(run_id, "metrics", metrics)
            case "dataset":
                dataset = Dataset(
                    name=event["name"],
                    digest=event["digest"],
                    source_type="local",
                    source=json.dumps({"uri": event["source"]}),
                    profile=json.dumps(event["profile"]),
                )
                tag = InputTag("mlflow.data.context", "training")
                yield partial(self.client.log_inputs, run_id, [DatasetInput(dataset, [tag])])
            case "child":
                if journal.locate(event["path"]).resolve().parent != journal.folder.resolve():
                    raise RefusedError(f"{event['path']}: not sent, for it does not lie in {journal.folder}")
            case "artifact":
                path = journal.locate(event["path"]).resolve()
                if not path.is_relative_to(journal.folder.resolve()):  # whose journal is this?
                    raise RefusedError(f"{path}: not sent, for it lies outside of {journal.folder}")
                if path.is_file():
                    yield partial(self.client.log_artifact, run_id, str(path), event["folder"] or None)
                elif entry.attempt == journal.attempts:  # a later attempt clears away what an earlier one made
                    raise LostError(f"{path}: no longer there")
            case "model":
                yield partial(self._log_model, journal.folder, run_id)
            case "finish":
                yield partial(self.client.set_terminated, run_id, event["status"], _ms(event))

    def _log_model(self, folder: Path, run_id: str) -> None:
        """In a process of its own: it needs torch, and the config of the run names classes."""
        command = [sys.executable, "-m", "gaplab.export", str(folder), run_id, ",".join(self._allowed_targets)]
        environment = of_child() | {"MLFLOW_TRACKING_URI": self._uri}
        environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "3"  # a lost answer costs a request there, not all of it
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        said = (done.stderr.strip().splitlines() or ["its process ended without a word"])[-1]
        if done.returncode not in (2, 3):
            raise ModelError(said)
        self.client.set_tag(run_id, "model/problem", said[:5000], synchronous=True)
        kind = LostError if done.returncode == 2 else RefusedError
        raise kind(f"{folder}: its model is not logged: {said}")

    def _describe(self, journal: Journal, run_id: str, note: str) -> None:
        """Unless a person has written a description meanwhile."""
        if self.client.get_run(run_id).data.tags.get(NOTE) in (None, "", journal.described):
            self.client.set_tag(run_id, NOTE, note, synchronous=True)

    def _batches(self, run_id: str, kind: str, items: list[Any]) -> Iterator[Callable[[], dict[str, str]]]:
        for start in range(0, len(items), BATCH[kind]):
            yield partial(self._log, run_id, kind, items[start : start + BATCH[kind]])

    def _log(self, run_id: str, kind: str, items: list[Any]) -> dict[str, str]:
        """Log a batch. MLflow refuses all of it for a bad item, which halving finds: {name: reason}."""
        try:
            batch: dict[str, Any] = {kind: items}
            self.client.log_batch(run_id, **batch, synchronous=True)
        except Exception as error:
            if not is_permanent(error) or self.client.get_run(run_id).info.lifecycle_stage != "active":
                raise
            if len(items) == 1:
                return {items[0].key: reason(error)}
            half = len(items) // 2
            return self._log(run_id, kind, items[:half]) | self._log(run_id, kind, items[half:])
        return {}


def _in_points(metrics: dict[str, float]) -> dict[str, float]:
    """The gaps of accuracy in percentage points beside the fractions, without the digits of a binary fraction."""
    return {f"{name}_pp": round(100 * value, 6) for name, value in metrics.items() if GAP.fullmatch(name)}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container with a user of its own, who has no name
        return str(os.getuid())


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


def is_permanent(error: Exception) -> bool:
    """Whether MLflow would say the same the next time; what is not known passes."""
    if isinstance(error, RefusedError | PermissionError):  # a server's artifact folder that this machine cannot write
        return True
    if type(error.__cause__).__module__.partition(".")[0] == "sqlalchemy":  # the store's trouble, not the event's
        return False
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return getattr(error, "error_code", None) in PERMANENT or (400 <= status < 500 and status not in PASSING_STATUS)


def reason(error: Exception, uri: str = "") -> str:
    """One short line, without passwords."""
    where = uri if "://" in uri and not uri.startswith("sqlite") else "MLflow"
    whole, cause = "", error
    while cause is not None:
        whole, cause = f"{whole} {cause}", cause.__cause__ or cause.__context__  # type: ignore[assignment]
    if found := re.search(r"too many (\d+) error responses", whole):
        text = f"{where} answers {found[1]}"
    elif "timed out" in whole:
        text = f"{where} does not answer"
    elif "onnection" in whole and (found := re.search(r"\[Errno -?\d+\] ([\w ]+)", whole)):
        text = f"{where}: {found[1]}"
    elif "Connection aborted" in whole:
        text = f"{where} closes the connection"
    else:
        text = str(error).strip().partition("\n")[0] or type(error).__name__
    return masked(text)[:300]


class Delivery:
    """All that is in a folder, a run's or a sweep's with its jobs', on its way into MLflow.

    Attributes:
        root, children: the journal of the folder, and those of the jobs in it.
        problem: why the rest is not sent, or None.
        refused: what MLflow does not take of what this one sent.
        progress: how many events are sent.
    """

    def __init__(self, folder: Path, allowed_targets: Sequence[str] = USUAL_TARGETS) -> None:
        self._allowed_targets = allowed_targets
        self.root = Journal(folder)
        self.children: dict[Path, Journal] = {}
        self.problem: str | None = None
        self.refused: list[str] = []
        self.progress = 0
        self._sender: Sender | None = None

    @property
    def is_complete(self) -> bool:
        return self.problem is None and self.root.ended and not self.root.waiting and not self._open_children()

    @property
    def is_held(self) -> bool:
        """Whether all that is not sent waits for a person to restore a run in MLflow."""
        return self.problem is not None and self.problem in (
            journal.held for journal in (self.root, *self.children.values())
        )

    def _open_children(self) -> list[Journal]:
        return [child for child in self.children.values() if child.waiting]

    def read(self) -> None:
        """Take in what was written since the last time."""
        for event, _ in self.root.read():
            if event["event"] == "child":
                path = self.root.locate(event["path"])
                if path.resolve().parent == self.root.folder.resolve():  # the sender refuses others
                    self.children.setdefault(path, Journal(path))
        for child in self.children.values():
            child.read()

    def send(self, sender: Sender | None = None, orphaned: bool = False) -> None:
        """Send in order until all is sent or something does not get through, which `problem` then says.

        Args:
            sender: to use instead of one of its own.
            orphaned: whoever wrote the journal is dead, so its run ends here.
        """
        child = None
        uri = self.root.store["uri"] if self.root.store else ""
        try:
            if orphaned and not self.root.ended:
                self.root.end_as_killed()
            if self.root.ended:  # so have its jobs, one way or another
                for child in self.children.values():
                    if child.attempts and not child.ended:
                        child.end_as_killed()
            child = None
            if any(journal.waiting or self._is_unchecked(journal) for journal in (self.root, *self.children.values())):
                if self._sender is None:
                    assert self.root.store is not None, "no event says where to send"
                    self._sender = sender or Sender(self.root.store, self._allowed_targets)
                self._send_all(self._sender, self.root, keep=int(self.root.ended))
                for child in list(self.children.values()) if self.root.run_id is not None else ():
                    self._send_all(self._sender, child)
                child = None
                self._send_all(self._sender, self.root)  # its end, after its children's
            held = (journal.held for journal in (self.root, *self.children.values()) if journal.held)
            self.problem = next(held, None)
            self.root.save(self.problem)
        except Exception as error:  # of MLflow, the network, the disk: there is nobody to raise it to
            self.problem = reason(error, uri)
            if child is not None:  # the others go first next time, should it be this one's fault
                self.children[child.folder] = self.children.pop(child.folder)
            with contextlib.suppress(OSError):
                self.root.save(self.problem)

    @staticmethod
    def _is_unchecked(journal: Journal) -> bool:
        return journal.run_id is not None and not journal.checked

    def _send_all(self, sender: Sender, journal: Journal, keep: int = 0) -> None:
        """A run that is deleted in MLflow waits for a person; the others do not wait for it."""
        journal.held = None
        try:
            if self._is_unchecked(journal):
                sender.check(journal, None if journal is self.root else self.root.run_id)
            self._send_waiting(sender, journal, keep)
        except DeletedError as error:
            journal.held = str(error) if journal.waiting else None
        journal.checked = True

    def _send_waiting(self, sender: Sender, journal: Journal, keep: int) -> None:
        parent = None if journal is self.root else self.root.run_id
        while len(journal.waiting) > keep:
            entry = journal.waiting[0]
            refused = {}
            try:
                refused = sender.send(journal, entry, parent)
            except LostError as error:
                self._refuse(error)
            except Exception as error:
                if entry.event["event"] == "run" or not is_permanent(error):
                    raise
                if journal.run_id is not None and sender.look_up(journal) is None:
                    gone = "its run is not in MLflow any more; the next sync sends all of it once more"
                    raise DeletedError(f"{journal.folder}: {gone}") from error
                self._refuse(error)
                refused = {"": reason(error)}
            for name, why in refused.items():
                if name:  # else it is told already
                    self._refuse(RefusedError(f"{journal.folder}: {name}: {why}"))
            journal.sent(refused)
            self.progress += 1
            if self.problem is not None:
                self.problem = None
                self.root.save()
            journal.save()

    def _refuse(self, error: Exception) -> None:
        self.refused.append(reason(error))
        say(self.refused[-1])

    def name_results(self) -> None:
        """Let the results of ended jobs name their runs in MLflow."""
        for child in self.children.values():
            if child.ended and child.run_id is not None:
                name_result(child.folder, child.run_id)


def name_result(folder: Path, run_id: str) -> None:
    """Let `result.json` say MLflow's id of the run, unless somebody holds the folder."""
    from filelock import FileLock, Timeout

    if read_json(folder / "result.json").get("run_id", run_id) == run_id:
        return
    with contextlib.suppress(Timeout, OSError), FileLock(folder / ".lock", timeout=0):
        if result := read_json(folder / "result.json"):
            write_whole(folder / "result.json", json.dumps(result | {"run_id": run_id}, indent=2) + "\n")


def follow(folder: Path, writer: int, allowed_targets: Sequence[str] = USUAL_TARGETS) -> Delivery:
    """Send all that is and will be written, until the journal ends or its writer dies; what came of it."""
    delivery = Delivery(folder, allowed_targets)
    pause, again = 0.0, 0.0
    over = failing = None  # since when, in monotonic seconds
    while True:
        alive = os.getppid() == writer  # before reading, so that its last words are read
        delivery.read()
        if over is None and (delivery.root.ended or not alive):
            over, again = time.monotonic(), 0.0
        if time.monotonic() >= again:
            before = delivery.progress
            delivery.send(orphaned=not alive)
            now = time.monotonic()
            if delivery.problem is None:
                pause, failing = 0.0, None
            elif failing is None or delivery.progress > before:
                pause, failing = PAUSE_S, now
            else:
                pause = min(2 * pause, LONGEST_PAUSE_S if over is None else PAUSE_S)
            again = now + pause
        if not delivery.root.ended and alive:  # gone on with after an end
            over = None
        if over is not None:
            someone_else = not alive and not delivery.root.ended and delivery.problem is None
            if delivery.is_complete or someone_else:
                break
            if failing is not None and time.monotonic() - max(failing, over) > GIVE_UP_S:
                break
        time.sleep(0.1)
    delivery.name_results()
    return delivery


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the disk is full
        print(text, file=sys.stderr, flush=True)


def main(folder: Path, writer: int, allowed_targets: Sequence[str] = USUAL_TARGETS) -> int:
    from filelock import FileLock

    try:
        with FileLock(folder / ".mlflow.lock"):  # an earlier sender of this folder may still be at the end of its work
            delivery = follow(folder, writer, allowed_targets)
    except Exception as error:
        say(reason(error))
        return 1
    if delivery.problem is not None:
        say(delivery.problem)
    elif len(delivery.refused) > 1:
        say(f"{delivery.refused[0]} (and {len(delivery.refused) - 1} more)")
    return int(bool(delivery.problem or delivery.refused))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")))
