"""A multirun as one thing.

Every job is composed, checked and saved before the first starts; an MLflow run stands above theirs; what finished is
never run twice. The jobs are run by whichever Hydra launcher is chosen.
"""

import json
import os
import re
import secrets
import shlex
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from gaplab import config as configs
from gaplab import interrupt, launch, provenance
from gaplab.config import Config
from gaplab.errors import TrainingError, UserError
from gaplab.files import held, plain, read_json, refuse_links, write_whole
from gaplab.finder import find_sweep
from gaplab.live import LiveView, print_jobs, print_outcome
from gaplab.machine import command, share_gpus, take_a_gpu, uncollected, usable_cores
from gaplab.notes import NOTE, asked, counts, joined
from gaplab.recovery import recover
from gaplab.run import Run
from gaplab.tracking.journal import SEND_WAIT_S, Tracker, append, has_ended, read_journal

PROBE_SAMPLES = 4000
STOP = ".stop"  # in a sweep's folder: its jobs in other processes are to stop
STOP_POLL_S = 0.1
STOP_WAIT_S = 4.5
JOB_FOLDER = re.compile(r"[A-Za-z0-9=+_-][A-Za-z0-9.=+_-]{0,254}")  # as `config.slug` makes them
NOT_SWEPT = ("sweep.", "paths.", "tracking.", "hydra.")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its folder, what was said for it, and the config that came of it."""

    folder: Path
    overrides: list[str]
    config: Config


@dataclass
class SavedJobs:
    """What a launcher is given for Hydra's config loader: a job's config was composed and saved beforehand, so that
    files edited while the sweep runs change nothing. A launcher's "overrides" of a job are the name of its folder."""

    sweep: Path
    writer: int  # process of the sweep; jobs may be in others

    def load_sweep_config(self, master_config: Any, sweep_overrides: Sequence[str]) -> Any:
        from omegaconf import OmegaConf, open_dict

        config = OmegaConf.masked_copy(master_config, ["hydra"])
        with open_dict(config):
            config.hydra.sweep.subdir = sweep_overrides[0]
            config.folder = str(self.sweep / sweep_overrides[0])
            config.writer = self.writer
        return config


