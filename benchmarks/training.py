"""What an epoch costs: gaplab beside what one would write or take instead, in one run, interleaved, as medians.

    python benchmarks/training.py [--repeats 7] [--work mlp cnn] [--threads 1]

Contenders, all training the same network on the same 55 000 MNIST samples with the same optimizer:
  hand-written      a PyTorch loop over float tensors that lie in memory
  gaplab            Classifier and DataModule in Lightning's Trainer, as train.py runs them
  plain Lightning   torchvision data set, DataLoader, one training_step a mini-batch, Lightning's own loop
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gaplab import config as configs
from gaplab.data.datamodule import DataModule, build_datamodule
from gaplab.nn.build import build_network
from gaplab.training.classifier import Classifier
from gaplab.training.gap import GapCallback
from gaplab.worker import quiet_lightning

BATCH = 128
MODEL = {"bn": True, "bn_position": "before_activation", "bn_momentum": 0.1, "bn_eps": 1e-5, "dropout": 0.0,
         "activation": "relu", "init": "kaiming_normal", "init_gain": 1.0, "init_std": 0.05, "kwargs": {}}  # fmt: skip
WORK = {
    "mlp": {"_target_": "gaplab.nn.mlp.MLP", "hidden_dims": [64, 128, 64]},
    "cnn": {"_target_": "gaplab.nn.cnn.CNN", "widths": [32, 64], "hidden_dims": [128]},
}
ADAM = configs.Adam(_target_="torch.optim.Adam", lr=1e-3)


def new_network(work: str) -> nn.Module:
    return build_network(WORK[work] | MODEL, (1, 28, 28), 10)


def trainer(*callbacks: Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


class EpochTimer(Callback):
    """Seconds of the training epoch alone: neither Lightning's start nor its end."""

    def on_train_epoch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start


def hand_written(work: str, data: DataModule) -> Callable[[], tuple[float, nn.Module]]:
    train = data.splits["train"]
    images = (train.source.pixels[train.indices].float() / 255 - data.mean.float()) / data.std.float()
    labels = train.labels[train.indices]

    def epoch() -> tuple[float, nn.Module]:
        network = new_network(work)
        body = network.body.train()
        optimizer = torch.optim.Adam(body.parameters(), lr=1e-3, fused=True)
        start = time.perf_counter()
        for batch in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(body(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        network.normalize.set_(data.mean, data.std)
        return seconds, network

    return epoch


def gaplab(work: str, data: DataModule) -> Callable[[], tuple[float, nn.Module]]:
    def epoch() -> tuple[float, nn.Module]:
        network = new_network(work)
        network.normalize.set_(data.mean, data.std)
        classifier = Classifier(network, ADAM, configs.Scheduler(), {}, data.batches_per_epoch)
        timer = EpochTimer()
        trainer(timer).fit(classifier, datamodule=data)
        return timer.seconds, network

    return epoch


def plain_lightning(work: str, data: DataModule) -> Callable[[], tuple[float, nn.Module]]:
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.mean.tolist(), data.std.tolist())])
    root = configs.PROJECT / "data"
    samples = Subset(datasets.MNIST(root, transform=to_tensor, download=True), data.splits["train"].indices.tolist())

    class Plain(pl.LightningModule):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
            images, labels = batch
            return F.cross_entropy(self.body(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)

    def epoch() -> tuple[float, nn.Module]:
        network = new_network(work)
        network.normalize.set_(data.mean, data.std)
        timer = EpochTimer()
        trainer(timer).fit(Plain(network.body), DataLoader(samples, BATCH, shuffle=True))
        return timer.seconds, network

    return epoch


def honest_evaluation(work: str, data: DataModule) -> float:
    """Share of the training time that the evaluation of both splits takes, over three epochs."""
    network = new_network(work)
    classifier = Classifier(network, ADAM, configs.Scheduler(), {}, data.batches_per_epoch)
    measured = GapCallback(data.batches, 10, lambda epoch: None)
    run = trainer(measured)
    run.fit_loop.max_epochs = 3
    run.fit(classifier, datamodule=data)
    return statistics.median(epoch.eval_s / (epoch.epoch_s - epoch.eval_s) for epoch in measured.history)


def accuracy(network: nn.Module, data: DataModule) -> float:
    from gaplab.training.gap import score

    return score(network, data.batches("valid"), 10, torch.device("cpu")).acc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=2, help="of plain Lightning")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = build_datamodule(
        configs.TorchvisionData(
            _target_="torchvision.datasets.MNIST",
            name="mnist",
            train_kwargs={"train": True},
            test_kwargs={"train": False},
            valid_size=5000,
            batch_size=BATCH,
        ),
        seed=0,
    )
    print(
        f"torch {torch.__version__}, lightning {pl.__version__}, {options.threads} threads; "
        "seconds an epoch, median (min-max)\n"
    )
    print("| network | contender | seconds | ratio to hand-written | valid accuracy |\n|---|---|---|---|---|")
    with quiet_lightning():
        for work in options.work:
            contenders = {"hand-written": hand_written, "gaplab": gaplab, "plain Lightning": plain_lightning}
            epochs = {name: make(work, data) for name, make in contenders.items()}
            seconds: dict[str, list[float]] = {name: [] for name in epochs}
            reached: dict[str, float] = {}
            for turn in range(options.repeats + 1):  # the first turn warms up
                for name, epoch in epochs.items():
                    if name == "plain Lightning" and turn > options.slow_repeats:
                        continue
                    took, network = epoch()
                    reached[name] = accuracy(network, data)
                    seconds[name] += [took] if turn else []
            base = statistics.median(seconds["hand-written"])
            for name, all_seconds in seconds.items():
                middle = statistics.median(all_seconds)
                spread = f"{middle:.3f} ({min(all_seconds):.3f}-{max(all_seconds):.3f})"
                print(f"| {work} | {name} | {spread} | {middle / base:.2f} | {reached[name]:.4f} |", flush=True)
            print(
                f"| {work} | honest evaluation of both splits | {honest_evaluation(work, data):.2f} of training | | |",
                flush=True,
            )


if __name__ == "__main__":
    main()
