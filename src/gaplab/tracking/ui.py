"""MLflow's pages for the runs on this machine: `python src/ui.py`, which is `make ui`.

The server is MLflow's own, a process group of its own that ends with this one. It listens on 127.0.0.1 alone, answers
to that name alone, starts no jobs and sends nothing to anyone.
"""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from gaplab import config as configs
from gaplab import interrupt
from gaplab.config import MLflow, Ui
from gaplab.errors import UserError
from gaplab.machine import command
from gaplab.tracking import dashboard
from gaplab.tracking.server import HOST, check_port, ended, running

SHOWN = 5  # experiments


def ui(settings: Ui) -> None:
    """Serve the store in the outputs until Ctrl-C, and say where its views are.

    Raises UserError when there is none yet or the port is in use, TrainingError when the server ends by itself.
    """
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    database, port = outputs / "mlflow.db", settings.port
    where = configs.elsewhere(outputs)
    if not database.is_file():
        raise UserError(
            f"nothing to show yet: no {database}; {command('train', 'model.bn=true', *where)} makes a first run"
        )
    other = f"port={port + 1 if port < 65535 else port - 1}"
    check_port(port, f"take another: {command('ui', other, *where)}")
    address, log = f"http://{HOST}:{port}", outputs / "ui.log"
    print(f"starting MLflow on {address}, for this machine alone", flush=True)
    words = ["server", "--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    words += ["--allowed-hosts", f"localhost:{port},{HOST}:{port}"]
    with suppress(interrupt.Interrupted, KeyboardInterrupt), running(words, port, "/health", log) as server:
        for line in _addresses(address):
            print(line, flush=True)
        print("Ctrl-C ends it", flush=True)
        server.wait()
        raise ended(server, log)
    print("stopped", flush=True)


def _addresses(address: str) -> Iterator[str]:
    """A line for each view of gaplab's experiments, the one that was used last first."""
    try:
        found = _call(address, "experiments/search?max_results=1000").get("experiments", [])
        found.sort(key=lambda one: int(one.get("last_update_time", 0)), reverse=True)
        ours = [one for one in found if one["name"] == MLflow.experiment or f"{dashboard.VIEW}gaplab" in _tags(one)]
        for one in ours:  # made by a gaplab that knew of no views
            for name, value in dashboard.missing(_tags(one)).items():
                _call(
                    address,
                    "experiments/set-experiment-tag",
                    {"experiment_id": one["experiment_id"], "key": name, "value": value},
                )
    except (OSError, ValueError, KeyError) as error:
        yield f"open        {address}    (its views cannot be listed: {error})"
        return
    for one in ours[:SHOWN]:
        named = f", {one['name']}" if len(ours) > 1 else ""
        for view, where in dashboard.addresses(address, one["experiment_id"]).items():
            yield f"{view + named:12}{where}"
    if not ours:
        yield f"open        {address}"


def _tags(experiment: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in experiment.get("tags", [])}


def _call(address: str, what: str, content: dict[str, str] | None = None) -> dict[str, Any]:
    """MLflow's REST interface: its client would take seconds to import."""
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/{what}", headers={"Content-Type": "application/json"})
    if content is not None:
        request.data = json.dumps(content).encode()
    with urllib.request.urlopen(request, timeout=20) as answer:
        found = json.load(answer)
    return found if isinstance(found, dict) else {}
