"""The LightningModule: a chunk of optimizer steps per call.

Lightning's loop spends about as long on a step as a small network does. So its "batch" is a chunk of mini-batches, and
`training_step` runs their optimizer steps itself (manual optimization), which costs what PyTorch costs.
"""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LRScheduler

from gaplab import config
from gaplab.errors import DivergenceError, UserError
from gaplab.ranks import ALONE, Ranks
from gaplab.training.captured import CapturedStep
from gaplab.training.optim import align_, build_optimizer, build_scheduler, can_be_captured, make_capturable_, update_

Batch = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Position:
    """Where training is. An object of its own, as a module takes ten times as long to keep a number."""

    epochs: int  # finished ones
    batches: int  # mini-batches of the current epoch so far
    steps: int  # optimizer steps so far, over all epochs
    lr: float  # learning rate of the newest optimizer step


class Classifier(LightningModule):
    """Trains `network` with the cross-entropy of its logits.

    Args:
        network: raw uint8 images (B, C, H, W) -> logits (B, K).
        optimizer, scheduler: config groups.
        hyper_parameters: plain values kept in every checkpoint, enough to build the network again.
        batches_per_epoch: mini-batches in an epoch.
        accumulate: mini-batches whose mean gradient makes one optimizer step; the last step of an epoch may have fewer.
        clip: largest L2 norm of the gradient, or None.
        batch_size, samples_per_epoch: of all `ranks` together; needed where there are several.
        ranks: the processes that train together, each with its part of every mini-batch.
        compile: run an optimizer step as a CUDA graph; without `accumulate`, on one device.

    Attributes:
        running: correct answers and samples of this process in this epoch so far, counted in train mode while the
            weights move.
        train_s: seconds spent in training steps by this process.
        first_step: `time.perf_counter()` when the first training step began, None before.
        at: where training is.
        stopped: whether training ended early, as the newest checkpoint has it.
        after_step: called in turn with the number of steps after each optimizer step; a checkpoint may be saved there.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: config.Optimizer,
        scheduler: config.Scheduler,
        hyper_parameters: dict[str, Any],
        batches_per_epoch: int,
        accumulate: int = 1,
        clip: float | None = None,
        allowed_targets: list[str] | None = None,
        batch_size: int = 0,
        samples_per_epoch: int = 0,
        ranks: Ranks = ALONE,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.running = [0, 0]
        self.train_s = 0.0
        self.first_step: float | None = None
        self.at = Position(epochs=0, batches=0, steps=0, lr=optimizer.lr)
        self.after_step: list[Callable[[int], None]] = []
        self._losses: list[Tensor] = []  # of the mini-batches that `count_up` is yet to see
        self._answers: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._mean_loss = torch.zeros(())
        self.stopped = False
        self._own: dict[str, Any] | None = None  # of this process in a checkpoint, until training goes on
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._accumulate = accumulate
        self._clip = clip
        self._allowed_targets = allowed_targets or ["torch"]
        self._batches_per_epoch = batches_per_epoch
        self._batch_size, self._samples_per_epoch = batch_size, samples_per_epoch
        self._ranks = ranks
        self._compile = compile
        self._captured: CapturedStep | None = None
        self._autocast = False
        self.steps_per_epoch = -(-batches_per_epoch // accumulate)
        self.save_hyperparameters(hyper_parameters)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def configure_optimizers(self) -> Any:
        assert self.trainer.max_epochs is not None
        optimizer, scheduler = self.build(self.trainer.max_epochs)
        return optimizer if scheduler is None else ([optimizer], [{"scheduler": scheduler, "interval": "step"}])

    def build(self, max_epochs: int) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """Optimizer and schedule of a training of `max_epochs`."""
        optimizer = build_optimizer(self.network, self._optimizer, self._allowed_targets)
        if self._compile:
            if not can_be_captured(optimizer):
                raise UserError(
                    f"trainer.compile=true: {self._optimizer._target_} is not made for CUDA graphs (no `capturable`)"
                )
            make_capturable_(optimizer)
        total = self.steps_per_epoch * max_epochs
        return optimizer, build_scheduler(optimizer, self._scheduler, self._optimizer.lr, total, self.steps_per_epoch)

    def on_fit_start(self) -> None:
        """Have Lightning begin after the epochs of a checkpoint; within an epoch, the loader knows where to begin."""
        finished: Any = self.trainer.fit_loop.epoch_progress.current
        finished.processed = finished.completed = self.at.epochs
        self._count_steps()
        self.trainer.should_stop = self.stopped

    def on_train_start(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        align_(optimizer)

    def on_train_epoch_start(self) -> None:
        if self._own is not None:  # nothing draws from here to the first step
            set_rng_state(self._own["rng"])
            self.network.load_state_dict(self._own["statistics"], strict=False)
            self._own = None

    def on_train_epoch_end(self) -> None:
        self.end_epoch()

    def end_epoch(self) -> None:
        self.at.epochs, self.at.batches = self.at.epochs + 1, 0
        self.running = [0, 0]

    def training_step(self, chunk: Iterable[Batch], batch_idx: int) -> Tensor:
        """Run the chunk's optimizer steps; the mean loss of its newest mini-batches.

        Raises DivergenceError that names the step when a loss is not finite.
        """
        start = time.perf_counter()
        self.first_step = self.first_step or start
        optimizer = self.optimizers(use_pl_optimizer=False)
        scheduler = self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert not isinstance(scheduler, list)
        self._autocast = torch.is_autocast_enabled(self.device.type)
        if self._compile and self._captured is None:
            self._captured = CapturedStep(self._whole_step, [optimizer])
        learn = self._captured or self._learn
        try:
            for images, labels in chunk:
                loss, answers = learn(images, labels)
                self._losses.append(loss)
                self._answers.append(answers)
                self._labels.append(labels)
                at = self.at
                at.batches += 1
                if at.batches % self._accumulate and at.batches != self._batches_per_epoch:
                    continue
                if self._captured is None:
                    update_(self.network, optimizer, self._clip)
                self.end_step(optimizer, scheduler)
                if self._autocast:  # it would go on with copies of the weights made before this step
                    torch.clear_autocast_cache()
                for call in self.after_step:
                    call(at.steps)
            self.count_up()
        finally:
            self.train_s += time.perf_counter() - start
        return self._mean_loss

    def end_step(self, optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> None:
        """Count an optimizer step, and go on in the schedule."""
        self.at.lr = optimizer.param_groups[0]["lr"]
        if scheduler is not None:
            scheduler.step()
        self.at.steps += 1

    def _learn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradient of a mini-batch, or of its part of an optimizer step; its mean loss (), answers (B,)."""
        logits = self.network(images)  # (B, K)
        alone = self._ranks.size == 1
        loss = F.cross_entropy(logits, labels) if alone else self._share_of_loss(logits, labels)
        share = loss / self._group_size() if self._accumulate > 1 else loss
        if alone:
            share.backward()
        else:
            self.manual_backward(share)  # Lightning has DDP average the gradients meanwhile
        return loss.detach(), logits.argmax(1)

    def _whole_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = self._learn(images, labels)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        update_(self.network, optimizer, self._clip)
        return found

    def count_up(self) -> None:
        """Bring `running`, and Lightning's `global_step`, up to the newest step. Raises DivergenceError."""
        if not self._losses:
            return
        if self._trainer is not None:
            self._count_steps()
        losses, labels = torch.stack(self._losses), torch.cat(self._labels)
        self._mean_loss = losses.mean()
        self.count(losses, int((torch.cat(self._answers) == labels).sum()), len(labels))
        self._losses, self._answers, self._labels = [], [], []

    def count(self, losses: Tensor, correct: int, samples: int) -> None:
        """Bring `running` up to the newest mini-batches, whose mean losses are (S,). Raises DivergenceError."""
        self._refuse_infinite(losses)
        self.running[0] += correct
        self.running[1] += samples

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say where training is in gaplab's own words: Lightning's count chunks, which a checkpoint may divide."""
        checkpoint.pop("loops", None)
        if self._trainer is not None:
            self.stopped = self.trainer.should_stop
        checkpoint["progress"] = {
            **asdict(self.at),
            "running": [int(value) for value in self._ranks.total(*self.running)],
            "stopped": self.stopped,
        }
        own = {"rng": rng_state(), "statistics": {} if self._ranks.size == 1 else running_statistics(self.network)}
        checkpoint["ranks"] = self._ranks.everyones(own)
        for name, value in mean_statistics(checkpoint["ranks"]).items():
            checkpoint["state_dict"][f"network.{name}"] = value

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.at = Position(**{item.name: progress[item.name] for item in fields(Position)})
        self.stopped = progress["stopped"]
        self.running = progress["running"] if self._ranks.rank == 0 else [0, 0]
        ranks = checkpoint["ranks"]
        if len(ranks) == self._ranks.size:
            self._own = ranks[self._ranks.rank]
        elif self._ranks.rank == 0:  # of another number of processes: their own draws begin anew
            self._own = {"rng": ranks[0]["rng"], "statistics": {}}

    def average_statistics_(self) -> None:
        """Give BatchNorm's running statistics their mean over the processes, to evaluate and save one network.

        Each process sees its own part of a mini-batch. The mean of the parts' means is the mini-batch's; the mean of
        their unbiased variances is an unbiased estimate, too.
        """
        if self._ranks.size > 1 and (own := running_statistics(self.network)):
            everyones = [{"statistics": value} for value in self._ranks.everyones(own)]
            self.network.load_state_dict(mean_statistics(everyones), strict=False)

    def _share_of_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """This process's part of the mini-batch's mean loss, times their number: DDP takes the mean over processes."""
        samples = min(self._batch_size, self._samples_per_epoch - self.at.batches * self._batch_size)
        return F.cross_entropy(logits, labels, reduction="sum") * (self._ranks.size / samples)

    def _group_size(self) -> int:
        """Mini-batches that share the optimizer step of the current one."""
        first = self.at.batches // self._accumulate * self._accumulate
        return min(self._accumulate, self._batches_per_epoch - first)

    def _refuse_infinite(self, losses: Tensor) -> None:
        if bool(losses.isfinite().all()):
            return
        first = int((~losses.isfinite()).nonzero()[0])
        number = (self.at.batches - len(losses) + first) // self._accumulate
        step = self.at.epochs * self.steps_per_epoch + number + 1
        raise DivergenceError(
            f"the loss is {float(losses[first])} at step {step} (epoch {self.at.epochs + 1}); a lower "
            "optimizer.lr, trainer.gradient_clip_val or model.bn=true may help; the last checkpoint is older"
        )

    def _count_steps(self) -> None:
        """Tell Lightning of the optimizer steps that went past it, so that `global_step` counts them."""
        total = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        total.ready = total.completed = self.at.steps


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of its BatchNorm layers, by their names in its state; copies on the CPU."""
    return {
        f"{name}.{kind}": getattr(module, kind).cpu().clone()
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for kind in ("running_mean", "running_var")
    }


def mean_statistics(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The mean over processes of what `running_statistics` found in each, computed in float64."""
    found = [rank["statistics"] for rank in ranks]
    return {name: torch.stack([one[name] for one in found]).double().mean(0).to(found[0][name]) for name in found[0]}


def rng_state() -> dict[str, Any]:
    """Of every generator that a network may draw from, as plain values and tensors."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Have them go on as `rng_state` found them."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])
