"""One job: make its folder, start its tracking, and only then import what is heavy and run it."""

import logging
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaplab import config as configs
from gaplab import interrupt, provenance, torchrun
from gaplab.config import Config, Data, ImageFolder, MLflow, Tracking
from gaplab.errors import DivergenceError, TrainingError, UserError
from gaplab.files import explain_disk, held, read_json, refuse_links, write_whole
from gaplab.finder import find_run
from gaplab.machine import command, uncollected
from gaplab.notes import NOTE, of_run
from gaplab.recovery import recover
from gaplab.result import RunResult, print_summary, print_times
from gaplab.run import Run
from gaplab.tracking.journal import SEND_WAIT_S, Tracker, read_journal

if TYPE_CHECKING:
    from rich.console import Console


def main(config: Config, typed: list[str]) -> Path | None:
    """What `train.py` was asked for, a new run or to go on with one; its folder, unless another machine keeps it or it
    was finished before. Call `refuse` first. Raises as `launch` does."""
    if config.resume is not None:
        return resume(config, typed)
    return _begin(config, None)


def _begin(config: Config, folder: Path | None) -> Path | None:
    """Launch the run, or take part in one that another process keeps."""
    if torchrun.is_follower():
        torchrun.follow(config)
        return None
    if config.trainer.node_rank:
        torchrun.join(config)
        return None
    folder = folder or _make_folder(config, None)
    launch(config, folder)
    return folder


def refuse(config: Config, typed: list[str]) -> None:
    """Raises UserError for what `main` cannot do, as far as that is known before anything is imported or made."""
    _refuse_sweep_words(config, typed)
    if config.figures and find_spec("matplotlib") is None:
        raise UserError("figures=true: matplotlib is not installed; figures=false does without it")
    if config.resume is None:
        check_root(config.data)
    else:
        _resumed(config, typed)


def launch(config: Config, folder: Path | None = None, in_sweep: bool = False, condition: str = "") -> RunResult:
    """Run the job that `config` says, or go on with it where a checkpoint in `folder` left it; as `opened`."""
    with opened(config, folder, in_sweep, condition) as run:
        if not in_sweep:
            recover(configs.folder("paths.outputs", config.paths.outputs), config.tracking)
        if torchrun.is_outside():
            torchrun.lead(run)
        elif configs.world_size(config.trainer) > 1:
            output = run.folder / "console.log" if in_sweep else None
            torchrun.run(config, run.folder, run.result, run.started, output)
        else:
            with run.result.timed("imports"), uncollected():  # in which the sender gets ready too
                from gaplab import worker

            worker.train(run)
    return run.result


@contextmanager
def opened(config: Config, folder: Path | None = None, in_sweep: bool = False, condition: str = "") -> Iterator[Run]:
    """A run from its first word to its last: its folder, its journal, its result.

    Args:
        config: checked.
        folder: None makes a new one.
        in_sweep: speak into `<folder>/console.log`, and leave MLflow to the sweep's sender.
        condition: what the run's replicates share, in words; its name without the seed where nothing is said.

    `result.json` is written however it ends. Raises UserError or TrainingError, after the run is recorded as FAILED,
    and Interrupted, as KILLED.
    """
    from rich.console import Console

    started, composed = time.perf_counter(), _age()
    check_root(config.data)
    folder = _make_folder(config, folder)
    with _explained_disk(folder), held(folder, "this run is going on in another process"), interrupt.handled():
        (folder / "result.json").unlink(missing_ok=True)  # of an earlier attempt
        if not (folder / "config.yaml").is_file():
            write_whole(folder / "config.yaml", configs.to_yaml(config))
        name, tags = configs.run_name(config), _tags(config) | ({"sweep": folder.parent.name} if in_sweep else {})
        if in_sweep and isinstance(config.tracking, MLflow):
            tags = config.tracking.tags | tags
        if not in_sweep:
            print(f"{name}  in {folder}", flush=True)
        tags["arm"] = condition or name.removesuffix(f" s{config.seed}")
        settings = None if in_sweep else tracking(folder, config)
        tracker = Tracker(folder, settings, name, tags, config.allowed_targets)
        result = RunResult(tracker.id, "RUNNING", config.seed, configs.condition(config), configs.config_hash(config))
        if not in_sweep:
            result.times["compose"] = composed
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # that it made its font cache is no news
        with (folder / "console.log").open("w", encoding="utf-8") if in_sweep else nullcontext() as output:
            console = Console(file=output, highlight=False)
            with _recorded(result, folder, tracker, console, started, _logs_model(config, in_sweep)):
                yield Run(config, folder, tracker, result, started, console)
            print_summary(console, result, config)
            if not in_sweep:
                for head, line in zip(("next", ""), _advice(config, folder), strict=False):
                    console.print(f"{head:8}{line}", markup=False, soft_wrap=True)
            if config.trainer.profile:
                print_times(console, result)