def sweep(hydra_config: Any, context: Any, params: list[str], typed: list[str]) -> None:
    """Run every combination of the swept values.

    Args:
        hydra_config: the config that Hydra composed, `hydra` included.
        context: HydraContext.
        params: overrides that the config gives, replaced by those typed.
        typed: overrides that were typed.

    Raises UserError before any job starts, TrainingError at the end when a job failed, and KeyboardInterrupt.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    if any(word.lstrip("+").startswith("hydra.sweep.") for word in hydra_config.hydra.overrides.hydra):
        raise UserError("hydra.sweep: gaplab names the folders of a sweep itself, in paths.outputs")
    resume = hydra_config.sweep.resume
    if resume and all(word.lstrip("+").startswith(("sweep.", "paths.", "allowed_targets=")) for word in typed):
        outputs = configs.folder("paths.outputs", hydra_config.paths.outputs)
        folder = find_sweep(outputs, resume, "sweep.resume")
        jobs = saved_jobs(folder)
        if not jobs:
            raise UserError(f"{plain(folder)}: a sweep without jobs")
    else:
        jobs = _compose(hydra_config, context, params, typed)
        settings = jobs[0].config
        outputs = configs.folder("paths.outputs", settings.paths.outputs)
        name = settings.sweep.claim or settings.name or f"{settings.data.name}_{settings.model.name}"
        folder = find_sweep(outputs, resume, "sweep.resume") if resume else _new_folder(outputs, name)
        jobs = _placed(folder, saved_jobs(folder) if resume else [], jobs)
    for job in jobs:  # saved ones, too
        configs.check_trust(job.config, typed)
    settings = jobs[0].config
    finished = [job for job in jobs if is_finished(job.folder, job.config)]
    waiting = [job for job in jobs if job not in finished]
    parallel = _set_parallel(hydra_config, settings)
    if hydra_config.sweep.dry_run:
        print_jobs(console, [(job.folder.name, configs.run_name(job.config), job in finished) for job in jobs])
        console.print(_estimate([job.config for job in waiting], parallel), soft_wrap=True)
        return
    launcher = _build_launcher(folder, hydra_config, context)
    _run(console, folder, jobs, waiting, hydra_config, launcher, typed)


def run_job(cfg: Any) -> None:
    """The task that a launcher runs, in this process or another: the job in `cfg.folder`."""
    run_saved(Path(cfg.folder), in_here=cfg.writer == os.getpid())


def run_saved(folder: Path, in_here: bool = False) -> None:
    """Run the saved job in `folder`, or go on with it, unless it is finished.

    Args:
        folder: of the job, inside its sweep's.
        in_here: the sweep is this process, so it hears the signals itself.

    Raises as `launch.launch` does.
    """
    from filelock import FileLock

    if not in_here:
        take_a_gpu()
    config = configs.load(folder / "config.yaml")
    with interrupt.handled(quiet=not in_here), nullcontext() if in_here else _stopped_with(folder.parent):
        with FileLock(folder / ".lock"):  # a job that outlived its sweep ends first
            finished = is_finished(folder, config)
        if not finished:
            launch.launch(config, folder, in_sweep=True, condition=_condition_of(folder))


def run_together(folders: list[Path], in_here: bool = False) -> dict[Path, str]:
    """Run the saved jobs in `folders`, of one kind (`fusing.kind`), as one, unless they are finished.

    `in_here` as in `run_saved`. What kept jobs from their end, as plain text.
    """
    from filelock import FileLock

    if not in_here:
        take_a_gpu()
    problems: dict[Path, str] = {}
    waiting: dict[Path, Config] = {}
    for folder in folders:
        config = configs.load(folder / "config.yaml")
        with FileLock(folder / ".lock"):
            if not is_finished(folder, config):
                waiting[folder] = config
    with interrupt.handled(quiet=not in_here), nullcontext() if in_here else _stopped_with(folders[0].parent):
        seats: dict[Path, AbstractContextManager[Run]] = {}
        runs = []

        def leave(folder: Path, error: BaseException | None) -> None:
            seat = seats.pop(folder)
            try:
                passed = seat.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
                problem = None if passed else error
            except Exception as raised:  # as a run alone ends
                problem = raised
            if problem is not None:
                problems[folder] = str(problem)

        try:
            for folder, config in waiting.items():
                seat = launch.opened(config, folder, in_sweep=True, condition=_condition_of(folder))
                try:
                    runs.append(seat.__enter__())
                    seats[folder] = seat
                except (UserError, TrainingError) as error:
                    problems[folder] = str(error)
            if runs:
                start = time.perf_counter()
                with uncollected():
                    from gaplab import together
                for run in runs:
                    run.result.times["imports"] = (time.perf_counter() - start) / len(runs)
                together.train(runs, lambda run, error: leave(run.folder, error))
        except BaseException as error:
            blamed = list(seats)
            for folder in blamed:
                leave(folder, error)
            if not blamed or not isinstance(error, Exception):
                raise
    return problems


@contextmanager
def _stopped_with(folder: Path) -> Iterator[None]:
    """For a job in another process than its sweep's: stop when the sweep does. Ctrl-C is the sweep's to hear."""
    done = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while not done.wait(STOP_POLL_S):
            if (folder / STOP).exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if (folder / STOP).exists():  # this job was next in a queue
        raise interrupt.Interrupted(signal.SIGTERM)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def saved_jobs(folder: Path) -> list[Job]:
    """The jobs of a sweep, in order. Raises UserError."""
    refuse_links(folder)
    found = []
    for name, overrides in listed_jobs(folder):
        refuse_links(folder / name)
        found.append(Job(folder / name, overrides, configs.load(folder / name / "config.yaml")))
    return found


def listed_jobs(folder: Path) -> list[tuple[str, list[str]]]:
    """The folder of each job of a sweep, a name inside the sweep's, and what was said for it. Raises UserError."""
    path = folder / "sweep.json"
    jobs = read_json(path).get("jobs")
    if not isinstance(jobs, list):
        raise UserError(f"{plain(path)}: cannot be read (no list of jobs)")
    found: dict[str, list[str]] = {}
    for job in jobs:
        name, overrides = (job.get("folder"), job.get("overrides")) if isinstance(job, dict) else (job, None)
        if not isinstance(name, str) or not JOB_FOLDER.fullmatch(name) or name in found:
            raise UserError(f"{plain(path)}: {plain(name)[:80]!r} is not the folder of a job inside this sweep")
        if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
            raise UserError(f"{plain(path)}: the overrides of {name} are no list of words")
        found[name] = overrides
    return list(found.items())


