"""A run that was stopped, killed or damaged goes on, and comes to what the undisturbed one does, to the bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, assert_refused, composed, train_py
from killing import die_at_stage, differences, run_forked, wait_for

from gaplab import config as configs
from gaplab import interrupt, launch
from gaplab.analysis.runs import read_run
from gaplab.data.datamodule import DataModule
from gaplab.errors import UserError
from gaplab.files import held
from gaplab.tracking.journal import read_journal
from gaplab.training.checkpoint import newest_checkpoint
from gaplab.training.classifier import Classifier
from gaplab.training.reader import read_checkpoint

RUN = [
    *SMALL, "model.bn=true", "model.dropout=0.3", "data.augment=crop_flip", "data.batch_size=40", "scheduler=one_cycle",
    "trainer.max_epochs=3", "trainer.early_stopping=2", "trainer.log_activations_every=10", "trainer.threads=1",
]  # fmt: skip
STEPS = 25  # an epoch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "run"
    launch.launch(composed(*RUN), folder)
    return folder


def stopped_at(step: int, folder: Path, monkeypatch, signum: signal.Signals = signal.SIGTERM, *more: str) -> None:
    """A run that is told to stop in its `step`-th step."""
    original = Classifier.end_step

    def end_step(self, *words) -> None:
        if self.at.steps + 1 == step:
            signal.raise_signal(signum)
        original(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "end_step", end_step)
        with pytest.raises(interrupt.Interrupted) as stop:
            launch.launch(composed(*RUN, *more), folder)
    assert stop.value.exit_status == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "KILLED"
    assert min(result["times"].values()) >= 0
    assert list(read_journal(folder))[-1]["status"] == "KILLED"


def test_a_run_that_seldom_evaluates_the_train_split_goes_on_the_same(tmp_path, monkeypatch):
    words = [*RUN, "metrics.train_every=2", "trainer.max_epochs=5"]
    launch.launch(composed(*words), tmp_path / "undisturbed")
    stopped_at(STEPS + 12, tmp_path / "run", monkeypatch, signal.SIGTERM, *words[len(RUN) :])
    launch.resume(composed(f"resume={tmp_path / 'run'}"), [f"resume={tmp_path / 'run'}"])
    assert differences(tmp_path / "run", tmp_path / "undisturbed") == []


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 12, 3 * STEPS])
def test_a_run_stopped_at_any_step_goes_on_there(step: int, undisturbed, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    stopped_at(step, folder, monkeypatch, signal.SIGTERM if step % 2 else signal.SIGINT)
    progress = read_checkpoint(folder / "checkpoints" / "last.ckpt")["progress"]
    assert progress["epochs"] * STEPS + progress["batches"] == step == progress["steps"]
    result = launch.launch(composed(*RUN), folder)
    assert differences(folder, undisturbed) == []
    assert result.status == "FINISHED"
    assert [*read_run(folder).history["gap/acc"]] == [1, 2, 3]
    assert f"going on from last.ckpt, after {progress['epochs']} epochs and " in capsys.readouterr().out


def test_a_run_stopped_while_it_is_evaluated_evaluates_again(undisturbed, tmp_path, monkeypatch):
    original = DataModule.labelled
    calls = []

    def labelled(self, name: str, shared: bool):
        calls.append(name)
        for batch in original(self, name, shared):
            if calls == ["train", "valid", "train"]:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(DataModule, "labelled", labelled)
        with pytest.raises(interrupt.Interrupted):
            launch.launch(composed(*RUN), folder)
    assert calls == ["train", "valid", "train"]
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["progress"]["batches"] == STEPS
    launch.launch(composed(*RUN), folder)
    assert differences(folder, undisturbed) == []


def test_accumulated_gradients_are_never_divided(tmp_path, monkeypatch):
    more = ("trainer.accumulate_grad_batches=4", "data.train_size=990")
    launch.launch(composed(*RUN, *more), tmp_path / "undisturbed")
    stopped_at(9, tmp_path / "run", monkeypatch, signal.SIGTERM, *more)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["progress"]["batches"] == 8
    launch.launch(composed(*RUN, *more), tmp_path / "run")
    assert differences(tmp_path / "run", tmp_path / "undisturbed") == []


def test_float64_goes_on_to_the_same_bits_too(tmp_path, monkeypatch):
    launch.launch(composed(*RUN, "trainer.precision=64-true"), tmp_path / "undisturbed")
    stopped_at(5, tmp_path / "run", monkeypatch, signal.SIGTERM, "trainer.precision=64-true")
    launch.launch(composed(*RUN, "trainer.precision=64-true"), tmp_path / "run")
    assert differences(tmp_path / "run", tmp_path / "undisturbed") == []


def test_a_signal_between_two_chunks_without_an_optimizer_step_is_saved_too(tmp_path, monkeypatch):
    more = ("trainer.accumulate_grad_batches=20", "trainer.chunk_size=5")
    original = Classifier.count_up
    calls = []

    def count_up(self) -> None:
        original(self)
        calls.append(self.at.batches)
        if len(calls) == 2:  # ten of twenty mini-batches
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "count_up", count_up)
        with pytest.raises(interrupt.Interrupted):
            launch.launch(composed(*RUN, *more), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["progress"]["batches"] == 20


def test_a_long_epoch_is_saved_within_and_only_within_reason(tmp_path, monkeypatch):
    saved = []
    original = Classifier.on_save_checkpoint
    monkeypatch.setattr(
        Classifier,
        "on_save_checkpoint",
        lambda self, checkpoint: (original(self, checkpoint), saved.append(checkpoint["progress"]["batches"])),
    )
    launch.launch(composed(*RUN, "checkpoint.every_s=1e-9", "trainer.max_epochs=1"), tmp_path / "often")
    assert saved == [*range(1, STEPS + 1), 0]  # best.ckpt at the end, which becomes last.ckpt, too
    saved.clear()
    launch.launch(composed(*RUN, "trainer.max_epochs=1"), tmp_path / "rarely")
    assert saved == [0]


@pytest.mark.parametrize("stage", [2, 9, 16, 23, 30])
def test_a_run_killed_in_a_save_goes_on(stage: int, undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert wait_for(run_forked(composed(*RUN), folder, die_at_stage(stage))) == -signal.SIGKILL
    assert wait_for(run_forked(composed(*RUN), folder)) == 0
    assert differences(folder, undisturbed) == []


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_told_and_the_older_one_taken(undisturbed, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    stopped_at(2 * STEPS + 5, folder, monkeypatch)
    checkpoints = folder / "checkpoints"
    flip_a_bit(checkpoints / "last.ckpt")
    path, wrong = newest_checkpoint(checkpoints)
    assert path == checkpoints / "previous.ckpt"
    assert len(wrong) == 1
    assert "last.ckpt: damaged" in wrong[0]
    launch.launch(composed(*RUN), folder)
    out = capsys.readouterr().out
    assert "last.ckpt: damaged" in out
    assert "going on from previous.ckpt, after 2 epochs" in out
    assert differences(folder, undisturbed) == []


@pytest.mark.parametrize("names", [("last.ckpt", "previous.ckpt"), ("best.ckpt",)])
def test_without_any_readable_checkpoint_training_begins_anew(names, undisturbed, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    stopped_at(2 * STEPS + 5, folder, monkeypatch)
    for name in names:
        flip_a_bit(folder / "checkpoints" / name)
    launch.launch(composed(*RUN), folder)
    assert "no checkpoint can be read: training begins anew" in capsys.readouterr().out
    assert differences(folder, undisturbed) == []


def test_other_data_and_another_network_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stopped_at(STEPS + 1, folder, monkeypatch)
    with pytest.raises(UserError, match=r"last\.ckpt: of another network than the config's \(network\."):
        launch.launch(composed(*RUN, "model.hidden_dims=[7]"), folder)
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    checkpoint["hyper_parameters"]["data"] = "0" * 16
    torch.save(checkpoint, path)
    path.with_name("last.ckpt.sha256").unlink()
    with pytest.raises(UserError, match=r"data\.root: the data are not those that "):
        launch.launch(composed(*RUN), folder)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    original = Classifier.count_up

    def count_up(self) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        original(self)

    monkeypatch.setattr(Classifier, "count_up", count_up)
    with pytest.raises(interrupt.Interrupted):
        launch.launch(composed(*RUN), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "KILLED"


def test_a_run_is_held_by_one_process(tmp_path, undisturbed):
    with held(tmp_path, "mine"), pytest.raises(UserError, match="this run is going on in another process"):
        launch.launch(composed(*RUN), tmp_path)


def test_sigterm_ends_the_command_with_its_status_and_a_checkpoint(tmp_path: Path, monkeypatch):
    step = Classifier.training_step

    def told(self, chunk, batch_idx):
        if self.current_epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, chunk, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", told)
    done = train_py(*SMALL, f"paths.outputs={tmp_path}")
    assert done.returncode == 143
    assert done.stderr == "interrupted\n"
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "KILLED"
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["epoch"] == 1


@pytest.mark.full
def test_sigterm_ends_a_run_in_time_and_resume_goes_on_in_mlflow_too(tmp_path: Path, capsys):
    keys = ["trainer.max_epochs=60", "data.train_size=2000", "figures=false", "trainer.threads=1", "model.dropout=0.1"]
    keys += ["tracking.log_model=false"]
    process = subprocess.Popen(
        [sys.executable, str(configs.PROJECT / "src" / "train.py"), *keys, f"paths.outputs={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch 2/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    _, error = process.communicate()
    seconds = time.monotonic() - begin
    assert process.returncode == 143
    assert error.splitlines() == ["stopping, with a checkpoint; once more stops at once", "interrupted"]
    assert seconds < 5
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "KILLED"
    launch.resume(composed("resume=latest", f"paths.outputs={tmp_path}"), [])
    assert "going on from last.ckpt, after " in capsys.readouterr().out
    from mlflow import MlflowClient

    result = json.loads((folder / "result.json").read_text())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(result["run_id"]).info.status == "FINISHED"
    assert len(client.search_runs(["1"])) == 1
    for name in ("gap/acc", "time/epoch_s", "lr"):
        history = client.get_metric_history(result["run_id"], name)
        assert [metric.step for metric in history] == list(range(1, 61)), name
    again = train_py(
        f"resume={folder}", f"paths.outputs={tmp_path}"
    )  # as it was said to be typed; a second in which nothing heavy is imported
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.endswith(" is finished\n")


WRONG = {
    "resume=latest": "no run in ",
    "resume=nowhere": "nowhere: no run there (no config.yaml), nor in ",
    "resume=latest seed=1": "resume: goes on with the run's own config, so seed=1 cannot be said",
    "-m resume=latest seed=0,1": "resume: of a single run; a sweep goes on with sweep.resume=latest",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_be_gone_on_with_is_told(arguments: str, tmp_path: Path):
    done = train_py(*arguments.split(), f"paths.outputs={tmp_path / 'outputs'}", cwd=tmp_path)
    assert_refused(done, WRONG[arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["model.dropout=0.5", "seed=7", "data.label_noise=0.5", "optimizer.lr=0.1"])
def test_a_config_that_was_edited_after_training_began_is_refused(word, tmp_path):
    folder = tmp_path / "runs" / "one"
    (folder / "checkpoints").mkdir(parents=True)
    event = {"time": 0, "event": "params", "values": {k: str(v) for k, v in configs.flatten(composed()).items()}}
    (folder / "journal.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "config.yaml").write_text(configs.to_yaml(composed(word)))
    words = [f"resume={folder}"]
    launch.refuse(composed(*words), words)  # without a checkpoint, training begins anew
    (folder / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match=rf"config.yaml: {word.partition('=')[0]} was edited to .* been trained with"):
        launch.refuse(composed(*words), words)
    (folder / "config.yaml").write_text(configs.to_yaml(composed("trainer.max_epochs=77", "data.eval_batch_size=64")))
    launch.refuse(composed(*words), words)
