"""Everything in the outputs that MLflow does not have yet, sent one after another: `python src/sync.py`."""

from pathlib import Path

from gaplab import config as configs
from gaplab.config import Sync
from gaplab.errors import TrainingError, UserError
from gaplab.tracking.journal import journal_of
from gaplab.tracking.mlflow import Delivery, Sender, name_result, reason


def sync(settings: Sync) -> None:
    """Send what runs and sweeps still hold, and end those whose process was killed; a line for each.

    Raises TrainingError when something could not be sent, UserError when there is no such folder.
    """
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    if not outputs.is_dir():
        raise UserError(f"paths.outputs={settings.paths.outputs}: no such folder")
    folders = [one for kind in ("runs", "sweeps") for one in sorted((outputs / kind).glob("*")) if one.is_dir()]
    servers = _Servers()
    sent, going, problems = 0, 0, []
    for folder in folders:
        if not journal_of(folder).is_file():
            continue
        try:
            outcome = _sync_one(folder, servers)
        except OSError as error:
            outcome = f"{folder}: {error.strerror}"
        if outcome is None:
            continue
        if outcome == "sent":
            sent += 1
            print(f"sent  {folder.relative_to(outputs)}", flush=True)
        elif outcome == "going":
            going += 1
        else:
            problems.append(outcome)
    summary = f"{_runs(sent)} sent" + (f", {going} still going" if going else "")
    if problems:
        others = len(set(problems)) - 1
        more = f" (and {others} other reason{'s' * (others > 1)})" if others else ""
        raise TrainingError(f"{summary}, {len(problems)} not: {problems[0]}{more}")
    print(summary if sent or going else "nothing to send: MLflow has all of it")


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


class _Servers:
    """Those in use, each connected to once, and why not; a server that is away is not asked again for each run."""

    def __init__(self) -> None:
        self._senders: dict[tuple[str, ...], Sender | str] = {}

    def get(self, delivery: Delivery) -> Sender | str:
        assert delivery.root.store is not None
        store = delivery.root.store
        key = tuple(str(store.get(name)) for name in ("uri", "experiment", "artifacts"))
        if key not in self._senders:
            try:
                self._senders[key] = Sender(store)
            except Exception as error:  # whatever MLflow or the network came up with
                self._senders[key] = reason(error, store["uri"])
        return self._senders[key]

    def forget(self, sender: Sender) -> None:
        """Something went wrong: ask whether it is the server before the next run is sent."""
        self._senders = {key: one for key, one in self._senders.items() if one is not sender}


def _sync_one(folder: Path, servers: _Servers) -> str | None:
    """`sent`, `going`, None when there was nothing to do, else why not."""
    from filelock import FileLock, Timeout

    delivery = Delivery(folder)
    delivery.read()
    if delivery.root.store is None:  # tracking=none
        return None
    try:
        with FileLock(folder / ".lock", timeout=0), FileLock(folder / ".mlflow.lock", timeout=0):
            pass
    except Timeout:
        return "going"
    if delivery.is_settled:
        _name_results(delivery)
        return None
    sender = servers.get(delivery)
    if isinstance(sender, str):
        return sender
    with FileLock(folder / ".mlflow.lock"):
        delivery = Delivery(folder)
        delivery.read()
        delivery.send(sender, orphaned=not delivery.root.ended)
    if delivery.problem is not None:
        servers.forget(sender)
        return delivery.problem
    _name_results(delivery)
    return f"MLflow refused {delivery.refused[0]}" if delivery.refused else "sent"


def _name_results(delivery: Delivery) -> None:
    delivery.name_results()
    if delivery.root.run_id is not None:
        name_result(delivery.root.folder, delivery.root.run_id)