def _advice(config: Config, folder: Path) -> Iterator[str]:
    """What to type after a run that was typed: the same with BatchNorm toggled, and where its curves are."""
    outputs, words = configs.folder("paths.outputs", config.paths.outputs), typed_words()
    if words is not None and _can_toggle(config):
        if any(word.startswith("resume=") for word in words):
            trust = [word for word in words if word.startswith("allowed_targets=")]
            words = ["--config-dir", str(folder), "--config-name", "config", *trust]
        own = [configs.masked(word) for word in words if not word.lstrip("+").startswith("model.bn=")]
        yield f"{command('train', *own, f'model.bn={str(not config.model.bn).lower()}')}    (compare)"
    if isinstance(config.tracking, MLflow):
        if config.tracking.uri == f"sqlite:///{outputs / 'mlflow.db'}":
            yield f"{command('ui', *configs.elsewhere(outputs))}    (look at the curves)"
        elif config.tracking.uri.startswith("http"):
            yield f"{configs.masked(config.tracking.uri)}    (look at the curves)"


def _can_toggle(config: Config) -> bool:
    """Whether the run could be typed with the other value of model.bn; a class of one's own may know no BatchNorm."""
    if type(config.model) is configs.Model and not config.model.bn:
        return False
    try:
        configs.check(replace(config, model=replace(config.model, bn=not config.model.bn)))
    except UserError:
        return False
    return True


def typed_words() -> list[str] | None:
    """The whole command line after `train.py`, options included; None when gaplab is used as a library."""
    from hydra.core.hydra_config import HydraConfig

    return sys.argv[1:] if HydraConfig.initialized() else None


def _logs_model(config: Config, in_sweep: bool) -> bool:
    settings = config.tracking
    if not isinstance(settings, MLflow):
        return False
    return settings.register or (not in_sweep if settings.log_model is None else settings.log_model)


def _age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


