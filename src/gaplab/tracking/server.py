"""One of MLflow's servers as a process of ours: on this machine alone, up before it is spoken of, gone with us."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gaplab.errors import TrainingError, UserError
from gaplab.tracking.environment import of_child, settle

HOST = "127.0.0.1"
START_S, STOP_S = 90.0, 8.0


def check_port(port: int, hint: str) -> None:
    """Raises UserError, which ends with `hint`, when something else listens there or it may not be taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does: no wait for old connections
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port={port}: cannot be used ({error.strerror}); {hint}") from None


@contextmanager
def running(words: list[str], port: int, health: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`mlflow <words> --host … --port …` once it answers; its process group ends with the context.

    Args:
        words: of its command line.
        port: free.
        health: path that it answers when it is up.
        log: file for what it says.

    Raises TrainingError when it does not come up.
    """
    settle()  # it is asked without a proxy
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # MLflow calls uvicorn
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--host", HOST, "--port", str(port)],
            env=of_child() | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_for(server, f"http://{HOST}:{port}{health}", log)
        yield server
    finally:
        _end(server)


def ended(server: "subprocess.Popen[bytes]", log: Path) -> TrainingError:
    """What to raise when it has ended by itself."""
    lines = log.read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return TrainingError(f"MLflow's server ended with status {server.returncode}{last}; all its words are in {log}")


def _wait_for(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        if time.monotonic() > deadline:
            raise TrainingError(f"MLflow does not answer after {START_S:.0f} s; its words are in {log}")
        time.sleep(0.1)
    raise ended(server, log)


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
