"""Runs trained as one come to what they come to alone, and are left behind in the same way."""

import csv
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DIGITS, assert_refused, composed, sent, train_py

from gaplab import config as configs
from gaplab import fusing, interrupt, launch, sweep, trial, worker
from gaplab import together as together_module
from gaplab.analysis.report import report
from gaplab.data.datamodule import build_datamodule
from gaplab.training.reader import read_checkpoint
from hydra_plugins import gaplab_fused

SMALL = ["tracking=none", "figures=false", "data.train_size=400", "data.valid_size=200", "data.batch_size=64"]
SMALL += ["trainer.max_epochs=2", "trainer.threads=1", "trainer.accelerator=cpu"]
SMALL += [f"data.root={DIGITS}", "data.num_train=4000"]
EXACT = ["trainer.precision=64-true"]
FLOATS = ("train_loss", "valid_loss", "test_loss")
COUNTS = (
    "train_acc",
    "train_acc_clean",
    "gap_acc_clean",
    "valid_acc",
    "test_acc",
    "gap_acc",
    "train_acc_running",
    "epochs",
    "steps",
    "params",
    "status",
)


def saved(folder: Path, *jobs: list[str]) -> list[Path]:
    """The folders of a sweep's jobs, as `sweep.sweep` leaves them before it starts them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, words in enumerate(jobs):
        config = composed(*SMALL, f"paths.outputs={folder.parents[1]}", *words)
        made.append(sweep.Job(folder / f"{number}_job", words, config))
    sweep._save(folder, made, [])
    return [job.folder for job in made]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def alone(folder: Path, *jobs: list[str]) -> list[dict]:
    folders = saved(folder, *jobs)
    for one in folders:
        sweep.run_saved(one, in_here=True)
    return [result(one) for one in folders]


def together(folder: Path, *jobs: list[str]) -> tuple[list[dict], dict]:
    folders = saved(folder, *jobs)
    problems = sweep.run_together(folders)
    return [result(one) for one in folders], problems


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert {name: one[name] for name in COUNTS} == {name: other[name] for name in COUNTS}
        assert {name: one[name] for name in FLOATS} == pytest.approx({name: other[name] for name in FLOATS}, abs=1e-9)
        assert {**one["best"]} == pytest.approx(other["best"], abs=1e-9)


VARIED = {
    "seeds and rates": (["model.bn=true"], ["optimizer.lr=0.01", "seed=0"], ["optimizer.lr=0.1", "seed=1"]),
    "whatever is each run's own": (
        ["model.bn=true", "data.augment=crop_flip", "scheduler=cosine"],
        ["optimizer.momentum=0", "model.init=orthogonal", "data.label_noise=0.2", "seed=3"],
        ["optimizer.weight_decay=0.01", "model.init=lsuv", "trainer.gradient_clip_val=0.5", "seed=3"],
        ["optimizer=adam", "model.init=normal", "metrics.train_every=2", "seed=4"],
    ),
    "a last mini-batch of one sample": (["model.bn=true", "data.train_size=385"], ["seed=0"], ["seed=1"]),
}


@pytest.mark.parametrize("case", VARIED)
def test_each_comes_to_what_it_comes_to_alone(case, tmp_path):
    common, *jobs = VARIED[case]
    first = ["optimizer=sgd", *EXACT, *common]
    words = [[*first, *job] for job in jobs]
    expected = alone(tmp_path / "sweeps" / "alone", *words)
    found, problems = together(tmp_path / "sweeps" / "together", *words)
    assert problems == {}
    assert_same(found, expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["times"].keys() == other["times"].keys()


def leaves(value, at: str = "") -> Iterator[tuple[str, object]]:
    """Every value within, by its path; numbers of a table too, and nothing that two runs of one config differ in."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in inner:
            if str(name) not in ("run_id", "sweep", "sources", "title", "generated") and "time/" not in str(name):
                yield from leaves(one, f"{at}/{name}")
    else:
        try:
            yield at, float(value)
        except (TypeError, ValueError):
            yield at, value


