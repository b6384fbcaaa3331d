"""Whole runs: reproducible, chunk-independent, counted right, and failing as they should."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, composed
from networks import Pretrained

import gaplab
from gaplab import config as configs
from gaplab import launch, worker
from gaplab.data.loader import EpochOrder
from gaplab.errors import TrainingError, UserError
from gaplab.nn.build import build_network
from gaplab.result import PHASES
from gaplab.training.classifier import Classifier
from gaplab.training.gap import predict

TIMES = {"run_id", "fit_s", "total_s", "steps_per_s", "times", "condition", "config_hash"}
TOGGLES = ["model.bn=true", "model.dropout=0.3", "data.augment=crop_flip", "data.label_noise=0.1", "data.batch_size=96"]


def untimed(result):
    return {name: value for name, value in result.items() if name not in TIMES}


def weights(folder: Path, name: str = "last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_same_seed_gives_the_same_bits_whatever_the_chunk_size(run):
    first, one = run(*TOGGLES)
    second, two = run(*TOGGLES)
    other, three = run(*TOGGLES, "trainer.chunk_size=3")
    assert untimed(first) == untimed(second) == untimed(other)
    assert same(weights(one), weights(two))
    assert same(weights(one), weights(three))
    assert first["condition"] == second["condition"]
    third, four = run(*TOGGLES, "seed=1")
    assert not same(weights(one), weights(four))
    assert third["condition"] == first["condition"]
    assert third["config_hash"] != first["config_hash"]


@pytest.mark.parametrize(
    "model",
    [
        ["model=mlp", "model.hidden_dims=[32]", "model.dropout=0.5", "data.label_noise=0.5"],
        ["model=cnn", "model.widths=[4]", "model.hidden_dims=[16]"],
        ["model=resnet", "model.depth=8", "model.widths=[4,4,4]"],
    ],
    ids=["mlp", "cnn", "resnet"],
)
def test_accuracies_equal_an_independent_count_from_the_files_to_the_sample(run, digits, model):
    result, folder = run(*model, "model.bn=true")
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    hyper_parameters = checkpoint["hyper_parameters"]
    network = build_network(hyper_parameters["model"], hyper_parameters["in_shape"], hyper_parameters["num_classes"])
    network.load_state_dict({name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()})
    raw = Path(composed().data.root) / "MNIST" / "raw"
    images = torch.from_numpy(np.fromfile(raw / "train-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 1, 28, 28))
    labels = torch.from_numpy(np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8)[8:].astype(np.int64))
    with torch.no_grad():
        for split, indices in np.load(folder / "splits.npz").items():
            correct = int((network.eval()(images[indices]).argmax(1) == labels[indices]).sum())
            clean = "_clean" if f"{split}_acc_clean" in result["best"] else ""  # of the run under label noise
            assert correct == round(result["best"][f"{split}_acc{clean}"] * len(indices)), split


def test_result_holds_what_the_contract_says(run):
    result, folder = run("model.bn=true", "trainer.max_epochs=3", "data.batch_size=64", "trainer.early_stopping=1")
    assert (result["status"], result["seed"], result["device"]) == ("FINISHED", composed().seed, "cpu")
    assert result["steps"] == 16 * result["epochs"]
    assert result["params"] == 67722
    for part in (result, result["best"]):
        assert part["gap_acc"] == part["train_acc"] - part["valid_acc"]
        assert part["gap_acc_low"] < part["gap_acc"] < part["gap_acc_high"]
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    valid = [
        line["values"]["valid/acc"] for line in lines if line["event"] == "metrics" and "valid/acc" in line["values"]
    ]
    assert result["best"]["epoch"] == 1 + valid.index(max(valid))
    assert result["valid_acc"] == valid[-1]
    epochs = {"last": result["epochs"], "best": result["best"]["epoch"]}
    for name, epoch in epochs.items():
        assert torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"] == epoch - 1
    assert 0.3 < result["test_acc"] < 1  # chance is 0.1


def test_the_running_accuracy_is_another_figure_and_not_the_gaps(run):
    result, _ = run("model.dropout=0.5", "model.hidden_dims=[64]", "trainer.max_epochs=4", "optimizer.lr=0.003")
    assert result["train_acc_running"] < result["train_acc"] - 0.03  # it is 0.15 lower, for any seed
    assert result["gap_acc"] == result["train_acc"] - result["valid_acc"]


def test_accumulated_gradients_of_equal_batches_are_those_of_one_large_batch(run):
    keys = ["trainer.precision=64-true", "optimizer=sgd", "optimizer.momentum=0", "data.train_size=960"]
    whole, one = run(*keys, "data.batch_size=96")
    parts, two = run(*keys, "data.batch_size=24", "trainer.accumulate_grad_batches=4")
    assert whole["steps"] == parts["steps"] == 20
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[name], rtol=0, atol=1e-9)


def test_clipping_bounds_the_step(run):
    _, folder = run("optimizer=sgd", "optimizer.momentum=0", "optimizer.lr=1", "trainer.gradient_clip_val=1e-4")
    start = build_network(asdict(composed().model), (1, 28, 28), 10, composed().seed).body.state_dict()
    end = weights(folder)
    moved = sum(float((end[f"network.body.{name}"] - value).square().sum()) for name, value in start.items()) ** 0.5
    assert 0 < moved <= 16 * 1e-4 * 1.001  # 16 steps


def test_bf16_sees_the_weights_of_every_step_whatever_the_chunk_size(run):
    keys = ["trainer.precision=bf16-mixed", "model.hidden_dims=[32]", "optimizer.lr=0.01"]
    small, one = run(*keys, "trainer.chunk_size=1")
    large, two = run(*keys, "trainer.chunk_size=50")
    assert same(weights(one), weights(two))
    assert small["train_acc"] == large["train_acc"] > 0.3  # chance is 0.1


def test_a_non_finite_loss_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    config = composed(*SMALL, f"paths.outputs={tmp_path}", "optimizer=sgd", "optimizer.lr=1e30", "data.batch_size=100")
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+ \(epoch 1\)"):
        launch.launch(config, folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "FAILED"
    assert "the loss is" in result["error"]
    last = json.loads((folder / "journal.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"]) == ("finish", "FAILED")


def test_the_checkpoint_from_before_a_non_finite_loss_stays(tmp_path, monkeypatch):
    original = Classifier.training_step

    def poisoned(self, chunk, batch_idx):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.network.body.head.weight.fill_(float("nan"))
        return original(self, chunk, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"the loss is nan at step 9 \(epoch 2\)"):
        launch.launch(composed(*SMALL, f"paths.outputs={tmp_path}"), folder)
    assert all(value.isfinite().all() for value in weights(folder).values())
    assert json.loads((folder / "result.json").read_text())["epochs"] == 1


def test_an_error_of_the_users_own_network_is_one_line_with_the_traceback_in_the_folder(tmp_path):
    folder = tmp_path / "run"
    config = composed(*SMALL, f"paths.outputs={tmp_path}", "model=custom", "model._target_=torch.nn.Flatten")
    config.model.kwargs = {"start_dim": 9}
    with pytest.raises(TrainingError, match=r"IndexError: .* \(traceback in .*error\.log\)"):
        launch.launch(config, folder)
    assert "Traceback" in (folder / "error.log").read_text()
    assert json.loads((folder / "result.json").read_text())["status"] == "FAILED"


def test_a_model_that_diverges_in_the_last_step_is_not_saved(tmp_path):
    folder = tmp_path / "run"
    keys = ["data.train_size=100", "optimizer=sgd", "optimizer.lr=1e38", "trainer.max_epochs=1"]
    with pytest.raises(TrainingError, match=r"the loss after epoch 1 \(step 1\) is not finite"):
        launch.launch(composed(*SMALL, f"paths.outputs={tmp_path}", *keys), folder)
    assert list((folder / "checkpoints").iterdir()) == []
    assert json.loads((folder / "result.json").read_text())["status"] == "FAILED"


def test_every_epoch_has_an_order_of_its_own(run, monkeypatch):
    orders = []
    original = EpochOrder.order
    monkeypatch.setattr(EpochOrder, "order", lambda self: orders.append((self.epoch, original(self))) or orders[-1][1])
    run("trainer.max_epochs=3")
    assert [epoch for epoch, _ in orders] == [0, 1, 2]
    assert not torch.equal(orders[0][1], orders[1][1])
    assert torch.equal(orders[0][1].sort().values, orders[1][1].sort().values)


def test_the_logged_rate_is_the_one_of_the_epochs_last_step(run):
    _, folder = run("scheduler=step", "scheduler.step_size=1", "scheduler.gamma=0.5", "optimizer.lr=0.01")
    events = [
        json.loads(line)["values"] for line in (folder / "journal.jsonl").read_text().splitlines() if '"lr"' in line
    ]
    assert [values["lr"] for values in events] == [0.01, 0.005]


def test_one_sample_left_over_is_dropped_under_batchnorm_with_a_word(run, caplog):
    result, _ = run("model.bn=true", "data.train_size=129", "data.batch_size=128")
    assert result["steps"] == 2
    assert "each epoch's last training batch has one sample" in caplog.text
    result, _ = run("model.bn=false", "data.train_size=129", "data.batch_size=128")
    assert result["steps"] == 4


@pytest.mark.parametrize("normalize", ["none", "center", "standardize", "binary"])
def test_normalization_kinds_are_in_the_checkpoint(run, normalize):
    _, folder = run(f"data.normalize={normalize}", "trainer.max_epochs=1")
    found = weights(folder)
    mean, std = float(found["network.normalize.mean"]), float(found["network.normalize.std"])
    assert (mean == 0) == (normalize in ("none", "binary"))
    assert (std == 1) == (normalize != "standardize")
    assert bool(found["network.normalize.binary"]) == (normalize == "binary")


def test_lsuv_starts_from_unit_outputs(run):
    result, _ = run("model.init=lsuv", "trainer.max_epochs=1")
    assert result["train_acc"] > 0.3  # chance is 0.1


def test_pictures_of_ones_own_train_the_same_resident_or_streamed(run, picture_folder):
    keys = [f"data.root='{picture_folder}'", "data.train_size=null", "data.valid_size=16", "data.batch_size=8"]
    keys += [
        "data=image_folder",
        "data.image_size=16",
        "data.workers=0",
        "model=cnn",
        "model.widths=[4,8]",
        "model.bn=true",
    ]
    resident, _ = run(*keys)
    streamed, _ = run(*keys, "data.memory_budget_gb=0")
    assert untimed(resident) == untimed(streamed)
    assert resident["train_acc"] > 0.8
    assert resident["test_acc"] is None


def test_a_test_loss_that_is_not_finite_leaves_a_result_without_one(run, monkeypatch):
    def predicted(network, batches):
        logits, labels = predict(network, batches)
        return logits.index_fill(0, torch.tensor([0]), float("nan")), labels

    monkeypatch.setattr(worker, "predict", predicted)
    result, folder = run()
    assert result["status"] == "FINISHED"
    assert result["test_loss"] is None
    assert 0.3 < result["test_acc"] < 1
    assert '"nonfinite/test/loss": ' in (folder / "journal.jsonl").read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.threads=1024"], r"trainer\.threads=1024: at most \d+ here, 8 a core"),
        (["model.hidden_dims=[100000000]"], r"model=mlp: 79,500,000,010 parameters .* need 1,\d\d\d\.\d GB"),
        (["model=cnn", "model.widths=[4,4000000]"], r"model=cnn: .* GB of memory or more"),
        (["model=cnn", "model.widths=[1000000000,1000000000]"], r"model\._target_=gaplab.nn.cnn.CNN: cannot be"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_before_it_is_tried(run, monkeypatch, overrides, said):
    monkeypatch.setattr(worker, "memory", lambda: 10**11)
    with pytest.raises(UserError, match=said):
        run(*overrides)


def test_running_out_of_memory_is_one_line(run, monkeypatch):
    def exhausted(*_):
        torch.empty(2**60)

    monkeypatch.setattr(Classifier, "training_step", exhausted)
    with pytest.raises(TrainingError, match=r"^out of memory; a smaller network, data\.batch_size or"):
        run()


def test_the_times_of_a_run_add_up_and_are_shown_on_request(run, capsys):
    result, folder = run("trainer.profile=true")
    times = result["times"]
    assert set(times) == PHASES.keys() - {"rest"}
    assert all(seconds >= 0 for seconds in times.values())
    assert sum(times.values()) - times["compose"] <= result["total_s"]
    assert times["steps"] + times["evaluation"] + times["checkpoints"] <= result["fit_s"]
    shown = capsys.readouterr().out
    assert all(f"  {phase} " in shown for phase in PHASES)
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    logged = next(event["values"] for event in events if "time/data_s" in event.get("values", {}))
    assert all(logged[f"time/{phase}_s"] == times[phase] for phase in ("data", "steps", "evaluation"))
    plain, _ = run()
    assert plain["condition"] == result["condition"]
    assert "where the time went" not in capsys.readouterr().out


def test_a_users_pretrained_network_is_trained_as_it_was_built_and_its_frozen_part_stays(tmp_path, capsys):
    own = ["model=custom", "model._target_=networks.Pretrained", "data.train_size=129", "optimizer.weight_decay=0.1"]
    allowed = "allowed_targets=[gaplab,torch,torchvision,networks]"
    launch.launch(gaplab.compose(*SMALL, f"paths.outputs={tmp_path}", *own, allowed), tmp_path / "run")
    said = capsys.readouterr().out
    assert "weights  as the network's constructor leaves them (model.init=default); 126 of 6,422 parameters" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2  # of 128 samples: BatchNorm of its own takes no mini-batch of one
    assert result["notes"][0].startswith("few optimizer steps: after 2 mini-batches")
    assert "note: few optimizer steps" in said.partition("epoch 1/2")[0]
    as_built, trained = Pretrained((1, 28, 28), 10).backbone.state_dict(), weights(tmp_path / "run")
    for name, value in as_built.items():
        if name != "1.bias":  # drawn by the constructor
            assert torch.equal(trained[f"network.body.backbone.{name}"], value), name


def test_a_network_without_anything_to_train_is_refused(tmp_path):
    own = ["model=custom", "model._target_=networks.Pretrained", "+model.kwargs.frozen=true"]
    allowed = "allowed_targets=[gaplab,torch,torchvision,networks]"
    with pytest.raises(UserError, match="model=custom: all of its parameters are frozen, there is nothing to train"):
        launch.launch(gaplab.compose(*SMALL, f"paths.outputs={tmp_path}", *own, allowed), tmp_path / "run")


def test_a_run_whose_splits_are_others_than_before_is_not_resumed(run):
    _, folder = run("trainer.max_epochs=1")
    kept = dict(np.load(folder / "splits.npz"))
    np.savez(folder / "splits.npz", **kept | {"train": kept["train"] + 1})
    with pytest.raises(UserError, match="trained on other samples than its config selects now"):
        launch.launch(configs.load(folder / "config.yaml"), folder)
    assert np.array_equal(np.load(folder / "splits.npz")["train"], kept["train"] + 1)
