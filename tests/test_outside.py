"""Ranks that torchrun or srun started: gaplab takes part with those that there are."""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, composed
from killing import wait_for
from ranks_forked import run_ranks
from torch.distributed import TCPStore

from gaplab import cli, launch, torchrun, worker
from gaplab import config as configs
from gaplab.errors import UserError
from gaplab.training.reader import read_checkpoint

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
SRUN = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
SRUN |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[7-8]"}


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Puts this process into the place of a rank."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho n7\necho n8\n")
    scontrol.chmod(0o755)

    def started(variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
        path = f"{tmp_path}:{os.environ['PATH']}"
        monkeypatch.setattr(os, "environ", environment | variables | {"PATH": path})

    return started


def test_what_torchrun_started_becomes_devices_and_machines(started):
    started(TORCHRUN)
    assert torchrun.overrides_of_outside([], False) == [
        "trainer.devices=2", "trainer.num_nodes=2", "trainer.rdzv_endpoint=first:29500", "trainer.node_rank=1"
    ]  # fmt: skip
    assert torchrun.is_follower()
    started(TORCHRUN | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    assert torchrun.overrides_of_outside(["trainer.devices=2"], False) == ["trainer.num_nodes=1"]
    assert torchrun.is_outside()
    assert not torchrun.is_follower()


def test_what_srun_started_is_found_by_its_own_variables(started, monkeypatch):
    started(SRUN)
    found = torchrun.overrides_of_outside([], False)
    port = 20_000 + 12 * 8 + 1
    assert found == [
        "trainer.devices=2", "trainer.num_nodes=2", f"trainer.rdzv_endpoint=n7:{port}", "trainer.node_rank=1"
    ]  # fmt: skip
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("3", "1", "4")
    started(SRUN)
    monkeypatch.setattr(configs, "cuda_devices", lambda: 1)  # srun --gpus-per-task=1
    assert "trainer.num_nodes=4" in torchrun.overrides_of_outside([], False)
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("variables", "typed"),
    [
        ({}, []),
        (TORCHRUN | {"WORLD_SIZE": "1"}, []),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, []),  # a batch script without srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, []),
        (SRUN, ["trainer.num_nodes=2", "trainer.node_rank=1"]),  # a task a machine, as docs/scale.md has it
    ],
)
def test_elsewhere_nothing_changes(started, variables, typed):
    started(variables)
    assert torchrun.overrides_of_outside(typed, False) == []
    assert not torchrun.is_outside()


@pytest.mark.parametrize(
    ("variables", "typed", "multirun", "said"),
    [
        (TORCHRUN, [], True, "-m under torchrun: each rank would run the whole sweep"),
        (SRUN, [], True, "-m under srun"),
        (TORCHRUN, ["trainer.devices=4"], False, "trainer.devices=4: torchrun started 4 ranks, 2 a machine"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, [], False, "srun: 3,1 tasks; each machine needs as many"),
    ],
)
def test_what_does_not_fit_is_refused(started, variables, typed, multirun, said):
    started(variables)
    with pytest.raises(UserError, match=said):
        torchrun.overrides_of_outside(typed, multirun)


def test_a_silent_rank_with_an_error_ends_after_the_one_that_names_it(started, monkeypatch, capsys):
    started(TORCHRUN)
    torchrun.overrides_of_outside([], False)
    error = UserError("model.bn=perhaps")
    waited = []

    def others_run(seconds):
        waited.append(seconds)
        monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
        cli.report(error)

    monkeypatch.setattr(cli.time, "sleep", others_run)
    assert cli.report(error) == 2
    assert capsys.readouterr().err == "error: rank 3: model.bn=perhaps\n"
    assert len(waited) == 1
    assert waited[0] >= 5


def fork_ranks(outputs: Path, *words: str, failing: int | None = None) -> list[int]:
    """Two ranks, each through `launch.main` as under torchrun; their exit statuses."""
    store = TCPStore("localhost", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                words_of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
                words_of_torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "GROUP_RANK": 0}
                words_of_torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "test"}
                os.environ.update({name: str(value) for name, value in words_of_torchrun.items()})
                typed = torchrun.overrides_of_outside([], False)
                if rank == failing:

                    def fail(*_):
                        raise ValueError("no such thing")

                    worker.train = fail
                    waited = outputs / f"rank{rank}.waited"
                    clock = vars(time) | {"sleep": lambda seconds, path=waited: path.write_text(str(seconds))}
                    torchrun.time = SimpleNamespace(**clock)
                with (outputs / f"rank{rank}.out").open("w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    launch.main(composed(*SMALL, f"paths.outputs={outputs}", *words, *typed), typed)
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException as error:
                (outputs / f"rank{rank}.error").write_text(f"{type(error).__name__}: {error}")
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return [wait_for(child) for child in children]


WORDS = ["data.batch_size=64", "data.train_size=300", "data.valid_size=100", "trainer.max_epochs=1", "model.bn=true"]


def test_a_run_on_ranks_from_outside_is_that_on_as_many_devices(tmp_path):
    assert fork_ranks(tmp_path, *WORDS, "trainer.threads=1") == [0, 0]
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["device"]) == ("FINISHED", "2 x cpu")
    assert (tmp_path / "rank1.out").read_text() == ""
    run_ranks(composed(*SMALL, *WORDS, "trainer.threads=1"), tmp_path / "inside", 2)
    states = [read_checkpoint(one / "checkpoints" / "last.ckpt")["state_dict"] for one in (folder, tmp_path / "inside")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_first_rank_names_the_one_that_failed(tmp_path):
    assert fork_ranks(tmp_path, *WORDS, failing=1) == [1, 1]
    error = (tmp_path / "rank0.error").read_text()
    assert error.startswith("TrainingError: rank 1: ValueError: no such thing")
    assert not (tmp_path / "rank1.error").exists()
    assert float((tmp_path / "rank1.waited").read_text()) >= 10  # for torchrun ends all with the first that ends
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "FAILED"
    assert "rank 1: " in result["error"]
