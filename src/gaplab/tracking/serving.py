"""A model behind HTTP, by MLflow's own scoring server: `python src/serve.py`."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gaplab.config import MLflow, Serve
from gaplab.errors import TrainingError, UserError
from gaplab.files import read_json

HOST = "127.0.0.1"
START_S, STOP_S = 90, 10


def serve(settings: Serve) -> None:
    """Serve a model until this process is told to stop. Raises UserError, TrainingError."""
    assert isinstance(settings.tracking, MLflow)
    check_port(settings.port)
    from gaplab.tracking.registry import download

    with tempfile.TemporaryDirectory(prefix="gaplab-") as name:
        path, _ = download(settings.model_uri, settings.tracking.uri, Path(name))
        command = ["models", "serve", "--model-uri", str(path), "--env-manager", "local"]
        with running([*command, "--host", HOST, "--port", str(settings.port)], settings.port, "/ping") as process:
            shape = read_json(path / "extra_files" / "facts.json").get("in_shape")
            address = f"http://{HOST}:{settings.port}/invocations"
            print(f"{settings.model_uri} answers on {address}; pictures are uint8 of shape {[-1, *(shape or [])]}")
            print("docs/serving.md says how to call it; Ctrl-C ends it", flush=True)
            process.wait()
        raise TrainingError(f"the server has ended by itself, with status {process.returncode}")


def check_port(port: int) -> None:
    """Raises UserError when something else listens there, or it may not be taken."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port={port}: cannot be used ({error.strerror}); give another") from None


@contextmanager
def running(
    words: list[str], port: int, health: str, environment: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """`mlflow <words>` once it answers at the path `health`; it and the processes it starts end with the context.

    Its words are shown on stderr only when it does not come up. Raises TrainingError then.
    """
    safe = {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # a model may be somebody else's
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",  # where the model was exported
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # MLflow calls uvicorn
    }
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}  # a password in it
    with tempfile.TemporaryFile("w+", prefix="gaplab-") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env=inherited | safe | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            text=True,
        )
        try:
            deadline = time.monotonic() + START_S
            while not _answers(port, health):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ["without a word"])[-1]
                    raise TrainingError(f"the server does not come up: {last}")
                time.sleep(0.2)
            yield process
        finally:
            _end(process)


def _answers(port: int, health: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}{health}", timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _end(process: "subprocess.Popen[str]") -> None:
    """The whole group: its workers outlive their parent for a moment."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
