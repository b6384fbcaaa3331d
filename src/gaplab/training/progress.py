"""What a person sees while a run goes on."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from gaplab.metrics import gap
from gaplab.training.gap import Epoch

REFRESH_S = 0.5
WIDE = 110  # characters that the whole bar takes


class ProgressBar(Callback):
    """A bar on a terminal, a line an epoch elsewhere. Redrawn twice a second at most, by the training thread itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._epoch_line = ""
        self._narrow = console.width < WIDE
        epoch, numbers = TextColumn("epoch {task.fields[epoch]}"), TextColumn("{task.fields[numbers]}")
        bar = (SpinnerColumn("line"), epoch, BarColumn(bar_width=20), MofNCompleteColumn(), numbers)  # in ASCII
        columns = (epoch, numbers) if self._narrow else (*bar, TimeRemainingColumn(elapsed_when_finished=True))
        self._bar = Progress(
            *columns,
            console=console,
            auto_refresh=False,
            transient=True,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        chunks = int(trainer.num_training_batches)
        total, done = (chunks * (epochs or 0) for epochs in (trainer.max_epochs, trainer.current_epoch))
        self._task = self._bar.add_task("", total=total, completed=done, epoch="1", numbers="")
        if self._console.is_terminal:
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._bar.advance(self._task)
        if self._console.is_terminal and time.monotonic() - self._last > REFRESH_S:
            self._last = time.monotonic()
            epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
            numbers = f"loss {float(outputs['loss']):.4f}  {self._epoch_line}"
            if self._narrow and self._epoch_line:
                numbers = self._epoch_line[self._epoch_line.index("valid") :]
            self._bar.update(self._task, epoch=epoch, numbers=numbers)
            self._bar.refresh()

    def show(self, epoch: Epoch, max_epochs: int) -> None:
        """Say what an epoch ended with."""
        loss = interval = ""
        self._epoch_line = f"valid {epoch.valid.acc:.4f}"
        if epoch.train is not None:
            train = epoch.train.clean or epoch.train
            found = gap(train, epoch.valid)
            loss = f"  loss {epoch.train.loss:.4f}"
            interval = f" [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
            labels = " (clean labels)" if epoch.train.clean else ""
            self._epoch_line = f"train {train.acc:.4f}{labels}  {self._epoch_line}  gap {100 * found.acc:+.2f} pp"
        if not self._console.is_terminal:
            self._console.print(
                f"epoch {epoch.number}/{max_epochs}{loss}  {self._epoch_line}{interval}  {epoch.epoch_s:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._console.is_terminal:  # elsewhere it was never started, and would end with an empty line
            self._bar.stop()