def test_a_report_says_the_same_of_runs_trained_as_one_and_of_runs_alone(tmp_path):
    words = [
        ["optimizer=sgd", *EXACT, f"model.bn={bn}", f"seed={seed}"] for bn in ("false", "true") for seed in range(3)
    ]
    alone(tmp_path / "sweeps" / "alone", *words)
    folders = saved(tmp_path / "sweeps" / "together", *words)
    for group in (folders[:3], folders[3:]):
        sweep.run_together(group)
    found = []
    for name in ("alone", "together"):
        folder = report(configs.Report(sweep=name, paths=configs.Paths(str(tmp_path))))
        rows = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
        found.append(dict(leaves([json.loads((folder / "report.json").read_text()), rows])))
    numbers, words = (
        [{p: v for p, v in one.items() if isinstance(v, float) is kind} for one in found] for kind in (True, False)
    )
    assert words[0] == words[1]
    assert numbers[0] == pytest.approx(numbers[1], rel=0, abs=1e-9)
    assert "verdict" in "".join(words[0])
    assert "/0/sections/0/contrasts/gap/acc/effects/0/difference" in numbers[0]


def keys_of(value):
    if isinstance(value, dict):
        return {str(name): keys_of(one) for name, one in value.items()}
    return [keys_of(one) for one in value] if isinstance(value, list) and len(value) < 8 else type(value).__name__


def test_a_checkpoint_is_as_one_of_a_run_alone_and_is_gone_on_with_alone(tmp_path):
    common = ["optimizer=sgd", "model=cnn", "model.widths=[2,2]", "model.hidden_dims=[8]", *EXACT]
    common += ["model.bn=true", "scheduler=one_cycle", "trainer.early_stopping=5"]
    words = [[*common, f"seed={seed}"] for seed in (0, 1)]
    (tmp_path / "sweeps").mkdir()
    expected = alone(tmp_path / "sweeps" / "alone", *words)
    folders = saved(tmp_path / "sweeps" / "together", *words)
    sweep.run_together(folders)
    ours, theirs = (
        read_checkpoint(tmp_path / "sweeps" / name / "0_job" / "checkpoints" / "last.ckpt")
        for name in ("together", "alone")
    )
    assert keys_of(ours) == keys_of(theirs)
    assert (ours["progress"], ours["epoch"]) == (theirs["progress"], theirs["epoch"])
    sizes = [
        (tmp_path / "sweeps" / name / "0_job" / "checkpoints" / "best.ckpt").stat().st_size
        for name in ("together", "alone")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)

    # as if killed after the first epoch: what `previous.ckpt` holds is gone on with
    for folder in folders:
        for name in ("last.ckpt", "last.ckpt.sha256", "result.json"):
            (folder / ("checkpoints" if "ckpt" in name else "") / name).unlink()
    launch.launch(configs.load(folders[0] / "config.yaml"), folders[0], in_sweep=True)
    assert "going on from previous.ckpt, after 1 epochs" in (folders[0] / "console.log").read_text()
    assert_same([result(folders[0])], expected[:1])
    sweep.run_together(folders)  # the first is finished
    assert_same([result(folders[1])], expected[1:])


def test_one_of_6_that_diverges_ends_alone_and_the_others_do_not_notice(tmp_path):
    common = ["optimizer=sgd", "model.hidden_dims=[16]", "trainer.max_epochs=1", *EXACT]
    words = [[*common, f"seed={seed}", f"optimizer.lr={1e38 if seed == 4 else 0.1}"] for seed in range(6)]
    found, problems = together(tmp_path / "sweeps" / "with", *words)
    others, _ = together(tmp_path / "sweeps" / "without", *words[:4], *words[5:])
    bad = found.pop(4)
    assert (bad["status"], bad["diverged"]) == ("FAILED", True)
    assert bad["error"].startswith("the loss ")
    assert list(problems.values()) == [bad["error"]]
    assert_same(found, others)
    assert {one["status"] for one in found} == {"FINISHED"}
    log = (tmp_path / "sweeps" / "with" / "0_job" / "console.log").read_text()
    assert "trained as one with 5 other runs: seconds are this run's share" in log


