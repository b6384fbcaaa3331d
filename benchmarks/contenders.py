"""The contenders: each trains the same network on the same pictures in a process of its own.

    python benchmarks/contenders.py <name>

A line of JSON on standard input asks for epochs (`work`, `batch`, `samples`, `epochs`, `seed`); a line of JSON answers:
`train`, the seconds of each epoch's optimizer steps; `whole`, those from one epoch's end to the next one's, with the
evaluation of both splits (where the contender has one); `evaluation`, where it says how long that took; `accuracy`, of
the valid split at the end. gaplab tells how much of `train` is Lightning's loop, and what `checkpoints` take, too.
What a person would do once before the epochs is not timed: reading the data, compiling, the
first epoch where there are several.

  hand-written              a PyTorch loop over normalized float tensors in memory, Adam in its fused form; evaluates
                            both splits after each epoch
  hand-written, compiled    the same with the network under torch.compile
  gaplab                    train.py's own job: journal, checkpoints and honest evaluation, tracking=none
  Lightning over tensors    Lightning's own loop, a training_step a mini-batch, tensors in memory
  DataLoader                torchvision's data set, transforms, DataLoader and Lightning's own loop
  DataLoader, 2 workers     the same with two processes that read
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src"), str(Path(__file__).resolve().parent)]

import torch
import torch.nn.functional as F
from made import Pictures
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "data"
VALID = 1000
TIMES = ("train", "whole", "evaluation", "loop", "checkpoints")
EVAL_BATCH = 512


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.more, self.stride = after - before, stride

    def forward(self, x: Tensor) -> Tensor:
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(self.body(x) + short)


def dense(*widths: int, bn: bool = True, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=not bn), *[nn.BatchNorm1d(after)] * bn, nn.ReLU()]
        layers += [nn.Dropout(dropout)] * (dropout > 0)
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def convolutional() -> nn.Sequential:
    def stage(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*stage(1, 32), *stage(32, 64), dense(3136, 128))


def residual(depth: int = 20) -> nn.Sequential:
    """He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, section 4.2."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    widths = [16] * (1 + (depth - 2) // 6) + [32] * ((depth - 2) // 6) + [64] * ((depth - 2) // 6)
    layers += [Residual(a, b, 2 if b > a else 1) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


WORK: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {  # and what gaplab is told
    "mlp": (lambda: dense(784, 64, 128, 64), ["model=mlp"]),
    "mlp 2x1024": (lambda: dense(784, 1024, 1024), ["model=mlp", "model.hidden_dims=[1024,1024]"]),
    "cnn": (convolutional, ["model=cnn"]),
    "resnet-20": (residual, ["model=resnet"]),
}
TOGGLED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {  # the conditions of a sweep
    f"mlp bn={bn} dropout={dropout}": (partial(dense, 784, 64, 128, 64, bn=bn, dropout=dropout), [])
    for bn in (False, True)
    for dropout in (0.0, 0.5)
}


def drawn(work: str) -> nn.Module:
    """Its network, with initial weights of the same distribution in all contenders."""
    network = (WORK | TOGGLED)[work][0]()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


@cache
def pictures(work: str, samples: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, C, H, W) and labels int64 (N,): the first VALID are the valid split."""
    if work == "resnet-20":
        made = Pictures(samples + VALID)
        return torch.from_numpy(made.data).permute(0, 3, 1, 2).contiguous(), made.targets
    from torchvision.datasets import MNIST

    mnist = MNIST(DATA, download=True)
    return mnist.data[: samples + VALID, None], mnist.targets[: samples + VALID]


@cache
def floats(work: str, samples: int) -> tuple[Tensor, Tensor]:
    pixels, labels = pictures(work, samples)
    return (pixels.float() / 255 - 0.13) / 0.31, labels


@torch.inference_mode()
def hits(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    network.eval()
    found = 0
    for x, y in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
        logits = network(x)
        F.cross_entropy(logits, y, reduction="sum")
        found += int((logits.argmax(1) == y).sum())
    network.train()
    return found


def hand_written(work: str, batch: int, samples: int, epochs: int, seed: int, compiled: bool = False) -> dict[str, Any]:
    torch.manual_seed(seed)
    images, labels = floats(work, samples)
    network = drawn(work)
    run = torch.compile(network) if compiled else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    if compiled:  # once, on the shapes to come
        for size in {batch, samples % batch} - {0, 1}:
            F.cross_entropy(run(images[:size]), labels[:size]).backward()
            optimizer.zero_grad()
    train, ends, right = [], [], 0
    for _ in range(epochs):
        start = time.perf_counter()
        for part in (VALID + torch.randperm(samples)).split(batch):
            if len(part) > 1:
                loss = F.cross_entropy(run(images.index_select(0, part)), labels.index_select(0, part))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        train.append(time.perf_counter() - start)
        hits(network, images[VALID:], labels[VALID:])
        right = hits(network, images[:VALID], labels[:VALID])
        ends.append(time.perf_counter())
    return {"train": train, "whole": differences(ends), "accuracy": right / VALID}


def differences(ends: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(ends)]


def gaplab(work: str, batch: int, samples: int, epochs: int, seed: int) -> dict[str, Any]:
    from gaplab import config as configs
    from gaplab.cli import _compose
    from gaplab.launch import launch
    from gaplab.tracking.journal import read_journal

    configs.register()
    words = [*WORK[work][1], f"data.batch_size={batch}", f"data.train_size={samples}", f"data.valid_size={VALID}"]
    words += [f"trainer.max_epochs={epochs}", f"seed={seed}", "model.bn=true", "model.init=xavier_uniform"]
    words += ["tracking=none", "figures=false"]
    if work == "resnet-20":
        words += ["allowed_targets=[gaplab,torch,torchvision,made]", "data._target_=made.Pictures", "data.name=made"]
        words += ["+data.train_kwargs.samples=" + str(samples + VALID), "+data.test_kwargs.samples=1000"]
        words += ["~data.train_kwargs.train", "~data.test_kwargs.train", "data.num_train=null"]
    with tempfile.TemporaryDirectory() as outputs:
        cfg = _compose("train", [*words, f"paths.outputs={outputs}"])
        folder = Path(outputs) / "run"
        result = launch(configs.from_hydra(cfg, words), folder, in_sweep=True)
        epochs_seen = [event for event in read_journal(folder) if "time/epoch_s" in event.get("values", {})]
    values = [event["values"] for event in epochs_seen]
    return {
        "train": [one["time/epoch_s"] - one["time/eval_s"] for one in values],
        "whole": differences([event["time"] for event in epochs_seen]),
        "evaluation": [one["time/eval_s"] for one in values],
        "loop": [
            one["time/epoch_s"] - one["time/eval_s"] - result.steps / epochs / one["time/steps_per_s"] for one in values
        ],
        "checkpoints": [result.times["checkpoints"] / epochs],
        "accuracy": result.valid_acc,
    }


def lightning(
    work: str,
    seed: int,
    epochs: int,
    batches: Any,
    samples: int,
    fused: bool,
    ready: Callable[[Any], Any] = lambda x: x,
) -> dict[str, Any]:
    import lightning.pytorch as pl

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = drawn(work)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=fused or None)

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            seconds.append(time.perf_counter() - self.start)

    seconds: list[float] = []
    pl.seed_everything(seed, verbose=False)
    module = Plain()
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=[Clock()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        ).fit(module, batches)  # fmt: skip
    images, labels = floats(work, samples)
    return {"train": seconds, "whole": [], "accuracy": hits(module.network, images[:VALID], labels[:VALID]) / VALID}


class InMemory:
    """What a person writes who has the tensors and Lightning."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.randperm(len(self.labels)).split(self.batch):
            yield self.images.index_select(0, part), self.labels.index_select(0, part)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)


