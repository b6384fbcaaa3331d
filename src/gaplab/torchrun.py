"""One run on several devices: a process for each, started and watched over by torchrun's agent.

    train.py                           composes, checks, keeps the run's folder, its journal's end and its result
       └─ agent  (a process)           torchrun's: waits for the machines, starts the ranks, hears of their end
            └─ rank 0, 1, …            `worker.train`; the first one writes journal, checkpoints and result

Hydra runs in the first of these alone. What processes tell each other lies as JSON in the folder `ranks`.
"""

import ctypes
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from gaplab import config as configs
from gaplab import interrupt
from gaplab.config import Config
from gaplab.errors import DivergenceError, TrainingError, UserError
from gaplab.files import explain_disk, plain, read_json, write_whole
from gaplab.machine import uncollected
from gaplab.result import RunResult
from gaplab.run import Run

POLL_S = 0.05
GRACE_S = 3.0  # that the other ranks have after a first one failed
SPEAKING_S = 30.0  # that a silent rank with an error leaves to the one that names it, whose end ends it
STOP_WAIT_S = 30.0  # for a checkpoint, after a signal
PR_SET_PDEATHSIG = 1  # prctl.h
SIOCGIFADDR = 0x8915  # sockios.h
TORCHRUN_WORDS = ("TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "NODE_RANK")
OUTSIDE = "GAPLAB_LAUNCHED_BY"
ERRORS = {kind.__name__: kind for kind in (UserError, TrainingError, DivergenceError)}


def run(config: Config, folder: Path, result: RunResult, started: float, output: Path | None) -> None:
    """Train and measure on several devices; what `worker.train` does on one.

    Args:
        config: checked; the one in `folder`.
        folder: the run's own, existing folder.
        result: filled in when training is over.
        started: `time.perf_counter()` when the command began.
        output: file that people are told in; None for the terminal.

    Raises UserError, TrainingError, and Interrupted after all ranks have saved a checkpoint. None of their processes is
    left behind, however this ends.
    """
    scratch = folder / "ranks"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    job = {"folder": str(folder), "started": started, "output": str(output) if output else None}
    try:
        _watch(config, scratch, job | {"result": asdict(result)})
    finally:
        for name, value in read_json(scratch / "result.json").items():
            setattr(result, name, value)
    shutil.rmtree(scratch, ignore_errors=True)


def join(config: Config) -> None:
    """Be machine `trainer.node_rank` of a run that another one keeps. Raises as `run` does."""
    where = f"machine {config.trainer.node_rank} of {config.trainer.num_nodes}"
    print(f"{configs.run_name(config)}  {where}, for {config.trainer.rdzv_endpoint}", flush=True)
    with tempfile.TemporaryDirectory() as scratch, interrupt.handled():
        _watch(config, Path(scratch), {"folder": None, "started": time.perf_counter(), "output": None})


def _watch(config: Config, scratch: Path, job: dict[str, Any]) -> None:
    write_whole(scratch / "config.yaml", configs.to_yaml(config))
    write_whole(scratch / "job.json", json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(TORCHRUN_WORDS)}
    source = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, environment.get("PYTHONPATH"))))
    environment |= {
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(STOP_WAIT_S)),
    }
    command = [sys.executable, "-m", "gaplab.torchrun", "agent", str(scratch)]
    agent = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        with interrupt.farewell(lambda: _stop(agent)):
            failed_at = None
            while agent.poll() is None:
                if failed_at is None and any(scratch.glob("error-*.json")):
                    failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                    break
                time.sleep(POLL_S)
    finally:
        agent.kill()  # and with it, its ranks
        agent.wait()
    if agent.returncode != 0:
        _raise(config, scratch, agent.returncode)


def _stop(agent: "subprocess.Popen[bytes]") -> None:
    """Have the ranks save a checkpoint; a second signal interrupts this."""
    agent.terminate()
    with suppress(subprocess.TimeoutExpired):
        agent.wait(STOP_WAIT_S)


