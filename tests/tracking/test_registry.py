"""A model as MLflow has it: what goes in, what comes out, which version is champion."""

import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import composed, sent

from gaplab import config as configs
from gaplab import export, launch
from gaplab.config import MLflow
from gaplab.errors import UserError
from gaplab.tracking.journal import Tracker, read_journal, read_receipt
from gaplab.tracking.registry import Registry, download, fetch

KEYS = ["model=cnn", "model.widths=[4,8]", "model.hidden_dims=[16]", "model.bn=true", "model.dropout=0.2"]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run whose model is logged: its folder, the store, MLflow's id of it."""
    home = tmp_path_factory.mktemp("outputs")
    keys = ["trainer.max_epochs=1", "data.train_size=500", "data.valid_size=200", "figures=false", *KEYS]
    config = composed(f"paths.outputs={home}", "trainer.accelerator=cpu", *keys)
    launch.launch(config, home / "runs" / "one")
    sent(home / "runs" / "one")
    return home / "runs" / "one", config.tracking.uri, read_receipt(home / "runs" / "one")["run_id"]


@pytest.fixture(scope="module")
def model(logged, tmp_path_factory):
    """The model as it comes back: a module, and its folder."""
    _, uri, run_id = logged
    found = Registry(uri, "gaplab").logged(run_id)
    module, path, origin = fetch(f"models:/{found}", uri, tmp_path_factory.mktemp("model"))
    assert origin == run_id
    return module, path


