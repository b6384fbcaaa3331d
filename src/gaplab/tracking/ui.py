"""MLflow's pages for the runs on this machine: `python src/ui.py`, which is `make ui`.

The server is MLflow's own, a process group of its own that ends with this one. It listens on 127.0.0.1 alone, answers
to that name alone, starts no jobs and sends nothing to anyone.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gaplab import config as configs
from gaplab import interrupt
from gaplab.config import MLflow, Ui
from gaplab.errors import TrainingError, UserError
from gaplab.tracking import dashboard

HOST = "127.0.0.1"
START_S = 90.0
STOP_S = 8.0
SHOWN = 5  # experiments
SAFE = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def ui(settings: Ui) -> None:
    """Serve the store in the outputs until Ctrl-C, and say where its views are.

    Raises UserError when there is none yet or the port is in use, TrainingError when the server ends by itself.
    """
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    database = outputs / "mlflow.db"
    if not database.is_file():
        raise UserError(f"nothing to show yet: no {database}; python src/train.py model.bn=true makes a first run")
    _refuse_a_port_in_use(settings.port)
    address = f"http://{HOST}:{settings.port}"
    print(f"starting MLflow on {address}, for this machine alone", flush=True)
    with suppress(interrupt.Interrupted, KeyboardInterrupt), _server(database, settings.port) as server:
        _wait_for(server, address, outputs)
        for line in _addresses(address):
            print(line, flush=True)
        print("Ctrl-C ends it", flush=True)
        server.wait()
        raise TrainingError(_ended(server, outputs))
    print("stopped", flush=True)


def _refuse_a_port_in_use(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: no wait for old connections
        try:
            probe.bind((HOST, port))
        except OSError as error:
            another = port + 1 if port < 65535 else port - 1
            hint = f"take another: make ui PORT={another}"
            raise UserError(f"port={port}: cannot be used ({error.strerror}); {hint}") from None


@contextmanager
def _server(database: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    words = ["--backend-store-uri", f"sqlite:///{database}", "--host", HOST, "--port", str(port), "--workers", "1"]
    words += ["--allowed-hosts", f"localhost:{port},{HOST}:{port}"]
    with _log(database.parent).open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words],
            env=os.environ | SAFE,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        _end(server)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """The server and its workers, which outlive it for a moment."""
    deadline = time.monotonic() + STOP_S
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            server.poll()
            os.killpg(server.pid, 0)
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _wait_for(server: "subprocess.Popen[bytes]", address: str, outputs: Path) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        if time.monotonic() > deadline:
            raise TrainingError(f"MLflow does not answer after {START_S:.0f} s; its words are in {_log(outputs)}")
        time.sleep(0.1)
    raise TrainingError(_ended(server, outputs))


def _ended(server: "subprocess.Popen[bytes]", outputs: Path) -> str:
    lines = _log(outputs).read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return f"MLflow's server ended with status {server.returncode}{last}; all its words are in {_log(outputs)}"


def _log(outputs: Path) -> Path:
    return outputs / "ui.log"


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
