"""Engines of a sweep where they are not installed; what they do where they are is in tests/cluster."""

from pathlib import Path

import pytest
from conftest import assert_refused, train_py
from hydra import compose, initialize_config_dir
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from gaplab import config as configs
from gaplab import worker

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
