"""The one estimator of accuracy, and the callback that measures the gap with it after every epoch."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from gaplab.errors import DivergenceError
from gaplab.metrics import Score, gap
from gaplab.ranks import ALONE, Ranks
from gaplab.training.classifier import Batch, Classifier


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Evaluate in this context. Afterwards each module has the mode that it had before, so that layers which the
    network keeps in eval mode, such as a frozen BatchNorm, stay in it: `network.train()` would change all."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.inference_mode()
def score(
    network: nn.Module, batches: Iterable[tuple[Tensor, ...]], device: torch.device, ranks: Ranks = ALONE
) -> Score:
    """Accuracy and mean loss over every sample of `batches`, of all `ranks` together, in eval mode, as one sum.

    `batches` are images, labels and, under label noise, the labels without it, as `DataModule.labelled` yields them.
    """
    total, labellings = 0, 1
    correct = torch.zeros(2, dtype=torch.int64, device=device)  # by labelling
    loss = torch.zeros(2, dtype=torch.float64, device=device)
    with eval_mode(network):
        for images, *labels in batches:
            total, labellings = total + len(images), len(labels)
            logits = network(images)  # (B, K)
            for number, one in enumerate(labels):
                correct[number] += (logits.argmax(1) == one).sum()
                loss[number] += F.cross_entropy(logits.float(), one, reduction="sum")
    samples, *counts = ranks.total(total, *correct.tolist(), *loss.tolist())
    scores = [Score(int(counts[number]), int(samples), counts[2 + number] / samples) for number in range(labellings)]
    return replace(scores[0], clean=scores[1]) if labellings > 1 else scores[0]


@torch.inference_mode()
def predict(network: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits float32 (N, K) and labels int64 (N,) of every sample, in eval mode, on the CPU."""
    with eval_mode(network):
        parts = [(network(images).float().cpu(), labels.cpu()) for images, labels in batches]
    return torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts])


@dataclass(frozen=True)
class Epoch:
    """What was measured at the end of an epoch, all with the same weights but `running_acc`."""

    number: int  # from 1
    train: Score | None  # None where this split was not evaluated
    valid: Score
    running_acc: float
    lr: float  # of the epoch's last optimizer step
    epoch_s: float  # the whole epoch, evaluation included
    eval_s: float  # the evaluation of both splits
    steps_per_s: float  # training steps alone

    def metrics(self) -> dict[str, float]:
        """By their public names: fractions, nats, seconds; those of `train_metrics` where there are any."""
        return self.train_metrics() | {
            "valid/acc": self.valid.acc,
            "valid/loss": self.valid.loss,
            "train/acc_running": self.running_acc,
            "lr": self.lr,
            "time/epoch_s": self.epoch_s,
            "time/eval_s": self.eval_s,
            "time/steps_per_s": self.steps_per_s,
        }

    def train_metrics(self) -> dict[str, float]:
        """What needs the train split's evaluation; empty without one. Under label noise, those named `clean` count the
        train split against its labels without noise, and the others against the labels that are trained on."""
        metrics: dict[str, float] = {}
        for train, suffix in ((self.train, ""), (self.train and self.train.clean, "_clean")):
            if train is None:
                continue
            found = gap(train, self.valid)
            metrics |= {
                f"train/acc{suffix}": train.acc,
                f"gap/acc{suffix}": found.acc,
                f"gap/acc{suffix}_low": found.low,
                f"gap/acc{suffix}_high": found.high,
                f"train/loss{suffix}": train.loss,
                f"gap/loss{suffix}": self.valid.loss - train.loss,
            }
        return metrics