def _raise(config: Config, scratch: Path, status: int) -> None:
    """Say what went wrong first: the other ranks only lost sight of the one."""
    outcome = read_json(scratch / "agent.json")
    errors = [read_json(path) for path in sorted(scratch.glob("error-*.json"))]
    errors.sort(key=lambda error: error["time"])
    own = [error for error in errors if error["kind"] != "Lost"]
    if "error" in outcome:
        raise UserError(outcome["error"])
    if "signal" in outcome:
        raise interrupt.Interrupted(outcome["signal"])
    if own:
        error = own[0]
        with suppress(OSError):
            if error["traceback"] and scratch.name == "ranks":
                (scratch.parent / "error.log").write_text(
                    error["traceback"], encoding="utf-8", errors="backslashreplace"
                )
        if error["kind"] == "UserError":  # all have the same to say
            raise UserError(error["message"])
        raise ERRORS.get(error["kind"], TrainingError)(f"rank {error['rank']}: {error['message']}")
    if killed := outcome.get("killed"):
        raise TrainingError(killed)
    if errors:
        heard = errors[0]
        raise TrainingError(
            f"{_silent(config, {error['rank'] for error in errors})} does not answer any more; rank {heard['rank']} "
            f"waits {config.trainer.rank_timeout_s:g} s at most (trainer.rank_timeout_s): {heard['message']}"
        )
    raise TrainingError(f"the process that starts the ranks ended with status {status}; see {scratch}")


def _silent(config: Config, heard: set[int]) -> str:
    """Who said nothing at all, while the ranks `heard` on this machine waited for somebody."""
    settings = config.trainer
    first = settings.node_rank * settings.devices
    ranks = [f"rank {rank}" for rank in range(first, first + settings.devices) if rank not in heard]
    others = [f"machine {machine}" for machine in range(settings.num_nodes) if machine != settings.node_rank]
    return " or ".join(ranks or others) or "a rank"


# ---- in a rank that torchrun or srun started from outside


def overrides_of_outside(typed: list[str], multirun: bool) -> list[str]:
    """The overrides that fit a run to the ranks that torchrun or srun has started, of which this process is one; none
    elsewhere. Sets what torch.distributed reads from the environment.

    Under srun, `trainer.num_nodes` typed beside it keeps its meaning: one task a machine, whose devices gaplab starts.
    Raises UserError.
    """
    environment = os.environ
    if int(environment.get("WORLD_SIZE") or 1) > 1 and {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= environment.keys():
        launcher, local = "torchrun", environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])
    elif int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and not any(
        "trainer.num_nodes=" in one for one in typed
    ):
        launcher, local = "srun", _take_srun_for_torchrun()
    else:
        return []
    environment[OUTSIDE] = launcher
    if multirun:
        raise UserError(f"-m under {launcher}: each rank would run the whole sweep; {launcher} is for single runs")
    world = int(environment["WORLD_SIZE"])
    devices = {"trainer.devices": int(local), "trainer.num_nodes": world // int(local)}
    if world % int(local):
        raise UserError(f"{launcher}: {world} ranks, {local} of them on this machine; each machine needs as many")
    for word in typed:
        name, _, value = word.partition("=")
        if name in devices and value != str(devices[name]):
            raise UserError(f"{word}: {launcher} started {world} ranks, {local} a machine; leave {name} out")
    if devices["trainer.num_nodes"] > 1:
        endpoint = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        rank = int(environment["RANK"]) // int(local)
        devices |= {"trainer.rdzv_endpoint": endpoint, "trainer.node_rank": rank}  # type: ignore[dict-item]
    return [f"{name}={value}" for name, value in devices.items() if f"{name}={value}" not in typed]


def _take_srun_for_torchrun() -> str:
    """Set torchrun's variables from those of a Slurm step; the number of ranks on this machine."""
    environment = os.environ
    nodes = environment["SLURM_STEP_NODELIST"]
    first = "127.0.0.1"
    if int(environment.get("SLURM_STEP_NUM_NODES") or 1) > 1:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if not found.stdout:
            raise UserError(f"srun: {nodes}: scontrol does not resolve these names ({plain(found.stderr.strip())})")
        first = found.stdout.split()[0]
    counts = set(re.sub(r"\(x\d+\)", "", environment["SLURM_STEP_TASKS_PER_NODE"]).split(","))
    if len(counts) > 1:
        raise UserError(f"srun: {environment['SLURM_STEP_TASKS_PER_NODE']} tasks; each machine needs as many")
    local, number = counts.pop(), environment["SLURM_LOCALID"]
    if configs.cuda_devices() == 1 and int(local) > 1:  # --gpus-per-task=1: a rank sees its own GPU alone
        local, number = "1", "0"
    step = int(environment["SLURM_JOB_ID"]) * 8 + int(environment.get("SLURM_STEP_ID") or 0)
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": number,
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": str(int(environment["SLURM_PROCID"]) // int(local)),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20_000 + step % 12_000),  # below those that Linux gives to clients
    }
    return local


def is_outside() -> bool:
    """Whether this process is a rank that torchrun or srun started."""
    return OUTSIDE in os.environ


