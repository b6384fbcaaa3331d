"""One job: make its folder, start its tracking, and only then import what is heavy and run it."""

import logging
import secrets
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gaplab import config as configs
from gaplab.config import PROJECT, Config, Data, ImageFolder
from gaplab.errors import UserError
from gaplab.tracking.journal import Tracker


def launch(config: Config, folder: Path | None = None) -> Any:
    """Run the job that `config` says, in `folder` or a new one of its own; its RunResult.

    Raises UserError, TrainingError or KeyboardInterrupt.
    """
    started = time.perf_counter()
    run_id = secrets.token_hex(16)
    _check_root(config.data)
    folder = _make_folder(config, folder)
    (folder / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
    print(f"{configs.run_name(config)}  in {folder}", flush=True)
    tracker = Tracker(folder, config.tracking, configs.run_name(config), _tags(config))

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # that it made its font cache is no news
    from gaplab import worker  # torch and Lightning: seconds, in which the tracking process gets ready too

    return worker.run(config, folder, tracker, run_id, started)


def sweep_folder() -> Path | None:
    """Hydra's folder for the current job of a multirun, None outside one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    return Path(hydra.runtime.output_dir) if hydra.mode is RunMode.MULTIRUN else None


def _check_root(data: Data) -> None:
    """What can be said of the data before anything is imported or made."""
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={data.root}: no such folder")
    if isinstance(data, ImageFolder) and not any(root.iterdir()):
        raise UserError(f"data.root={data.root}: empty; expected one sub-folder of pictures for each class")


def _make_folder(config: Config, folder: Path | None) -> Path:
    outputs = Path(config.paths.outputs).expanduser().absolute()
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = configs.slug(configs.run_name(config))
    folder = folder or outputs / "runs" / f"{stamp}_{name}_{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir()
    except OSError as error:
        raise UserError(f"paths.outputs={config.paths.outputs}: cannot be written ({error.strerror})") from None
    return folder


def _tags(config: Config) -> dict[str, str]:
    tags = {"condition": configs.condition(config), "config_hash": configs.config_hash(config)}
    tags |= {f"version/{name}": metadata.version(name) for name in ("torch", "lightning", "hydra-core")}
    return tags | dict(_git()) | {"overrides": configs.masked(" ".join(overrides()))}


def _git() -> Iterator[tuple[str, str]]:
    """The commit of the project and whether files differ from it; nothing outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(PROJECT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        yield "git/commit", commit
        yield "mlflow.source.git.commit", commit  # where MLflow's own pages look for it
        yield "git/dirty", str(bool(git("status", "--porcelain"))).lower()
    except (OSError, subprocess.CalledProcessError):
        return


def overrides() -> list[str]:
    """What was typed after `train.py`; nothing when gaplab is used as a library."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