def test_one_that_stops_early_leaves_the_others_to_go_on(tmp_path):
    common = ["optimizer=sgd", *EXACT, "trainer.max_epochs=6"]
    words = [[*common, "seed=0", "optimizer.lr=1e-30", "trainer.early_stopping=2"], [*common, "seed=1"]]
    expected = alone(tmp_path / "sweeps" / "alone", *words)
    found, _ = together(tmp_path / "sweeps" / "together", *words)
    assert [one["epochs"] for one in found] == [3, 6]
    assert_same(found, expected)


@pytest.mark.parametrize(("place", "calls"), [("pending", 11), ("check", 5), ("check", 3)])
def test_runs_that_were_stopped_go_on_to_the_same_numbers(place, calls, tmp_path, monkeypatch):
    """Stopped within an epoch; while the second, and while the first of them is evaluated. What dropout draws depends
    on their order, and the rates of the two cross on the way."""
    common = ["optimizer=sgd", *EXACT, "model.bn=true", "model.dropout=0.5", "model.hidden_dims=[16]"]
    words = [
        [*common, "seed=0", "optimizer.lr=0.1", "scheduler=cosine"],
        [*common, "seed=1", "optimizer.lr=0.09"],
    ]
    expected, _ = together(tmp_path / "sweeps" / "undisturbed", *words)
    folders = saved(tmp_path / "sweeps" / "stopped", *words)
    left = iter(range(calls))

    def pending() -> int | None:
        return None if next(left, None) is not None else signal.SIGTERM

    def check() -> None:
        if pending():
            raise interrupt.Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(interrupt, place, {"pending": pending, "check": check}[place])
        with pytest.raises(interrupt.Interrupted):
            sweep.run_together(folders)
    assert [result(one)["status"] for one in folders] == ["KILLED", "KILLED"]
    if place == "pending":
        assert [(result(one)["epochs"], result(one)["steps"]) for one in folders] == 2 * [(1, 11)]
    assert sweep.run_together(folders) == {}
    logs = [(one / "console.log").read_text() for one in folders]
    assert all("going on from last.ckpt, after " in log for log in logs)
    assert_same([result(one) for one in folders], expected)


def test_what_may_go_together():
    def numbers(*jobs: str) -> list[list[int]]:
        return fusing.groups([composed("trainer.threads=1", *job.split()) for job in jobs])

    assert numbers("seed=0", "seed=1", "optimizer.lr=0.1", "model.init=orthogonal", "data.label_noise=0.1") == [
        [0, 1, 2, 3, 4]
    ]
    assert numbers("model.bn=true", "seed=1", "model.bn=true seed=1") == [[0, 2], [1]]
    assert numbers("model.dropout=0.1", "model.dropout=0", "model.dropout=0.5") == [[0, 2], [1]]
    assert numbers("data.batch_size=32", "data.train_size=500", "data.train_size=501", "seed=1") == [[0], [1], [2], [3]]
    assert numbers("model=resnet", "trainer.max_epochs=3", "optimizer=sgd scheduler=cosine") == [[0], [1, 2]]
    for words in (
        "trainer.precision=bf16-mixed",
        "trainer.accumulate_grad_batches=2",
        "trainer.log_activations_every=5",
        "trainer=ddp trainer.accelerator=cpu",
        "trainer.deterministic=true",
        "model=custom model._target_=torchvision.models.resnet18",
    ):
        assert numbers(f"seed=0 {words}", f"seed=1 {words}") == [[0], [1]]
        assert fusing.refusal(composed(*words.split())) is not None


@pytest.mark.parametrize(
    ("count", "most", "processes", "sizes"),
    [(10, 4, 1, [4, 3, 3]), (10, 4, 2, [3, 3, 2, 2]), (3, 64, 2, [2, 1]), (1, 1, 2, [1]), (6, 1, 4, [1] * 6)],
)
def test_parts_are_equal_and_keep_every_process_busy(count, most, processes, sizes):
    assert fusing.shares(count, most, processes) == sizes