@contextmanager
def _recorded(
    result: RunResult, folder: Path, tracker: Tracker, console: "Console", started: float, log_model: bool
) -> Iterator[None]:
    """Write down how the run ended, whatever ended it, and in which words a person is told."""
    wait_s = SEND_WAIT_S
    try:
        yield
        result.status = "FINISHED"
    except (interrupt.Interrupted, KeyboardInterrupt, SystemExit):  # rich exits when nobody reads any more
        result.status, wait_s = "KILLED", 1
        with suppress(OSError):
            if console.file is sys.stdout:  # a job goes on with its sweep
                trust = [word for word in overrides() if word.startswith("allowed_targets=")]
                print(f"go on   {command('train', f'resume={folder}', *trust)}", flush=True)
        raise
    except (UserError, TrainingError) as error:
        result.status, result.error, result.diverged = "FAILED", str(error), isinstance(error, DivergenceError)
        raise
    except Exception as error:
        result.status, result.error = "FAILED", explain_disk(error, folder)
        if result.error is None:
            result.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            with suppress(OSError):
                (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
                result.error += f" (traceback in {folder / 'error.log'})"
        raise TrainingError(result.error) from error
    finally:
        result.total_s = time.perf_counter() - started
        ignored = suppress(OSError) if result.error else nullcontext()  # of a full disk one hears once
        with ignored:
            result.write(folder)  # before MLflow is waited for: it may keep us waiting, or be interrupted
        with ignored:
            if result.error:
                tracker.tags({"error": result.error[:5000], "diverged": str(result.diverged).lower()})
            tracker.tags({NOTE: of_run(asdict(result))})
            with result.timed("tracking"):
                log_model &= result.status == "FINISHED"
                result.run_id = tracker.finish(result.status, wait_s, log_model) or result.run_id
        result.total_s = time.perf_counter() - started
        with ignored:
            result.write(folder)


@contextmanager
def _explained_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(explain_disk(error, folder) or str(error)) from error


def resume(wanted: Config, typed: list[str]) -> Path | None:
    """Go on with the run that `wanted.resume` names, in its own words; its folder, as `main`. Raises as `main`."""
    folder, config = _resumed(wanted, typed)
    result = read_json(folder / "result.json")
    if result.get("status") == "FINISHED":
        print(f"{configs.run_name(config)}  in {folder} is finished")
        return None
    return _begin(config, folder)


def _resumed(wanted: Config, typed: list[str]) -> tuple[Path, Config]:
    """The folder of the run that `wanted.resume` names, and the config to go on with."""
    devices = ("devices", "num_nodes", "node_rank", "rdzv_endpoint", "join_timeout_s", "rank_timeout_s")
    usual = ("resume=", "paths.outputs=", "allowed_targets=", *(f"trainer.{name}=" for name in devices))
    others = [word for word in typed if not word.lstrip("+").startswith(usual)]
    if others:
        raise UserError(f"resume: goes on with the run's own config, so {others[0]} cannot be said; begin a new run")
    assert wanted.resume is not None
    folder = find_run(configs.folder("paths.outputs", wanted.paths.outputs), wanted.resume, "resume", resumable=True)
    if folder is None:
        raise UserError(f"resume={wanted.resume}: no folder of this run here")
    for one in (folder, folder / "checkpoints"):
        if one.is_dir():
            refuse_links(one)
    config = configs.load(folder / "config.yaml")
    _refuse_edited(config, folder)
    said = [name for name in devices if any(word.startswith(f"trainer.{name}=") for word in typed)]
    config = replace(config, trainer=replace(config.trainer, **{name: getattr(wanted.trainer, name) for name in said}))
    configs.check(config)
    configs.check_trust(config, typed)
    return folder, config


def _refuse_edited(config: Config, folder: Path) -> None:
    """Raises UserError where the saved config was edited after the run had begun to train with another."""
    if not (folder / "checkpoints" / "last.ckpt").is_file():
        return
    params = [event["values"] for event in read_journal(folder) if event["event"] == "params"]
    values, speed = configs.flatten(config), ("data.workers", "data.memory_budget_gb", "data.eval_batch_size")
    for name, before in params[-1].items() if params else ():
        trained = name.startswith(("model.", "data.", "optimizer.", "scheduler.", "seed")) and name not in speed
        now = configs.masked(str(values.get(name, before)))
        if trained and configs.decides(name) and now != before:
            raise UserError(
                f"{folder / 'config.yaml'}: {name} was edited to {now}, but the run has been trained with "
                f"{before}; change it back to resume, or start a new run"
            )


def tracking(folder: Path, config: Config) -> Tracking:
    """The tracking settings; what goes on keeps the address it began with (saved configs hold no password)."""
    began = next((event for event in read_journal(folder) if event["event"] == "run" and "uri" in event), None)
    if began and isinstance(config.tracking, MLflow):
        return replace(config.tracking, uri=began["uri"])
    return config.tracking


def _refuse_sweep_words(config: Config, typed: list[str]) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise UserError("hydra/sweeper: only gaplab's keeps a sweep together; leave hydra/sweeper out")
    claim = next((word for word in typed if word.startswith("claim=") and word != "claim=null"), None)
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
    outputs = configs.folder("paths.outputs", config.paths.outputs)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = configs.slug(configs.run_name(config)).replace("=", "-")  # Hydra would want it quoted in resume=
    folder = folder or outputs / "runs" / f"{stamp}_{name}_{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.outputs={config.paths.outputs}: cannot be written ({error.strerror})") from None
    return folder


def _tags(config: Config) -> dict[str, str]:
    tags = {"condition": configs.condition(config), "config_hash": configs.config_hash(config)}
    return tags | provenance.source_tags() | {"overrides": configs.masked(" ".join(overrides()))}


def overrides() -> list[str]:
    """What was typed after `train.py`; nothing when gaplab is used as a library."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return []
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # ${…} in them stays as it is
    return list(words)