class GapCallback(Callback):
    """Evaluates the splits at the end of every epoch and logs the metrics, so that checkpoints and early stopping see
    them. Raises DivergenceError, before any checkpoint, when the loss is not finite.

    Args:
        batches: every sample of a named split, once, as `score` takes them.
        on_epoch: called with each finished epoch.
        ranks: the processes that train together; `batches` gives this one's part.
        train_every: epochs from one evaluation of the train split to the next. One that stops early may end without;
            `complete` is for it, and for the best one.
        clock: seconds of the run so far, from any instant.

    Attributes:
        history: the finished epochs, those before a checkpoint included.
        eval_s: seconds that this process spent in evaluating.
    """

    def __init__(
        self,
        batches: Callable[[str], Iterable[tuple[Tensor, ...]]],
        on_epoch: Callable[[Epoch], None],
        ranks: Ranks = ALONE,
        train_every: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.history: list[Epoch] = []
        self.eval_s = 0.0
        self._elapsed = 0.0, 0.0  # of an epoch that a checkpoint divides: seconds, and those of training
        self._batches = batches
        self._on_epoch = on_epoch
        self._ranks = ranks
        self._train_every = train_every
        self._clock = clock

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self.begin(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.max_epochs is not None
        with trainer.precision_plugin.forward_context():
            epoch = self.measure(trainer.max_epochs)
        pl_module.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in epoch.metrics().items()})

    def begin(self, classifier: Classifier) -> None:
        """Start an epoch of `classifier`'s, or go on within the one of a checkpoint."""
        self._classifier = classifier
        self._start = self._clock() - self._elapsed[0], classifier.train_s - self._elapsed[1]
        self._elapsed = 0.0, 0.0

    def measure(self, max_epochs: int) -> Epoch:
        """End the epoch: evaluate, and add it to `history`. Raises DivergenceError."""
        evaluation = self._clock()
        classifier = self._classifier
        classifier.average_statistics_()
        number = classifier.at.epochs + 1
        found = {
            split: score(classifier.network, self._batches(split), classifier.device, self._ranks)
            for split in ("train", "valid")
            if split == "valid" or number % self._train_every == 0 or number == max_epochs
        }
        if not all(math.isfinite(one.loss) for one in found.values()):
            raise DivergenceError(
                f"the loss after epoch {number} (step {classifier.at.steps}) is not finite; a lower "
                "optimizer.lr, trainer.gradient_clip_val or model.bn=true may help; the last checkpoint is older"
            )
        now = self._clock()
        self.eval_s += now - evaluation
        hits, count = self._ranks.total(*classifier.running)
        epoch = Epoch(
            number=number,
            train=found.get("train"),
            valid=found["valid"],
            running_acc=hits / count,
            lr=classifier.at.lr,
            epoch_s=now - self._start[0],
            eval_s=now - evaluation,
            steps_per_s=classifier.steps_per_epoch / (classifier.train_s - self._start[1]),
        )
        self.history.append(epoch)
        self._on_epoch(epoch)
        return epoch

    def complete(self, epoch: Epoch, train: Score) -> Epoch:
        """Give a finished epoch the train split's score, which was measured with its weights afterwards. Raises
        DivergenceError when its loss is not finite."""
        if not math.isfinite(train.loss):
            raise DivergenceError(f"the loss of the train split after epoch {epoch.number} is not finite")
        known = replace(epoch, train=train)
        self.history[epoch.number - 1] = known
        return known

    def state_dict(self) -> dict[str, Any]:
        elapsed = self._clock() - self._start[0], self._classifier.train_s - self._start[1]
        if self._classifier.at.batches == 0:  # the epoch is over
            elapsed = 0.0, 0.0
        return {"history": [asdict(epoch) for epoch in self.history], "elapsed": elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [
            Epoch(**epoch | {split: _score(epoch[split]) for split in ("train", "valid")})
            for epoch in state_dict["history"]
        ]
        self._elapsed = state_dict["elapsed"]

    @property
    def best(self) -> Epoch:
        """The epoch of the highest valid/acc, the earliest on a tie."""
        return max(self.history, key=lambda epoch: (epoch.valid.acc, -epoch.number))


def _score(values: dict[str, Any] | None) -> Score | None:
    """A score as `asdict` kept it in a checkpoint."""
    return None if values is None else Score(**values | {"clean": _score(values.get("clean"))})
