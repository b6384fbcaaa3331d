"""The ranks of a run on several devices, each in a forked process: what they cost beside is a second, not twenty."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from killing import wait_for
from torch.distributed import TCPStore

from gaplab import config as configs
from gaplab import torchrun
from gaplab.result import RunResult


def start_ranks(
    config: configs.Config, folder: Path, before: Callable[[int], None] | None = None
) -> tuple[list[int], TCPStore]:
    """The process ids of the `trainer.devices` ranks of a run in `folder`, each of which first calls `before` with its
    number; and the store where they meet, to be kept until they have ended."""
    scratch = folder / "ranks"
    for path in (folder / "checkpoints", scratch):
        path.mkdir(parents=True, exist_ok=True)
    (scratch / "config.yaml").write_text(configs.to_yaml(config))
    result = RunResult("", "RUNNING", config.seed, "", "")
    job = {"folder": str(folder), "started": 0.0, "output": os.devnull, "result": asdict(result)}
    (scratch / "job.json").write_text(json.dumps(job))
    store = TCPStore("localhost", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    size = config.trainer.devices
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                words |= {"GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
                words |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "test"}
                os.environ.update({name: str(value) for name, value in words.items()})
                if before:
                    before(rank)
                status = torchrun._rank(scratch)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return children, store


def run_ranks(config: configs.Config, folder: Path, size: int) -> dict[str, Any]:
    """The result of a run on `size` devices in `folder`, or what is left of it."""
    config = replace(config, trainer=replace(config.trainer, devices=size))
    children, _store = start_ranks(config, folder)
    statuses = [wait_for(child) for child in children]
    errors = [path.read_text() for path in sorted((folder / "ranks").glob("error-*.json"))]
    assert statuses == [0] * size, errors
    return dict(json.loads((folder / "ranks" / "result.json").read_text()))