def is_finished(folder: Path, config: Config) -> bool:
    """Whether the run of just this config is in `folder`, to its end."""
    result = read_json(folder / "result.json")
    ended = result.get("status") == "FINISHED" or (config.sweep.allow_divergence and result.get("diverged"))
    return bool(ended) and result.get("config_hash") == configs.config_hash(config)


def _compose(hydra_config: Any, context: Any, params: list[str], typed: list[str]) -> list[Job]:
    """Every combination of the swept values, composed and checked; the folders are yet to be chosen."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides([*params, *typed])
    (combinations,) = BasicSweeper.split_arguments(parsed, None)
    jobs: list[Job] = []
    known: dict[tuple[str, ...], Config] = {}
    hashes: dict[str, list[str]] = {}
    for overrides in combinations:
        config = _compose_one(hydra_config, context, overrides, typed, known)
        if config.trainer.threads is None:  # the same whatever the launcher, for it decides the last bits
            config = replace(config, trainer=replace(config.trainer, threads=1))
        if config.trainer.num_nodes > 1:
            raise UserError("trainer.num_nodes: of a single run; the jobs of a sweep train on one machine each")
        if config.resume:
            raise UserError("resume: of a single run; a sweep goes on with sweep.resume=latest")
        if configs.registers(config):
            raise UserError(f"tracking.register=true: of a single run; after a sweep, {command('promote')} run=<job>")
        # what is said of the sweep is not said of its jobs
        config = replace(config, sweep=replace(config.sweep, resume=None, dry_run=False))
        launch.check_root(config.data)
        said = [_plain(word) for word in overrides if not word.startswith(NOT_SWEPT)]
        same = hashes.setdefault(configs.config_hash(config), said)
        if same is not said:
            raise UserError(f"two jobs are the same: [{' '.join(same)}] and [{' '.join(said)}]")
        jobs.append(Job(Path(), said, config))
    if not jobs:
        empty = [one.input_line for one in parsed if one.is_sweep_override() and not list(one.sweep_string_iterator())]
        raise UserError(f"{' '.join(filter(None, empty))}: no value in it, so there is nothing to run")
    for name in ("train_size", "valid_size"):
        values = [getattr(job.config.data, name) for job in jobs]
        if 1 in values and any(isinstance(value, float) for value in values):
            raise UserError(f"data.{name}=1: one sample, beside fractions" + "; 1.0 means all" * (name == "train_size"))
    return jobs


def _compose_one(
    hydra_config: Any, context: Any, overrides: list[str], typed: list[str], known: dict[tuple[str, ...], Config]
) -> Config:
    """A job's config. Hydra takes 0.1 s for one, and replicates differ in a number: `known` keeps one of them, unless
    some value is made from the seed."""
    from omegaconf import OmegaConf, flag_override

    others = tuple(word for word in overrides if not word.startswith("seed="))
    (seed,) = [word.removeprefix("seed=") for word in overrides if word.startswith("seed=")] or [""]
    if seed.isdigit() and others in known:
        config = replace(known[others], seed=int(seed))
        configs.check(config)
        return config
    cfg = context.config_loader.load_sweep_config(hydra_config, overrides)
    params = cfg.hydra.sweeper.params
    with flag_override(cfg, ["struct", "readonly"], [False, False]):
        del cfg["hydra"]
    if params != hydra_config.hydra.sweeper.params:
        said = " ".join(word for word in overrides if word.startswith(("claim=", "experiment=")))
        raise UserError(f"{said}: has a sweep of its own, so it cannot be one choice among several")
    config = configs.from_hydra(cfg, typed)
    if not re.search(r"\$\{[^}]*\bseed\b", OmegaConf.to_yaml(cfg)):
        known[others] = config
    return config


def _plain(word: str) -> str:
    """Hydra writes swept booleans as Python does."""
    return re.sub(r"=(True|False)$", lambda found: found.group().lower(), word)


def _new_folder(outputs: Path, name: str) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return outputs / "sweeps" / f"{stamp}_{configs.slug(name)}_{secrets.token_hex(3)}"


def _placed(folder: Path, saved: list[Job], composed: list[Job]) -> list[Job]:
    """The saved jobs, then the composed ones that are new, numbered on; a folder's name says what is its job's own."""
    known = {configs.config_hash(job.config) for job in saved}
    new = [job for job in composed if configs.config_hash(job.config) not in known]
    if saved and len(new) == len(composed):
        raise UserError(f"sweep.resume: none of these jobs is in {folder}; leave sweep.resume out for a new sweep")
    words = _own_words([job.overrides for job in composed])
    names = {id(job): "_".join(own or job.overrides) for job, own in zip(composed, words, strict=True)}
    return saved + [
        replace(job, folder=folder / configs.slug(f"{number}_{names[id(job)]}"))
        for number, job in enumerate(new, len(saved))
    ]


def _own_words(overrides: list[list[str]]) -> list[list[str]]:
    """Of each job's overrides, those that not all jobs share."""
    common = set.intersection(*map(set, overrides))
    return [[word for word in words if word not in common] for words in overrides]


