"""One network on several devices: the same steps on any number of them, and what happens when one of them goes."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, composed
from killing import differences, wait_for
from processes import ranks_of, started
from ranks_forked import run_ranks, start_ranks

from gaplab import config as configs
from gaplab import launch, worker
from gaplab.data.datamodule import DataModule, build_datamodule
from gaplab.ranks import Ranks
from gaplab.training.optim import build_optimizer
from gaplab.training.reader import read_checkpoint

# 1 007 samples are 15 batches of 64 and one of 47, which neither 2 nor 4 divide
ODD = [*SMALL, "data.train_size=1007", "data.valid_size=499", "data.batch_size=64", "trainer.threads=1"]
EXACT = ["trainer.precision=64-true", "optimizer=sgd", "optimizer.lr=0.1", "model.bn=false"]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def on_each(tmp_path_factory):
    """The same run on 1, 2 and 4 devices: results and folders."""
    config = composed(*ODD, *EXACT, "data.augment=crop_flip", "data.label_noise=0.1", "trainer.max_epochs=3")
    top = tmp_path_factory.mktemp("on_each")
    return {size: (run_ranks(config, top / str(size), size), top / str(size)) for size in (1, 2, 4)}


def test_1_2_and_4_devices_take_the_same_steps(on_each):
    alone, folder = on_each[1]
    assert alone["steps"] == 3 * 16
    for size in (2, 4):
        result, other = on_each[size]
        assert farthest(trained(folder), trained(other)) < 1e-12
        assert result["steps"] == alone["steps"]
        assert result["device"].startswith(f"{size} x ")


def test_every_sample_is_counted_exactly_once(on_each):
    names = ("train_acc", "valid_acc", "test_acc", "train_acc_running", "gap_acc", "train_acc_clean", "gap_acc_clean")
    alone = on_each[1][0]
    assert alone["train_acc"] * 1007 == pytest.approx(round(alone["train_acc"] * 1007), abs=1e-9)
    for size in (2, 4):
        assert {name: on_each[size][0][name] for name in names} == {name: alone[name] for name in names}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 47, 64])
def test_shares_are_all_of_a_batch_in_order(count):
    batch = torch.arange(count)
    shares = [Ranks(rank, 4).share(batch) for rank in range(4)]
    assert torch.equal(torch.cat(shares), batch)
    for rank, share in enumerate(shares):
        assert len(share) in (count // 4, -(-count // 4))
        assert len(share) == 0 or share[0] == Ranks(rank, 4).first(count)


def test_batchnorm_of_each_devices_part_and_averaged_statistics_equal_a_direct_computation(tmp_path):
    config = composed(*ODD, "trainer.precision=64-true", "optimizer=sgd", "model.bn=true", "trainer.max_epochs=1")
    result = run_ranks(config, tmp_path / "run", 2)
    assert result["batchnorm"] == "averaged"

    torch.manual_seed(config.seed)
    data = build_datamodule(config.data, config.seed, 1, bn=True)
    first, second = (worker.initial_network(config, data).double() for _ in range(2))
    second.load_state_dict(first.state_dict())
    optimizer = build_optimizer(first, config.optimizer, ["torch"])
    for chunk in data.train_dataloader():
        for images, labels in chunk:
            logits = torch.cat([net(part) for net, part in zip((first, second), images.tensor_split(2), strict=True)])
            F.cross_entropy(logits, labels).backward()
            for one, two in zip(first.parameters(), second.parameters(), strict=True):
                one.grad += two.grad
                two.grad = None
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for one, two in zip(first.parameters(), second.parameters(), strict=True):
                    two.copy_(one)
    direct = {
        name: (value.double() + second.state_dict()[name].double()) / 2 for name, value in first.state_dict().items()
    }
    found = {name.removeprefix("network."): value for name, value in trained(tmp_path / "run").items()}
    assert any("running_var" in name for name in found)
    assert farthest(direct, found) < 1e-10


DRAWN = ["model.bn=true", "model.dropout=0.3", "data.augment=crop", "checkpoint.every_s=0.05"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "run"
    run_ranks(composed(*ODD, *DRAWN), folder, 2)
    return folder


def test_two_ranks_killed_within_an_epoch_go_on_to_the_same_bits(drawn, tmp_path):
    config = composed(*ODD, *DRAWN, "trainer.devices=2")
    folder = tmp_path / "run"

    def die_at_step_20(rank: int) -> None:
        step = worker.Classifier.training_step

        def training_step(self, chunk, batch_idx):
            self.after_step.append(lambda steps: os.kill(os.getpid(), signal.SIGKILL) if steps == 20 + rank else None)
            return step(self, chunk, batch_idx)

        worker.Classifier.training_step = training_step

    children, _store = start_ranks(config, folder, die_at_step_20)
    assert {wait_for(child) for child in children} <= {-signal.SIGKILL, 1}
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    for path in (folder / "ranks").iterdir():
        if path.is_file():
            path.unlink()
    result = run_ranks(config, folder, 2)
    (drawn / "result.json").write_text((drawn / "ranks" / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result))
    assert [name for name in differences(folder, drawn) if name != "metrics"] == []


def test_a_rank_told_to_stop_while_it_evaluates_stops_all_and_they_evaluate_again(drawn, tmp_path):
    config = composed(*ODD, *DRAWN, "trainer.devices=2", "data.eval_batch_size=100")
    folder = tmp_path / "run"

    def be_told_in_rank_1(rank: int) -> None:
        labelled = DataModule.labelled

        def told(self, name: str, shared: bool = False):
            for number, batch in enumerate(labelled(self, name, shared)):
                if (rank, name, number) == (1, "train", 2):
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        DataModule.labelled = told

    children, _store = start_ranks(config, folder, be_told_in_rank_1)
    assert [wait_for(child) for child in children] == [143, 143]
    progress = read_checkpoint(folder / "checkpoints" / "last.ckpt")["progress"]
    assert (progress["epochs"], progress["batches"]) == (0, 16)
    run_ranks(config, folder, 2)
    assert farthest(trained(folder), trained(drawn)) == 0


def test_each_rank_draws_its_own_dropout(drawn):
    ranks = read_checkpoint(drawn / "checkpoints" / "last.ckpt")["ranks"]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["rng"]["torch"], ranks[1]["rng"]["torch"])


@pytest.mark.full
def test_a_killed_rank_ends_the_run_with_its_name_and_one_device_goes_on(tmp_path):
    process = started(*ODD, *EXACT, "trainer=ddp", "trainer.max_epochs=40", f"paths.outputs={tmp_path}")
    while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    (folder,) = tmp_path.glob("runs/*")
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    begin = time.monotonic()
    _, error = process.communicate()
    assert time.monotonic() - begin < 30
    assert process.returncode == 1
    assert error.strip() == "error: rank 1 was killed (SIGKILL)"
    assert json.loads((folder / "result.json").read_text())["status"] == "FAILED"
    assert ranks_of(folder) == {}

    config = configs.load(folder / "config.yaml")
    result = launch.launch(replace(config, trainer=replace(config.trainer, devices=1)), folder)
    assert result.status == "FINISHED"
    assert result.steps == 40 * 16
