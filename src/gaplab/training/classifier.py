"""The LightningModule: a chunk of optimizer steps per call.

Lightning's loop spends about as long on a step as a small network does. So its "batch" is a chunk of mini-batches, and
`training_step` runs their optimizer steps itself (manual optimization), which costs what PyTorch costs.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from gaplab import config
from gaplab.errors import DivergenceError
from gaplab.training.optim import build_optimizer, build_scheduler

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Trains `network` with the cross-entropy of its logits.

    Args:
        network: raw uint8 images (B, C, H, W) -> logits (B, K).
        optimizer, scheduler: config groups.
        hyper_parameters: plain values kept in every checkpoint, enough to build the network again.
        batches_per_epoch: mini-batches in an epoch.
        accumulate: mini-batches whose mean gradient makes one optimizer step; the last step of an epoch may have fewer.
        clip: largest L2 norm of the gradient, or None.

    Attributes:
        running: correct answers and samples of this epoch so far, counted in train mode while the weights move.
        train_s: seconds spent in training steps, over all epochs.
        lr: learning rate of the newest optimizer step.
        first_step: `time.perf_counter()` when the first training step began, None before.
        steps: optimizer steps so far, over all epochs.
        on_step: called with `steps` after each optimizer step, unless None.
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
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.running = [0, 0]
        self.train_s = 0.0
        self.first_step: float | None = None
        self.steps = 0
        self.on_step: Callable[[int], None] | None = None
        self.lr = optimizer.lr
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._accumulate = accumulate
        self._clip = clip
        self._allowed_targets = allowed_targets or ["torch"]
        self._batches_per_epoch = batches_per_epoch
        self.steps_per_epoch = -(-batches_per_epoch // accumulate)
        self.save_hyperparameters(hyper_parameters)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.network, self._optimizer, self._allowed_targets)
        assert self.trainer.max_epochs is not None
        total = self.steps_per_epoch * self.trainer.max_epochs
        scheduler = build_scheduler(optimizer, self._scheduler, self._optimizer.lr, total, self.steps_per_epoch)
        return optimizer if scheduler is None else ([optimizer], [{"scheduler": scheduler, "interval": "step"}])

    def on_train_epoch_start(self) -> None:
        self.running = [0, 0]
        self._batches_done = 0

    def training_step(self, chunk: Iterable[Batch], batch_idx: int) -> Tensor:
        """Run the chunk's optimizer steps; the mean loss of its mini-batches.

        Raises DivergenceError that names the step when a loss is not finite.
        """
        start = time.perf_counter()
        self.first_step = self.first_step or start
        optimizer = self.optimizers(use_pl_optimizer=False)
        scheduler = self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert not isinstance(scheduler, list)
        autocast = torch.is_autocast_enabled(self.device.type)
        losses, hits, count, steps_before = [], [], 0, self.steps
        for images, labels in chunk:
            logits = self.network(images)  # (B, K)
            loss = F.cross_entropy(logits, labels)
            (loss / self._group_size() if self._accumulate > 1 else loss).backward()
            self._batches_done += 1
            if self._batches_done % self._accumulate == 0 or self._batches_done == self._batches_per_epoch:
                if self._clip is not None:
                    nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
                self.lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                self.steps += 1
                if autocast:  # it would go on with copies of the weights made before this step
                    torch.clear_autocast_cache()
                if self.on_step is not None:
                    self.on_step(self.steps)
            losses.append(loss.detach())
            hits.append((logits.detach().argmax(1) == labels).sum())
            count += len(labels)
        mean_loss = self._finite(torch.stack(losses)).mean()
        self.running[0] += int(torch.stack(hits).sum())
        self.running[1] += count
        self._count_steps(self.steps - steps_before)
        self.train_s += time.perf_counter() - start
        return mean_loss

    def _group_size(self) -> int:
        """Mini-batches that share the optimizer step of the current one."""
        first = self._batches_done // self._accumulate * self._accumulate
        return min(self._accumulate, self._batches_per_epoch - first)

    def _finite(self, losses: Tensor) -> Tensor:
        if bool(losses.isfinite().all()):
            return losses
        first = int((~losses.isfinite()).nonzero()[0])
        number = (self._batches_done - len(losses) + first) // self._accumulate
        step = self.current_epoch * self.steps_per_epoch + number + 1
        raise DivergenceError(
            f"the loss is {float(losses[first])} at step {step} (epoch {self.current_epoch + 1}); a lower "
            "optimizer.lr, trainer.gradient_clip_val or model.bn=true may help; the last checkpoint is older"
        )

    def _count_steps(self, steps: int) -> None:
        """Tell Lightning of the optimizer steps that went past it, so that `global_step` counts them."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for tracker in (progress.total, progress.current):
            tracker.ready += steps
            tracker.completed += steps