def _save(folder: Path, jobs: list[Job], typed: list[str]) -> None:
    """Each job's config, then `sweep.json`, whole or not at all."""
    try:
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            if not (job.folder / "config.yaml").is_file():
                write_whole(job.folder / "config.yaml", configs.to_yaml(job.config))
    except OSError as error:
        raise UserError(f"paths.outputs: {folder} cannot be written ({error.strerror})") from None
    said = [configs.masked(word) for word in typed]
    path = folder / "sweep.json"
    before = {"overrides": said, "resumed": []} | read_json(path)
    if not isinstance(before["overrides"], list) or not isinstance(before["resumed"], list):
        raise UserError(f"{plain(path)}: cannot be read (no list of overrides)")
    description = {
        "name": folder.name,
        "claim": jobs[0].config.sweep.claim,
        "overrides": before["overrides"],
        "resumed": before["resumed"] + [said] * path.is_file(),
        "jobs": [
            {
                "folder": job.folder.name,
                "overrides": job.overrides,
                "config_hash": configs.config_hash(job.config),
                "condition": configs.condition(job.config),
                "seed": job.config.seed,
            }
            for job in jobs
        ],
    }
    write_whole(path, json.dumps(description, indent=1) + "\n")


def _run(
    console: Console,
    folder: Path,
    jobs: list[Job],
    waiting: list[Job],
    hydra_config: Any,
    launcher: Any,
    typed: list[str],
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.outputs={folder.parent.parent}: cannot be written ({error.strerror})") from None
    with held(folder, "this sweep is running"):
        old = {event["path"] for event in read_journal(folder) if event["event"] == "child"}
        settings = launch.tracking(folder, jobs[0].config)
        _save(folder, jobs, typed)
        console.print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them finished, in {folder}", soft_wrap=True)
        if before := _environments(jobs, waiting):
            console.print(f"note: {before}", markup=False, soft_wrap=True)
        claim = jobs[0].config.sweep.claim
        tags = {"sweep": folder.name, "overrides": configs.masked(" ".join(typed))} | provenance.source_tags()
        tracker = Tracker(folder, settings, f"sweep {folder.name[20:]}", tags | ({"claim": claim} if claim else {}))
        question = _asked(folder, jobs)
        tracker.tags({NOTE: joined(f"Under way: {len(waiting)} of {len(jobs)} runs are to come.", question)})
        recover(folder.parent.parent, settings)
        for job in jobs:
            if str(job.folder) not in old:
                tracker.child(job.folder)
        tracker.artifact(folder / "sweep.json")
        (folder / STOP).unlink(missing_ok=True)
        for job in waiting:
            if _is_running(job.folder):
                console.print(f"{job.folder.name} still runs in a process that outlived its sweep; it is waited for")
            else:
                (job.folder / "result.json").unlink(missing_ok=True)
        status, problem, wait_s = "KILLED", None, 1.0
        engine = hydra_config.hydra.runtime.choices["hydra/launcher"]
        in_here = engine == "basic"
        try:
            tracker.wait_for_run()
            epochs = [job.config.trainer.max_epochs for job in waiting]
            with (
                nullcontext() if in_here else interrupt.farewell(lambda: _stop_jobs(folder, waiting)),
                LiveView(console, [job.folder for job in waiting], epochs),
            ):
                problem = _launch(launcher, waiting)
            status, wait_s = "FINISHED", SEND_WAIT_S
        finally:
            results = [read_json(job.folder / "result.json") for job in jobs]
            lost = [not is_finished(job.folder, job.config) for job in jobs]
            if status == "FINISHED" and any(lost):
                status = "FAILED"
            attempt = sum(event["event"] == "run" for event in read_journal(folder))
            tracker.metrics({"sweep/jobs": len(jobs), "sweep/failed": sum(lost)}, attempt)
            reasons = {
                job.folder.name: str(result.get("error") or result.get("status", "not begun"))
                for job, result, is_lost in zip(jobs, results, lost, strict=True)
                if is_lost
            }
            tracker.tags({NOTE: joined(counts(reasons, len(jobs)), question)})
            tracker.finish(status, wait_s)
            labels = conditions(jobs)
            keys = [word for word in hydra_config.hydra.overrides.hydra if "hydra.launcher." in word]
            trust = [word for word in typed if word.startswith("allowed_targets=")]
            words = [f"sweep.resume={folder}", *trust] + ([] if in_here else [f"hydra/launcher={engine}", *keys])
            resume, report = command("train", "-m", *words), command("report", f"sweep={folder}")
            if (after := _environments(jobs)) and after != before:
                console.print(f"note: {after}", markup=False, soft_wrap=True)
            print_outcome(console, [job.folder.name for job in jobs], labels, results, lost, resume, report, problem)
    if any(lost):
        raise TrainingError(f"{sum(lost)} of {len(jobs)} jobs did not finish")


def _environments(jobs: list[Job], waiting: Sequence[Job] = ()) -> str | None:
    """How the environments of the jobs' runs differ, in words; the commit of those waiting will be the present one."""
    folders = {job.folder for job in waiting}
    return provenance.difference(
        [
            [provenance.source_tags()] if job.folder in folders else provenance.attempts(read_journal(job.folder))
            for job in jobs
        ]
    )


def _asked(folder: Path, jobs: list[Job]) -> str:
    """What the sweep asks, for its page in MLflow."""
    said = [str(word) for word in read_json(folder / "sweep.json")["overrides"]]
    factors: dict[str, list[str]] = {}
    for job in jobs:
        for word in job.overrides:
            name, _, level = word.lstrip("+").partition("=")
            if level not in factors.setdefault(name, []):
                factors[name].append(level)
    config = jobs[0].config
    claim = config.sweep.claim
    return asked(
        f"{config.model.name} on {config.data.name}, {config.trainer.max_epochs} epochs",
        {name: levels for name, levels in factors.items() if name != "seed" and len(levels) > 1},
        sorted({job.config.seed for job in jobs}),
        len(jobs),
        # where its files are is nobody else's matter
        f"python src/train.py -m {shlex.join(word for word in said if not word.startswith(('paths.', 'tracking.')))}",
        configs.QUESTIONS.get(claim or ""),
        claim,
    )


def _condition_of(folder: Path) -> str:
    """What tells the condition of the job in `folder` from the others', in words; nothing where there is but one."""
    jobs = dict(listed_jobs(folder.parent))
    words = _own_words([[word for word in said if not word.startswith("seed=")] for said in jobs.values()])
    keys = {word.partition("=")[0] for own in words for word in own}
    ends = Counter(name.rpartition(".")[2] for name in keys)

    def short(word: str) -> str:
        end = word.partition("=")[0].rpartition(".")[2]
        return word if ends[end] > 1 else end + word[len(word.partition("=")[0]) :]

    return " ".join(map(short, dict(zip(jobs, words, strict=True)).get(folder.name, [])))


def _is_running(folder: Path) -> bool:
    """Whether a process holds the job in `folder`."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _stop_jobs(folder: Path, jobs: list[Job]) -> None:
    """Have the jobs in other processes save their checkpoints, before their launcher kills them."""
    (folder / STOP).touch()
    deadline = time.monotonic() + STOP_WAIT_S
    while any(_is_running(job.folder) for job in jobs) and time.monotonic() < deadline:
        time.sleep(STOP_POLL_S)


def _build_launcher(folder: Path, hydra_config: Any, context: Any) -> Any:
    """The chosen launcher, for the jobs in `folder`. Raises UserError where it cannot run."""
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext
    from omegaconf import open_dict

    with open_dict(hydra_config):
        hydra_config.hydra.sweep.dir = str(folder)
    return Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(SavedJobs(folder, os.getpid()), context.callbacks),  # type: ignore[arg-type]
        task_function=run_job,
        config=hydra_config,
    )


def _launch(launcher: Any, waiting: list[Job]) -> str | None:
    """Let the launcher run the jobs; what became of it if it gave up."""
    from hydra.core.utils import JobStatus

    if not waiting:
        return None
    gpus = configs.cuda_devices()
    if gpus > 1 and all(job.config.trainer.devices == 1 for job in waiting):
        share_gpus(gpus)
    try:
        returns = launcher.launch([[job.folder.name] for job in waiting], initial_job_idx=0)
    except Exception as error:  # a process of the launcher's was killed, a cluster did not answer
        return f"the launcher gave up: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for job, returned in zip(waiting, returns, strict=True):
        if returned.status is not JobStatus.COMPLETED and not read_json(job.folder / "result.json"):
            _record_lost(job.folder, returned._return_value)
    return None


def _record_lost(folder: Path, cause: Any) -> None:
    """A job ended before there was a run to record it, or its process did so without a word."""
    known = isinstance(cause, UserError | TrainingError)
    result = {"status": "FAILED", "error": str(cause) if known else f"{type(cause).__name__}: {cause}"}
    write_whole(folder / "result.json", json.dumps(result) + "\n")
    if not has_ended(folder):  # its machine may be another, whose processes only the launcher knows of
        append(folder, "tags", values={"error": result["error"][:5000]})
        append(folder, "finish", status="FAILED")


def _set_parallel(hydra_config: Any, settings: Config) -> int | None:
    """Jobs at a time; with joblib, unless said, as many as the cores hold with the threads that each job has. None
    where a cluster decides."""
    from omegaconf import open_dict

    launcher = hydra_config.hydra.launcher
    if "gaplab" in launcher._target_:
        return None
    if "joblib" not in launcher._target_:
        return 1
    cores = usable_cores()
    if launcher.n_jobs == -1:
        with open_dict(hydra_config):
            launcher.n_jobs = max(1, cores // ((settings.trainer.threads or 1) * settings.trainer.devices))
            launcher.batch_size = "1"
    return int(launcher.n_jobs)


def conditions(jobs: list[Job]) -> list[str]:
    """What tells each job's condition from the others', in the words of its overrides; equal for replicates."""
    words = _own_words([[word for word in job.overrides if not word.startswith("seed=")] for job in jobs])
    return [
        " ".join(own) or configs.run_name(job.config).rpartition(" ")[0] for job, own in zip(jobs, words, strict=True)
    ]


def _estimate(waiting: list[Config], parallel: int | None) -> str:
    """How long the jobs will take, from two short epochs of each kind of network on this machine."""
    seconds: dict[str, float] = {}
    total = 0.0
    try:
        for config in waiting:
            kind = repr(
                (replace(config.model, bn=True, dropout=0.0, init="zeros", init_gain=1.0, init_std=1.0), config.data)
            )
            if kind not in seconds:
                seconds[kind] = _probe(config)
            total += seconds[kind] * config.trainer.max_epochs
    except (TrainingError, UserError) as error:
        return f"{len(waiting)} jobs to run; no estimate of the time: {error}"
    jobs = f"{len(waiting)} jobs to run, " + (f"{parallel} at a time" if parallel else "on this machine one by one")
    return f"{jobs}: about {_duration(total / (parallel or 1))} of training, judged by two short epochs"


def _probe(config: Config) -> float:
    """Seconds of an epoch, from one with fewer samples."""
    factor, data = 1.0, config.data
    if isinstance(data, configs.TorchvisionData) and data.num_train is not None:
        train, valid = configs.sizes(data, data.num_train)
        factor = max(1.0, train / PROBE_SAMPLES)
        data = replace(data, train_size=round(train / factor), valid_size=max(1, round(valid / factor)))
    trainer = replace(config.trainer, max_epochs=2, early_stopping=None)
    with tempfile.TemporaryDirectory() as folder:
        short = replace(config, data=data, trainer=trainer, figures=False)
        launch.launch(short, Path(folder) / "probe", in_sweep=True)
        epochs = [event["values"] for event in read_journal(Path(folder) / "probe") if event["event"] == "metrics"]
    return factor * min(values["time/epoch_s"] for values in epochs if "time/epoch_s" in values)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