def is_follower() -> bool:
    """Whether this is such a rank, and another one keeps the run and speaks to people."""
    return is_outside() and os.environ["RANK"] != "0"


@contextmanager
def outside(config: Config) -> Iterator[Any]:
    """The group of those ranks."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with _group(config, int(os.environ["RANK"])) as ranks:
        yield ranks


@contextmanager
def error_named(ranks: Any, folder: Path) -> Iterator[None]:
    """Where a rank fails, the others raise TrainingError with its number and what it met."""
    from gaplab.ranks import FAILED

    try:
        yield
    except BaseException as error:
        own = None if isinstance(error, interrupt.Interrupted) else _described(error, ranks.rank, folder)
        if own and own["kind"] != "Lost":
            first = ranks.store.compare_set(FAILED, "", json.dumps(own))
        else:
            first = ranks.store.get(FAILED) if ranks.store.check([FAILED]) else b""
        failure = json.loads(first) if first else None
        if failure is None or (own and failure["rank"] == ranks.rank and own["kind"] != "Lost"):
            raise
        raise ERRORS.get(failure["kind"], TrainingError)(f"rank {failure['rank']}: {failure['message']}") from None


def lead(run: Run) -> None:
    """Be the first rank of such a run, which keeps it. Raises as `run` does."""
    with outside(run.config) as ranks:
        ranks.everyones(str(run.folder))
        with error_named(ranks, run.folder), run.result.timed("imports"):
            from gaplab import worker
        with error_named(ranks, run.folder):
            worker.train(run, ranks)


def follow(config: Config) -> None:
    """Be a rank other than the first of a run that torchrun or srun started. Raises as `run` does."""
    from rich.console import Console

    from gaplab.tracking.journal import Tracker

    with outside(config) as ranks, open(os.devnull, "w") as nowhere:
        folder = Path(ranks.everyones(None)[0])
        result = RunResult("", "RUNNING", config.seed, "", "")
        try:
            with error_named(ranks, folder):
                from gaplab import worker

                run = Run(config, folder, Tracker.of_rank(None), result, time.perf_counter(), Console(file=nowhere))
                worker.train(run, ranks)
        except Exception as error:  # the first rank names it, and torchrun ends that one when this one ends
            time.sleep(SPEAKING_S)
            sys.exit(2 if isinstance(error, UserError) else 1)


# ---- in the agent's process


def _agent(scratch: Path) -> int:
    _die_with_parent()
    logging.disable()  # what torchrun has to say is in its errors
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = configs.load(scratch / "config.yaml")
    settings = config.trainer
    try:
        host, port, _store = _roll_call(config)
    except UserError as error:
        write_whole(scratch / "agent.json", json.dumps({"error": str(error)}))
        return 2
    if settings.num_nodes > 1 and (interface := _interface(host)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    first = settings.node_rank == 0  # its first rank speaks to people
    quiet = {local: Std.ALL for local in range(settings.devices) if local or not first}
    launch = LaunchConfig(
        min_nodes=settings.num_nodes,
        max_nodes=settings.num_nodes,
        nproc_per_node=settings.devices,
        run_id="gaplab",
        rdzv_backend="static",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"rank": settings.node_rank, "timeout": int(settings.join_timeout_s)},
        max_restarts=0,
        monitor_interval=POLL_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch), redirects=quiet),
        local_addr=host if first else None,
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "gaplab.torchrun", "rank", str(scratch))
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                write_whole(scratch / "agent.json", json.dumps({"killed": f"rank {rank} was killed ({name})"}))
            elif failure.exitcode - 128 in interrupt.SIGNALS:  # told to stop, maybe on another machine
                write_whole(scratch / "agent.json", json.dumps({"signal": failure.exitcode - 128}))
        return 1
    except SignalException:
        return 1
    return 0


def _roll_call(config: Config) -> tuple[str, int, Any]:
    """Where the machines find each other, once all are there; raises UserError that names those missing."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    settings = config.trainer
    host, _, port = (settings.rdzv_endpoint or "localhost:0").rpartition(":")
    is_first, wait = settings.node_rank == 0, timedelta(seconds=settings.join_timeout_s)
    try:
        store = TCPStore(host, int(port), None, is_first, wait, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, ValueError) as error:
        reason = "cannot be listened at" if is_first else f"no answer within {settings.join_timeout_s:g} s"
        detail = "the port is in use" if "EADDRINUSE" in str(error) else plain(str(error).partition("\n")[0])[:200]
        raise UserError(f"trainer.rdzv_endpoint={settings.rdzv_endpoint}: {reason} ({detail})") from None
    if settings.num_nodes == 1:
        return host, store.port, store
    store.set(f"machine/{settings.node_rank}", configs.config_hash(config))
    if not is_first:
        verdict = store.get("verdict").decode()
        if verdict:
            with suppress(RuntimeError):
                store.set(f"heard/{settings.node_rank}", "")
            raise UserError(verdict)
        return host, store.port, store
    missing, other = [], []
    deadline = time.monotonic() + settings.join_timeout_s
    for machine in range(1, settings.num_nodes):
        try:
            store.wait([f"machine/{machine}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            if store.get(f"machine/{machine}").decode() != configs.config_hash(config):
                other.append(machine)
        except RuntimeError:
            missing.append(machine)
    verdict = ""
    if missing:
        names = " and ".join(f"machine {one}" for one in missing)
        verdict = f"{names} of {settings.num_nodes} did not join within {settings.join_timeout_s:g} s"
    elif other:
        verdict = f"machine {other[0]}: was started with another config; give all machines the same words"
    store.set("verdict", verdict)
    if verdict:
        heard = [f"heard/{machine}" for machine in range(1, settings.num_nodes) if machine not in missing]
        with suppress(RuntimeError):  # the store ends with this machine, and the others are to hear why
            store.wait(heard, timedelta(seconds=GRACE_S))
        raise UserError(verdict)
    return host, store.port, store


def _interface(host: str) -> str | None:
    """The network interface that leads to `host`; gloo would take the one that the machine's own name stands for."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None


def _die_with_parent() -> None:
    """Else a process that outlives SIGKILL of its parent goes on alone. Linux has a call for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- in a rank's process


def _rank(scratch: Path) -> int:
    _die_with_parent()
    number = int(os.environ["RANK"])
    folder = scratch
    try:
        with interrupt.handled(quiet=True):
            config = configs.load(scratch / "config.yaml")
            job = read_json(scratch / "job.json")
            with _group(config, number) as ranks:
                folder = Path(ranks.everyones(job["folder"])[0])
                _run_rank(config, folder, scratch, job, ranks)
    except interrupt.Interrupted as stop:
        return stop.exit_status
    except BaseException as error:
        write_whole(scratch / f"error-{number}.json", json.dumps(_described(error, number, folder)))
        return 1
    return 0


def _run_rank(config: Config, folder: Path, scratch: Path, job: dict[str, Any], ranks: Any) -> None:
    from rich.console import Console

    from gaplab.tracking.journal import Tracker

    is_first = ranks.rank == 0
    result = RunResult(**job["result"]) if is_first else RunResult("", "RUNNING", config.seed, "", "")
    with result.timed("imports"), uncollected():
        from gaplab import worker
    tracker = Tracker.of_rank(folder if is_first else None)
    where = job["output"] if is_first else os.devnull
    output = open(where, "a", encoding="utf-8") if where else None  # noqa: SIM115 (open for the whole process)
    try:
        console = Console(file=output, highlight=False)
        worker.train(Run(config, folder, tracker, result, job["started"], console), ranks)
    finally:
        if is_first:
            write_whole(scratch / "result.json", json.dumps(asdict(result)))


@contextmanager
def _group(config: Config, number: int) -> Iterator[Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    from gaplab.ranks import Ranks

    cuda = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    size = configs.world_size(config.trainer)
    patience = timedelta(seconds=config.trainer.join_timeout_s)  # imports take as long as the file system does
    store, *_ = next(rendezvous("env://", number, size, timeout=patience))
    ranks = Ranks(number, size, store, patience)
    ranks.meet("start")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore("gaplab", store),
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=config.trainer.rank_timeout_s),
    )
    yield ranks
    dist.destroy_process_group()


def _described(error: BaseException, number: int, folder: Path) -> dict[str, Any]:
    first_line = plain(str(error).partition("\n")[0])
    found: dict[str, Any] = {"rank": number, "time": time.time(), "kind": "TrainingError", "traceback": None}
    if type(error).__name__ in ERRORS:
        return found | {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, Exception) and (disk := explain_disk(error, folder)):
        return found | {"message": disk}
    if isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "peer", "Timed out", "closed")):
        return found | {"kind": "Lost", "message": re.sub(r"^\[[^]]*\] *", "", first_line)[:200]}
    return found | {"message": f"{type(error).__name__}: {first_line}", "traceback": traceback.format_exc()}


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    sys.exit(_agent(where) if what == "agent" else _rank(where))