def test_a_sweep_is_fused_by_one_word(tmp_path):
    words = [
        *(word for word in SMALL if word != "tracking=none"),
        f"paths.outputs={tmp_path}",
        "tracking.log_model=false",
    ]
    keys = ["hydra/launcher=fused", "hydra.launcher.replicas=4", "hydra.launcher.n_jobs=1"]
    sweep = ["model.bn=true", "optimizer.lr=0.001,1e30", "trainer.deterministic=false,true", "seed=0,1"]
    done = train_py("-m", *keys, *words, *sweep)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: 4 of 8 jobs did not finish"
    assert "4 runs of mlp bn: 4 as one, as asked" in done.stdout
    assert "4 runs: one by one, for trainer.deterministic=true" in done.stdout
    assert "hydra/launcher=fused hydra.launcher.replicas=4 hydra.launcher.n_jobs=1" in done.stdout
    (folder,) = (tmp_path / "sweeps").iterdir()
    sent(folder)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent = json.loads((folder / "mlflow.json").read_text())["run_id"]
    runs = client.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent}'")
    assert sorted(run.info.status for run in runs) == ["FAILED"] * 4 + ["FINISHED"] * 4
    for run in runs:
        found = result(folder / run.data.tags["job"])
        assert found["run_id"] == run.info.run_id
        if found["status"] == "FINISHED":
            history = client.get_metric_history(run.info.run_id, "gap/acc")
            assert [metric.step for metric in history] == [1, 2]
            assert history[-1].value == found["gap_acc"]


def plan(config: configs.Config, count: int, replicas: int | None, processes: int) -> tuple[int, str]:
    return trial.plan(config, count * [config.optimizer], replicas, processes)


def test_a_trial_decides_how_many_go_together(monkeypatch, tmp_path):
    config = composed(*SMALL, f"paths.outputs={tmp_path}", "trainer.max_epochs=1000")
    short = composed(*SMALL, f"paths.outputs={tmp_path}")
    replicas, said = plan(short, 8, None, 2)
    assert (replicas, said[:36]) == (1, "8 runs of mlp: one by one, too short")
    monkeypatch.setattr(trial, "HOPE", 100)
    found = trial.times(config, 16 * [config.optimizer], build_datamodule(config.data, 0), [4, 16], 8000)
    assert list(found) == [1, 4, 16]
    assert all(seconds > 0 for seconds in found.values())
    tried: list[list[int]] = []

    def times(_, __, ___, sizes, ____):
        tried.append(sizes)
        return {1: 1.0} | {size: {2: 1.7, 4: 1.2, 16: 0.5, 32: 0.6}[size] for size in sizes if size in (2, 4, 16, 32)}

    monkeypatch.setattr(trial, "times", times)
    assert plan(config, 64, None, 2) == (
        16,
        "64 runs of mlp: 16 as one, 2.00 times as fast as one by one",
    )
    alone = "32 runs of mlp: one by one, for as one they would take 1.70 times as long"
    assert plan(config, 32, None, 16) == (
        1,
        alone,
    )  # what every process can have is what is tried
    assert tried == [[4, 16, 32], [2]]
    assert plan(config, 16, None, 16) == (
        1,
        "16 runs of mlp: one by one, a process for each",
    )
    monkeypatch.setattr(trial, "memory", lambda: 100_000_000)
    assert plan(config, 64, None, 1)[0] == 16
    assert max(tried[-1]) < 64
    replicas, said = plan(config, 64, 64, 1)
    assert replicas == 0
    assert re.match(r"hydra.launcher.replicas=64: 64 as one, in 1 processes, need 0\.\d GB .* there are 0\.1$", said)
    assert plan(config, 64, 64, 16) == (
        0,
        said.replace("64 as one, in 1 ", "4 as one, in 16 "),
    )
    monkeypatch.setattr(trial, "memory", lambda: 100_000)
    assert plan(config, 64, None, 1) == (
        1,
        "64 runs of mlp: one by one, for memory holds no two as one",
    )


def test_a_trial_stops_where_more_as_one_only_take_longer(monkeypatch, tmp_path):
    config = composed(*SMALL, f"paths.outputs={tmp_path}")
    data = build_datamodule(config.data, 0)

    def tried(taken: dict[int, float]) -> list[int]:
        monkeypatch.setattr(trial, "_seconds", lambda _, settings, *__: taken[len(settings)])
        return list(trial.times(config, 64 * [config.optimizer], data, [4, 16, 64], 1e6))

    assert tried({1: 1.0, 4: 1.4}) == [1, 4]
    assert tried({1: 1.0}) == [1, 4]  # what raises ends the trial, and is told
    monkeypatch.setattr(trial, "SHORT_S", 0)
    monkeypatch.setattr(trial, "LARGEST_PART", 1e9)
    assert plan(config, 8, None, 2) == (1, "8 runs of mlp: one by one, for 4 as one cannot be computed here")
    assert tried({1: 1.0, 4: 1.2, 16: 1.1}) == [1, 4, 16]
    assert tried({1: 1.0, 4: 0.9, 16: 0.5, 64: 0.4}) == [1, 4, 16, 64]


