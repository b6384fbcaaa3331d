"""Engines of a sweep where they are not installed; what they do where they are is in tests/cluster."""

import multiprocessing
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import assert_refused, composed, train_py
from hydra import compose, initialize_config_dir
from joblib import Parallel, delayed
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from gaplab import config as configs
from gaplab import machine, sweep, worker
from hydra_plugins import gaplab_fused, gaplab_ray

REFUSED = {
    "hydra/launcher=ray": "hydra/launcher=ray: Ray is not installed; install it with pip install -e '.[ray]'",
    "hydra/launcher=slurm": "hydra/launcher=slurm: no sbatch here; type it on a machine that submits to Slurm",
    "hydra/launcher=slurm hydra.launcher.timeout_min=0": "hydra.launcher.timeout_min=0: must be 1 or more",
    "hydra/launcher=slurm hydra.launcher.partitions=a": 'no such key in hydra.launcher; did you mean "partition"?',
    "hydra/launcher=ray hydra.launcher.num_cpus=many": "hydra.launcher.num_cpus: Value 'many' of type 'str' could not",
}


@pytest.mark.parametrize("words", REFUSED)
def test_an_engine_that_is_not_there_is_told_in_one_line(words: str, tmp_path: Path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ray'] = None")  # as where it is not installed
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    outputs = tmp_path / "outputs"
    assert_refused(train_py("-m", "seed=0,1", *words.split(), f"paths.outputs={outputs}"), REFUSED[words])
    assert not outputs.exists()


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_every_key_of_an_engine_has_a_value(engine: str):
    with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
        launcher = compose("train", [f"hydra/launcher={engine}"], return_hydra_config=True).hydra.launcher
    assert launcher._target_.startswith(f"hydra_plugins.gaplab_{engine}.")
    assert {name for name in launcher if launcher[name] == "???"} == set()


def test_a_slurm_job_is_no_rank_of_lightnings(run, monkeypatch):
    for name, value in {"NTASKS": "2", "JOB_ID": "7", "PROCID": "1", "LOCALID": "1", "NODEID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    seen = []
    build = worker._trainer
    monkeypatch.setattr(worker, "_trainer", lambda *words: seen.append(build(*words)) or seen[0])
    result, _ = run("trainer.max_epochs=1")
    assert result["status"] == "FINISHED"
    assert isinstance(seen[0]._accelerator_connector.cluster_environment, LightningEnvironment)


@pytest.fixture
def environment(monkeypatch):
    """A copy of the environment variables, with two GPUs to be seen."""
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "4,7"})
    return os.environ


def test_the_processes_of_a_sweep_take_the_gpus_in_turn(environment, monkeypatch):
    machine.share_gpus(2)
    seen = []
    for name in ("LokyProcess-1", "LokyProcess-2", "LokyProcess-3", "MainProcess"):
        environment["CUDA_VISIBLE_DEVICES"] = "4,7"
        monkeypatch.setattr(machine.multiprocessing, "current_process", lambda name=name: SimpleNamespace(name=name))
        machine.take_a_gpu()
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
    assert seen == ["7", "4", "7", "4,7"]


def test_the_processes_of_joblib_have_numbers():
    def name():
        return multiprocessing.current_process().name

    assert all(one.rpartition("-")[2].isdecimal() for one in Parallel(2, "loky")(delayed(name)() for _ in range(4)))


def test_a_sweep_shares_gpus_unless_its_jobs_take_several(environment, monkeypatch):
    monkeypatch.setattr(configs, "cuda_devices", lambda: 2)
    launcher = SimpleNamespace(launch=lambda *_, **__: [])
    one, two = composed(), composed("data.batch_size=64")
    two.trainer.devices = 2
    sweep._launch(launcher, [])
    jobs = [SimpleNamespace(folder=Path(), config=one), SimpleNamespace(folder=Path(), config=two)]
    for waiting, shared in ((jobs, None), (jobs[:1], "4,7")):
        with suppress(ValueError):  # the launcher returns nothing
            sweep._launch(launcher, waiting)
        assert environment.get(machine.GPUS) == shared
    assert gaplab_fused._processes([one, one, one]) == 2


def test_a_ray_job_that_asked_for_no_gpu_sees_none(environment, monkeypatch):
    monkeypatch.setattr(sweep, "run_saved", lambda folder: None)
    gaplab_ray._run("a job", without_gpu=False)
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,7"
    gaplab_ray._run("a job", without_gpu=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
