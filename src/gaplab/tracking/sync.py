"""Everything in the outputs that MLflow does not have, sent one after another: `python src/sync.py`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gaplab import config as configs
from gaplab.config import Sync
from gaplab.errors import TrainingError, UserError
from gaplab.tracking.journal import journal_of
from gaplab.tracking.mlflow import Delivery, Sender, name_result, reason

OTHERS = {"going": "still going", "left": "deleted in MLflow"}


def sync(settings: Sync) -> None:
    """Send what runs and sweeps still hold, and end those whose process was killed; a line for each.

    Raises TrainingError when something could not be sent, UserError when there is no such folder.
    """
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    if not outputs.is_dir():
        raise UserError(f"paths.outputs={settings.paths.outputs}: no such folder")
    folders = [one for kind in ("runs", "sweeps") for one in sorted((outputs / kind).glob("*")) if one.is_dir()]
    servers = _Servers(settings.allowed_targets)
    counts, problems = Counter[str](), []
    for folder in folders:
        if not journal_of(folder).is_file():
            continue
        try:
            outcome, problem = _sync_one(folder, servers)
        except OSError as error:
            outcome, problem = "failed", f"{folder}: {error.strerror}"
        counts[outcome] += 1
        if outcome == "sent":
            print(f"sent  {folder.relative_to(outputs)}", flush=True)
        elif outcome == "left":
            print(f"left  {problem}", flush=True)
        elif problem:
            problems.append(problem)
    parts = [f"{_runs(counts['sent'])} sent"]
    parts += [f"{counts[name]} {text}" for name, text in OTHERS.items() if counts[name]]
    summary = ", ".join(parts)
    if problems:
        others = len(set(problems)) - 1
        more = f" (and {others} other reason{'s' * (others > 1)})" if others else ""
        raise TrainingError(f"{summary}, {len(problems)} not: {problems[0]}{more}")
    print(summary if counts["sent"] or len(parts) > 1 else "nothing to send: MLflow has all of it")


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


class _Servers:
    """Those in use, each connected to once, and why not; a server that is away is not asked again for each run."""

    def __init__(self, allowed_targets: Sequence[str]) -> None:
        self._allowed_targets = allowed_targets
        self._senders: dict[tuple[str, ...], Sender | str] = {}

    def get(self, delivery: Delivery) -> Sender | str:
        assert delivery.root.store is not None
        store = delivery.root.store
        key = tuple(str(store.get(name)) for name in ("uri", "experiment", "artifacts"))
        if key not in self._senders:
            try:
                self._senders[key] = Sender(store, self._allowed_targets)
            except Exception as error:  # whatever MLflow or the network came up with
                self._senders[key] = reason(error, store["uri"])
        return self._senders[key]

    def forget(self, sender: Sender) -> None:
        """Something went wrong: ask whether it is the server before the next run is sent."""
        self._senders = {key: one for key, one in self._senders.items() if one is not sender}


def _sync_one(folder: Path, servers: _Servers) -> tuple[str, str]:
    """What came of a folder, `sent`, `complete`, `going`, `left`, `failed` or `untracked`, and why not."""
    from filelock import FileLock, Timeout

    delivery = Delivery(folder)
    delivery.read()
    if delivery.root.store is None:  # tracking=none
        return "untracked", ""
    try:
        with FileLock(folder / ".lock", timeout=0), FileLock(folder / ".mlflow.lock", timeout=0):
            pass
    except Timeout:
        return "going", ""
    sender = servers.get(delivery)
    if isinstance(sender, str):
        return "failed", sender
    with FileLock(folder / ".mlflow.lock"):
        delivery = Delivery(folder)
        delivery.read()
        delivery.send(sender, orphaned=not delivery.root.ended)
    if delivery.is_held:
        return "left", str(delivery.problem)
    if delivery.problem is not None:
        servers.forget(sender)
        return "failed", delivery.problem
    delivery.name_results()
    if delivery.root.run_id is not None:
        name_result(delivery.root.folder, delivery.root.run_id)
    if delivery.refused:
        return "failed", f"MLflow refused {delivery.refused[0]}"
    return ("sent" if delivery.progress else "complete"), ""
