"""One job: make its folder, start its tracking, and only then import what is heavy and run it."""

import logging
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from gaplab import config as configs
from gaplab.config import PROJECT, Config, Data, ImageFolder
from gaplab.errors import UserError
from gaplab.tracking.journal import Tracker


def launch(config: Config, folder: Path | None = None, in_sweep: bool = False) -> Any:
    """Run the job that `config` says; its RunResult.

    Args:
        config: checked.
        folder: None makes a new one.
        in_sweep: speak into `<folder>/console.log`, and leave MLflow to the sweep's sender.

    Raises UserError, TrainingError or KeyboardInterrupt.
    """
    started = time.perf_counter()
    run_id = secrets.token_hex(16)
    check_root(config.data)
    if not in_sweep:
        _refuse_sweep_words(config)
    folder = _make_folder(config, folder)
    (folder / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
    name, tags = configs.run_name(config), _tags(config) | ({"sweep": folder.parent.name} if in_sweep else {})
    if not in_sweep:
        print(f"{name}  in {folder}", flush=True)
    tracker = Tracker(folder, None if in_sweep else config.tracking, name, tags)

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # that it made its font cache is no news
    from gaplab import worker  # torch and Lightning: seconds, in which the tracking process gets ready too

    with (folder / "console.log").open("w") if in_sweep else nullcontext() as console:
        return worker.run(config, folder, tracker, run_id, started, console)


def _refuse_sweep_words(config: Config) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise UserError("hydra/sweeper: only gaplab's keeps a sweep together; leave hydra/sweeper out")
    claim = next((word for word in overrides() if word.startswith("claim=") and word != "claim=null"), None)
    if claim or config.sweep.resume or config.sweep.dry_run:
        raise UserError(f"{claim or 'sweep.resume and sweep.dry_run'}: said of a sweep; add -m")


def check_root(data: Data) -> None:
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
        (folder / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.outputs={config.paths.outputs}: cannot be written ({error.strerror})") from None
    return folder


def _tags(config: Config) -> dict[str, str]:
    tags = {"condition": configs.condition(config), "config_hash": configs.config_hash(config)}
    return tags | source_tags() | {"overrides": configs.masked(" ".join(overrides()))}


@cache  # of the jobs of a sweep, each would ask for the same
def source_tags() -> dict[str, str]:
    """Versions, the commit of the project and whether files differ from it; no commit outside a git checkout."""
    return {f"version/{name}": metadata.version(name) for name in ("torch", "lightning", "hydra-core")} | dict(_git())


def _git() -> Iterator[tuple[str, str]]:

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