@pytest.mark.parametrize("size", [1, 2, 7, 256])
def test_any_number_of_pictures_gets_the_networks_own_answers(logged, model, size):
    folder, _, _ = logged
    network, _ = export.best_network(folder, configs.load(folder / "config.yaml"))
    images = torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        found = model[0](images)
        expected = network(images).softmax(1)
    assert found.dtype == torch.float32
    assert found.shape == (size, 10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_it_says_what_it_takes_and_gives_and_needs(logged, model):
    folder, _, run_id = logged
    from mlflow.models import Model

    about = Model.load(str(model[1]))
    assert about.run_id == run_id
    taken, given = about.signature.inputs.inputs[0], about.signature.outputs.inputs[0]
    assert (taken.type, taken.shape) == (np.dtype("uint8"), (-1, 1, 28, 28))
    assert (given.type, given.shape) == (np.dtype("float32"), (-1, 10))
    example = about.load_input_example(str(model[1]))
    assert np.array_equal(example, np.load(folder / "example.npy"))
    needed = (model[1] / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in needed
    assert all("==" in one for one in needed)


def test_its_card_has_the_figures_of_the_run(logged, model):
    folder, _, _ = logged
    card = (model[1] / "extra_files" / "README.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert f"| validation accuracy | {result['best']['valid_acc']:.4f} |" in card
    assert f"| test accuracy | {result['test_acc']:.4f} |" in card
    low, high = (f"{100 * result['best'][f'gap_acc_{end}']:+.2f}" for end in ("low", "high"))
    assert f"95 % interval {low} to {high} |" in card
    assert "| model.dropout | 0.2 |" in card
    assert "shape (B, 1, 28, 28)" in card
    facts = json.loads((model[1] / "extra_files" / "facts.json").read_text())
    assert (facts["in_shape"], len(facts["classes"]), facts["epoch"]) == ([1, 28, 28], 10, 1)
    (event,) = (one for one in read_journal(folder) if one["event"] == "dataset")
    assert facts["digest"] == event["digest"]
    assert configs.load(model[1] / "extra_files" / "config.yaml").model.dropout == 0.2


@pytest.mark.full
def test_it_needs_nothing_of_gaplab(model, tmp_path):
    program = (
        "import sys, torch, mlflow.pytorch\n"
        "model = mlflow.pytorch.load_model(sys.argv[1])\n"
        "answer = model(torch.zeros(3, 1, 28, 28, dtype=torch.uint8))\n"
        "assert not any(name.startswith('gaplab') for name in sys.modules)\n"
        "print(tuple(answer.shape), round(float(answer.sum()), 4))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(model[1])], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "(3, 10) 3.0\n", done.stderr


def test_the_run_has_ended_before_its_model_is_logged_and_once_is_enough(logged):
    folder, uri, run_id = logged
    words = [event["event"] for event in read_journal(folder)]
    assert words[-4:] == ["finish", "reopen", "model", "close"]
    known = Registry(uri, "gaplab").logged(run_id)
    assert export.log(folder, run_id, list(configs.USUAL_TARGETS), uri) == known
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert [one.model_id for one in run.outputs.model_outputs] == [known]
    shown = {metric.key: metric.value for metric in client.get_logged_model(known).metrics}
    assert shown["gap/acc"] == run.data.metrics["gap/acc"]
    assert shown["test/acc"] == run.data.metrics["test/acc"]


def test_a_network_that_cannot_be_exported_is_told_of_in_one_line(tmp_path, logged, monkeypatch, capsys):
    _, uri, run_id = logged
    monkeypatch.syspath_prepend(str(configs.PROJECT / "tests"))
    keys = ["trainer.max_epochs=1", "data.train_size=200", "data.valid_size=100", "figures=false", "tracking=none"]
    packages = [*configs.USUAL_TARGETS, "networks"]
    own = ["model=custom", "model._target_=networks.Choosy", f"allowed_targets=[{','.join(packages)}]"]
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"paths.outputs={tmp_path}", "trainer.accelerator=cpu", *keys, *own])
    launch.launch(configs.from_hydra(cfg, own), tmp_path / "one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    capsys.readouterr()
    threads = torch.get_num_threads()
    try:
        assert export.main(tmp_path / "one", run_id, packages) == 2
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err.splitlines()[-1]  # what MLflow is told
    assert said.startswith("torch.export cannot take this network")


def test_a_model_that_is_not_logged_is_told_of_in_mlflow_and_the_rest_is_sent(logged, tmp_path):
    from mlflow import MlflowClient

    _, uri, _ = logged
    tracker = Tracker(tmp_path, MLflow(uri=uri), "without a checkpoint", {})
    tracker.finish("FINISHED", 0, model=True)
    sent(tmp_path)
    run = MlflowClient(uri).get_run(read_receipt(tmp_path)["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["model/problem"].endswith("config.yaml: cannot be read (No such file or directory)")


def test_a_run_whose_config_names_other_packages_is_exported_by_who_trusts_them_alone(logged, tmp_path):
    folder, uri, run_id = logged
    other = tmp_path / "run"
    other.mkdir()
    text = (folder / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("gaplab.nn.cnn.CNN", "networks.Choosy"))
    with pytest.raises(UserError, match=r"networks.Choosy: package 'networks' is not in allowed_targets"):
        export.log(other, run_id, ["gaplab", "torch"], uri)


@pytest.fixture
def registry(logged, request):
    """A registered model of its own with three versions, and their numbers."""
    _, uri, run_id = logged
    found = Registry(uri, f"of {request.node.name}")
    model_id = found.logged(run_id)
    first = found.add(model_id, run_id, "the first")
    for _ in range(2):  # a model that is added twice makes one version, so these are made by hand
        found._client.create_model_version(found.name, first.source, run_id, model_id=model_id)
    return found, found.versions()


def test_a_version_is_added_once_and_is_challenger(logged):
    _, uri, run_id = logged
    models = Registry(uri, "once")
    assert models.versions() == []
    one = models.add(models.logged(run_id), run_id, "said of it")
    assert models.add(models.logged(run_id), run_id, "again") == one
    assert (one.number, one.aliases, one.run_id) == (1, ["challenger"], run_id)
    assert models._client.get_model_version("once", "1").description == "said of it"


def test_champions_follow_each_other_and_come_back(registry):
    found, (first, second, third) = registry
    assert found.champion() is None
    for version in (first, second, third):
        found.crown(version)
        assert found.champion().number == version.number
    assert found.roll_back()[1].number == 2
    assert found.roll_back()[1].number == 1
    with pytest.raises(UserError, match="there was no champion before version 1"):
        found.roll_back()
    found.crown(found.version(3))
    assert found.roll_back()[1].number == 1


def test_a_champion_that_was_deleted_does_not_come_back(registry):
    found, (first, second, third) = registry
    for version in (first, second, third):
        found.crown(version)
    found._client.delete_model_version(found.name, "2")
    assert found.roll_back()[1].number == 1


def test_tags_say_what_was_decided(registry):
    found, (first, *_) = registry
    found.describe(first, {"gate": "passed", "gate.reason": "x" * 10_000})
    assert found.version(1).tags["gate"] == "passed"
    assert len(found.version(1).tags["gate.reason"]) < 5000


REFUSED = {
    "models:/nobody@champion": "nobody",
    "models:/once/99": "99",
    "models:/once@nothing": "nothing",
    "models:/m-00000000000000000000000000000000": "not found",
    "gaplab@champion": "not the address of a model",
    "models:/../../etc": "not the address of a model",
    "runs:/abc/model": "not the address of a model",
}


@pytest.mark.parametrize("address", REFUSED)
def test_what_is_not_there_is_named(logged, tmp_path, address):
    _, uri, _ = logged
    with pytest.raises(UserError, match=REFUSED[address]) as caught:
        download(address, uri, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_would_be_unpickled_is_not_loaded(logged, model, tmp_path, monkeypatch):
    import zipfile

    from gaplab.tracking import registry as module

    _, uri, run_id = logged
    copy = tmp_path / "copy"
    shutil.copytree(model[1], copy)
    archive = copy / "data" / "model.pt2"
    with zipfile.ZipFile(model[1] / "data" / "model.pt2") as old, zipfile.ZipFile(archive, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("sample_inputs/model.pt"):
                content = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
            new.writestr(name, content)
    monkeypatch.setattr(module, "download", lambda *_: (copy, run_id))
    with pytest.raises(UserError, match="pickle"):
        fetch("models:/gaplab/1", uri, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["loader_module: evil", "code: code", "data: elsewhere", "no facts", "a pickle"])
def test_a_model_that_brings_its_own_code_is_not_loaded(model, tmp_path, change):
    from gaplab.tracking.registry import _is_ours

    copy = tmp_path / "copy"
    shutil.copytree(model[1], copy)
    assert _is_ours(copy)
    text = (copy / "MLmodel").read_text()
    name = change.partition(":")[0]
    if change == "no facts":
        (copy / "extra_files" / "facts.json").unlink()
    elif change == "a pickle":
        (copy / "data" / "model.pth").touch()
    elif name == "code":
        (copy / "MLmodel").write_text(text.replace("    loader_module:", "    code: code\n    loader_module:"))
    else:
        (copy / "MLmodel").write_text(re.sub(rf"    {name}: .*", f"    {change}", text))
    assert text != (copy / "MLmodel").read_text() or change.startswith(("no", "a "))
    assert not _is_ours(copy)


def test_a_run_that_went_on_has_another_model(logged):
    folder, uri, run_id = logged
    models = Registry(uri, "gaplab")
    known = models.logged(run_id, export.weights_of(folder))
    assert known == models.logged(run_id)
    assert models.logged(run_id, "0" * 64) is None


def test_a_server_that_is_away_is_named_within_seconds():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        Registry("http://127.0.0.1:9", "gaplab").versions()
    assert time.monotonic() - start < 20
