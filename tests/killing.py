"""Runs that are killed: each in a forked process, for what it costs to import torch would be most of the time."""

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gaplab import config, launch
from gaplab.tracking.journal import read_journal
from gaplab.training import checkpoint, reader

NOT_NUMBERS = {"run_id", "fit_s", "total_s", "steps_per_s", "times"}
STAGES = ("_write", "os.fsync", "os.replace", "os.link", "_write_checksum", "_sync_folder")


def run_forked(
    configuration: config.Config,
    folder: Path | None,
    before: Callable[[], None] | None = None,
    output: Path | None = None,
) -> int:
    """The process id of a run in a process of its own, which first calls `before`, and speaks into `output` (None:
    beside `folder`)."""
    output = output or (folder.with_name(f"{folder.name}.out") if folder else Path(os.devnull))
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            if before:
                before()
            launch.launch(configuration, folder)
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait_for(child: int) -> int:
    """Its exit status; negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_stage(number: int) -> Callable[[], None]:
    """Has the process kill itself around the `number`-th call of those that make up a save: before it, within a write
    that is half done, or after it."""

    def install() -> None:
        draw = random.Random(number)
        left = [number]

        def watch(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def called(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                when = draw.choice(["before", "within", "after"]) if left[0] == 0 else ""
                if when == "within" and name == "_write":
                    path, content = args
                    path.write_bytes(bytes(content)[: len(content) // 2])
                if when in ("before", "within"):
                    os.kill(os.getpid(), signal.SIGKILL)
                found = original(*args, **kwargs)
                if when == "after":
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            setattr(owner, name, called)

        for stage in STAGES:
            owner, _, name = stage.rpartition(".")
            watch(os if owner else checkpoint, name)

    return install


def same_values(one: Any, other: Any) -> bool:
    """Whether nested plain values and tensors are the same, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_values, one, other))
    return bool(one == other)


def differences(folder: Path, reference: Path) -> list[str]:
    """What a run came to otherwise than the undisturbed one: weights, optimizer, generators, metrics, result."""
    found = []
    for name in ("last", "best"):
        one, other = (reader.read_checkpoint(path / "checkpoints" / f"{name}.ckpt") for path in (folder, reference))
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "progress", "ranks")
        found += [f"{name}.ckpt {part}" for part in parts if not same_values(one[part], other[part])]
    one, other = (
        {key: value for key, value in json.loads((path / "result.json").read_text()).items() if key not in NOT_NUMBERS}
        for path in (folder, reference)
    )
    found += [f"result.json {key}" for key in one if one[key] != other[key]]
    if measured(folder) != measured(reference):
        found.append("metrics")
    return found


def measured(folder: Path) -> dict[tuple[str, int], set[float]]:
    """Every value that a journal has for a metric and step, but times."""
    values: dict[tuple[str, int], set[float]] = {}
    for event in read_journal(folder):
        if event["event"] == "metrics":
            for name, value in event["values"].items():
                if not name.startswith("time/"):
                    values.setdefault((name, event["step"]), set()).add(value)
    return values
