"""Several devices at full size, and what ends them: through the command line, with real processes."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import composed
from processes import of_gaplab, ranks_of, started, train_py
from ranks_forked import run_ranks
from test_devices import ODD, farthest, trained  # type: ignore[import-not-found]

from gaplab import config as configs

PLAIN = ["tracking=none", "figures=false", "trainer.accelerator=cpu", "trainer.threads=1", "model.bn=false"]
SGD = ["optimizer=sgd", "optimizer.lr=0.05", "data.batch_size=128", "trainer.max_epochs=3"]
COUNTED = ("train_acc", "valid_acc", "test_acc", "train_acc_running", "gap_acc", "steps")


@pytest.mark.parametrize(
    ("model", "samples", "valid", "precision", "epochs", "bound"),
    [
        ("mlp", 10007, 4999, "64-true", 3, 1e-6),
        ("mlp", 49999, 10001, "64-true", 3, 1e-6),
        ("mlp model.activation=tanh", 10007, 4999, "32-true", 3, 1e-3),
        ("mlp", 10007, 4999, "32-true", 3, None),
        ("cnn", 10007, 4999, "64-true", 1, 1e-6),
        ("resnet model.depth=8", 1007, 499, "64-true", 1, 1e-6),
    ],
)
def test_1_2_and_4_ranks(model, samples, valid, precision, epochs, bound, tmp_path):
    words = [*PLAIN, *SGD, *f"model={model}".split(), f"data.train_size={samples}", f"data.valid_size={valid}"]
    config = composed(*words, f"trainer.precision={precision}", f"trainer.max_epochs={epochs}")
    found = {size: run_ranks(config, tmp_path / str(size), size) for size in (1, 2, 4)}
    apart = {size: farthest(trained(tmp_path / "1"), trained(tmp_path / str(size))) for size in (2, 4)}
    counts = {
        size: [round(found[size]["train_acc"] * samples), round(found[size]["valid_acc"] * valid)] for size in found
    }
    print(f"\n{model}, {samples} samples, {precision}: weights differ by {apart}; correct {counts}")
    if bound is not None:
        assert max(apart.values()) < bound
    if precision == "64-true":
        for size in (2, 4):
            assert {name: found[size][name] for name in COUNTED} == {name: found[1][name] for name in COUNTED}


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet model.depth=8"])
def test_the_same_bits_on_as_many_devices(model, tmp_path):
    words = [*ODD, *f"model={model}".split(), "model.bn=true", "model.dropout=0.3", "trainer.max_epochs=1"]
    if "resnet" in model:
        words.append("data.train_size=199")
    config = composed(*words)
    for size in (2, 4):
        one, other = (run_ranks(config, tmp_path / f"{size}{again}", size) for again in "ab")
        assert farthest(trained(tmp_path / f"{size}a"), trained(tmp_path / f"{size}b")) == 0
        assert {name: one[name] for name in COUNTED} == {name: other[name] for name in COUNTED}


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet model.depth=8"])
def test_a_last_batch_with_fewer_samples_than_devices(model, tmp_path):
    words = [*ODD, *f"model={model}".split(), "model.bn=false", "data.train_size=65", "trainer.precision=64-true"]
    config = composed(*words, "optimizer=sgd", "trainer.max_epochs=2")
    for size in (1, 4):
        assert run_ranks(config, tmp_path / str(size), size)["steps"] == 4
    assert farthest(trained(tmp_path / "1"), trained(tmp_path / "4")) < 1e-12


def test_of_four_jobs_on_two_devices_one_fails_and_the_others_finish(tmp_path):
    words = [*ODD, "trainer=ddp", "trainer.max_epochs=2", "optimizer=sgd", f"paths.outputs={tmp_path}"]
    begin = time.monotonic()
    done = train_py("-m", *words, "optimizer.lr=0.01,1e30,0.02,0.03", "model.bn=false")
    seconds = time.monotonic() - begin
    assert done.returncode == 1, done.stderr
    jobs = sorted(tmp_path.glob("sweeps/*/[0-9]*"))
    statuses = [json.loads((job / "result.json").read_text())["status"] for job in jobs]
    times = [[json.loads(line)["time"] for line in (job / "journal.jsonl").read_text().splitlines()] for job in jobs]
    gaps = [f"{after[0] - before[-1]:.1f}" for before, after in pairwise(times)]
    print(f"\nfour jobs on two devices: {statuses}, {seconds:.1f} s in all; seconds until the next began: {gaps}")
    assert sorted(statuses) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    assert of_gaplab(tmp_path) == []
    failed = json.loads((jobs[statuses.index("FAILED")] / "result.json").read_text())
    assert failed["diverged"]


LONG = [*ODD, "trainer.devices=2", "trainer.max_epochs=100", "tracking=none"]


def in_third_epoch(outputs: Path, process) -> Path:
    while not any('"step": 3' in path.read_text() for path in outputs.glob("runs/*/journal.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (folder,) = outputs.glob("runs/*")
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_a_rank_that_goes_ends_the_run_within_30_seconds(how, rank, tmp_path):
    process = started(*LONG, f"paths.outputs={tmp_path}")
    folder = in_third_epoch(tmp_path, process)
    os.kill(ranks_of(folder)[rank], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    begin = time.monotonic()
    _, error = process.communicate()
    print(f"\nrank {rank} {how}: ended after {time.monotonic() - begin:.1f} s: {error.strip()}")
    assert time.monotonic() - begin < 30
    assert process.returncode == 1
    assert f"rank {rank}" in error.partition(";")[0]
    assert len(error.strip().splitlines()) == 1
    assert json.loads((folder / "result.json").read_text())["status"] == "FAILED"
    assert of_gaplab(tmp_path) == []


def test_a_command_killed_without_a_word_leaves_no_rank(tmp_path):
    process = started(*LONG, f"paths.outputs={tmp_path}")
    folder = in_third_epoch(tmp_path, process)
    process.kill()
    process.communicate()
    begin = time.monotonic()
    while ranks_of(folder):
        assert time.monotonic() - begin < 10
        time.sleep(0.05)
    again = train_py("resume=latest", "trainer.devices=4", f"paths.outputs={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "result.json").read_text())["steps"] == 100 * 16


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(tmp_path):
    words = [*ODD, "trainer.max_epochs=60", "trainer.devices=2", "tracking=none"]
    words += ["model.bn=true", "model.dropout=0.3", "data.augment=crop"]
    process = started(*words, f"paths.outputs={tmp_path}")
    folder = in_third_epoch(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    output, error = process.communicate()
    seconds = time.monotonic() - begin
    print(f"\nSIGTERM: ended after {seconds:.1f} s")
    assert (process.returncode, error.count("\n")) == (143, 2), error
    assert seconds < 5
    assert "src/train.py resume=" in output
    assert json.loads((folder / "result.json").read_text())["status"] == "KILLED"
    assert of_gaplab(tmp_path) == []
    again = train_py(f"resume={folder}", f"paths.outputs={tmp_path}")
    assert again.returncode == 0, again.stderr
    run_ranks(configs.load(folder / "config.yaml"), tmp_path / "undisturbed", 2)
    assert farthest(trained(folder), trained(tmp_path / "undisturbed")) == 0