def over_tensors(work: str, batch: int, samples: int, epochs: int, seed: int) -> dict[str, Any]:
    images, labels = floats(work, samples)
    return lightning(work, seed, epochs, InMemory(images[VALID:], labels[VALID:], batch), samples, fused=True)


def dataloader(work: str, batch: int, samples: int, epochs: int, seed: int, workers: int = 0) -> dict[str, Any]:
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import MNIST

    ready = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.13], [0.31])])
    if work == "resnet-20":  # torchvision's own class, over the made pictures
        whole: Any = Pictures(samples + VALID)
        whole.transform = ready
    else:
        whole = MNIST(DATA, transform=ready, download=True)
    part = Subset(whole, range(VALID, VALID + samples))
    loader = DataLoader(part, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lightning(work, seed, epochs, loader, samples, fused=False)


CONTENDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "hand-written": hand_written,
    "hand-written, compiled": lambda *words: hand_written(*words, compiled=True),
    "gaplab": gaplab,
    "Lightning over tensors": over_tensors,
    "DataLoader": dataloader,
    "DataLoader, 2 workers": lambda *words: dataloader(*words, workers=2),
}


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        found = CONTENDERS[name](*(asked[key] for key in ("work", "batch", "samples", "epochs", "seed")))
        seconds = {key: statistics.median(found[key][1:] or found[key]) for key in TIMES if found.get(key)}
        print(json.dumps(seconds | {"accuracy": found["accuracy"]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
