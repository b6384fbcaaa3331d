"""A model behind HTTP, by MLflow's own scoring server: `python src/serve.py`."""

import tempfile
from pathlib import Path

from gaplab import config as configs
from gaplab.config import MLflow, Serve
from gaplab.errors import UserError
from gaplab.files import read_json
from gaplab.machine import command
from gaplab.tracking.registry import download
from gaplab.tracking.server import HOST, check_port, ended, running


def serve(settings: Serve) -> None:
    """Serve a model until this process is told to stop. Raises UserError, TrainingError."""
    assert isinstance(settings.tracking, MLflow)
    port = settings.port
    check_port(port, f"give another: {command('serve')} port=…")
    log = configs.folder("paths.outputs", settings.paths.outputs) / f"serve-{port}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.outputs={settings.paths.outputs}: cannot be written ({error.strerror})") from None
    with tempfile.TemporaryDirectory(prefix="gaplab-") as name:
        path, _ = download(settings.model_uri, settings.tracking.uri, Path(name))
        words = ["models", "serve", "--model-uri", str(path), "--env-manager", "local"]
        with running(words, port, "/ping", log) as server:
            shape = read_json(path / "extra_files" / "facts.json").get("in_shape")
            address = f"http://{HOST}:{port}/invocations"
            print(f"{settings.model_uri} answers on {address}; pictures are uint8 of shape {[-1, *(shape or [])]}")
            print("docs/serving.md says how to call it; Ctrl-C ends it", flush=True)
            server.wait()
            raise ended(server, log)