def test_a_trial_takes_the_runs_own_rates(tmp_path):
    config = composed(*SMALL, f"paths.outputs={tmp_path}")
    rates = [composed(f"optimizer.lr={0.001 * (1 + number % 3)}").optimizer for number in range(8)]
    found = trial.times(config, rates, build_datamodule(config.data, 0), [8], 1e6)
    assert list(found) == [1, 8]


def test_runs_that_were_killed_at_different_places_all_go_on_once(tmp_path):
    """The third ends where the first two begin again."""
    common = ["optimizer=sgd", *EXACT, "model.bn=true", "model.hidden_dims=[16]"]
    words = [[*common, f"seed={seed}", f"trainer.max_epochs={epochs}"] for seed, epochs in enumerate((3, 3, 2))]
    expected, _ = together(tmp_path / "sweeps" / "undisturbed", *words)
    folders = saved(tmp_path / "sweeps" / "killed", *words)
    sweep.run_together(folders)
    for folder in folders:  # as killed within the last epoch
        for name in ("result.json", "checkpoints/last.ckpt", "checkpoints/last.ckpt.sha256"):
            (folder / name).unlink()
    assert sweep.run_together(folders) == {}
    assert_same([result(one) for one in folders], expected)
    starts = [(one / "console.log").read_text().partition("going on from ")[2] for one in folders]
    assert [start.partition(" epochs")[0][-1] for start in starts] == ["2", "2", "1"]


def test_a_job_that_cannot_be_prepared_leaves_its_group_to_go_one_by_one(tmp_path):
    from hydra_plugins.gaplab_fused import _plan

    (folder,) = saved(tmp_path / "sweeps" / "one", ["data.augment=crop", "data.crop_padding=30"])
    replicas, said = _plan(str(folder), 8 * [composed().optimizer], None, 2)
    assert replicas == 1
    assert "one by one, for there is no trial (data.crop_padding=30: must be below 28" in said


BAD = {
    "hydra.launcher.replicas=0": "hydra.launcher.replicas=0: must be a number in [1, 10000], or null",
    "hydra.launcher.n_jobs=1000": "hydra.launcher.n_jobs=1000: must be a number in [1, ",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, tmp_path):
    done = train_py("-m", "hydra/launcher=fused", words, "seed=0,1", f"paths.outputs={tmp_path / 'outputs'}")
    assert_refused(done, BAD[words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_is_heard_where_the_jobs_run_in_the_sweeps_own_process(jobs, tmp_path, monkeypatch):
    folders = saved(tmp_path / "sweeps" / "a", *[[f"seed={seed}"] for seed in range(jobs)])
    for module in (worker, together_module):
        monkeypatch.setattr(module, "train", lambda *_: signal.raise_signal(signal.SIGINT))
    with interrupt.handled():
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(interrupt.Interrupted):
            gaplab_fused._run(list(map(str, folders)), writer=os.getpid())
        assert signal.getsignal(signal.SIGINT) is handler
    assert [result(folder)["status"] for folder in folders] == ["KILLED"] * jobs


@pytest.mark.parametrize("run", [sweep.run_saved, lambda folder: sweep.run_together([folder])])
def test_of_many_processes_that_are_told_to_stop_only_the_sweep_says_so(run, tmp_path, monkeypatch, capfd):
    (folder,) = saved(tmp_path / "sweeps" / "a", [])

    def train(*_):
        with interrupt.deferred():
            signal.raise_signal(signal.SIGTERM)

    for module in (worker, together_module):
        monkeypatch.setattr(module, "train", train)
    with pytest.raises(interrupt.Interrupted):
        run(folder)
    assert "stopping" not in capfd.readouterr().err
