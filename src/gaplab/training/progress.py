"""What a person sees while a run goes on and when it ends."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from gaplab.config import Config, run_name
from gaplab.metrics import gap
from gaplab.training.gap import Epoch

REFRESH_S = 0.5


class ProgressBar(Callback):
    """A bar on a terminal, a line an epoch elsewhere. Redrawn twice a second at most, by the training thread itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._epoch_line = ""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            auto_refresh=False,
            transient=True,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        chunks = int(trainer.num_training_batches)
        self._task = self._bar.add_task("", total=chunks * (trainer.max_epochs or 0), epoch="1", numbers="")
        if self._console.is_terminal:
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._bar.advance(self._task)
        if self._console.is_terminal and time.monotonic() - self._last > REFRESH_S:
            self._last = time.monotonic()
            epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
            numbers = f"loss {float(outputs['loss']):.4f}  {self._epoch_line}"
            self._bar.update(self._task, epoch=epoch, numbers=numbers)
            self._bar.refresh()

    def show(self, epoch: Epoch, max_epochs: int) -> None:
        """Say what an epoch ended with."""
        found = gap(epoch.train, epoch.valid)
        self._epoch_line = f"train {epoch.train.acc:.4f}  valid {epoch.valid.acc:.4f}  gap {100 * found.acc:+.2f} pp"
        if not self._console.is_terminal:
            self._console.print(
                f"epoch {epoch.number}/{max_epochs}  loss {epoch.train.loss:.4f}  {self._epoch_line} "
                f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]  {epoch.epoch_s:.1f} s",
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


def print_summary(console: Console, result: dict[str, Any], config: Config) -> None:
    """The table at the end of a run, and what to type next."""
    best = result["best"]
    table = Table(title=escape(run_name(config)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("", "epoch", "train", "valid", "gap, pp", "95 % interval", "test"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for label, row, epoch, test in (
        ("best valid", best, best["epoch"], result["test_acc"]),
        ("last epoch", result, result["epochs"], None),
    ):
        table.add_row(
            label,
            str(epoch),
            f"{row['train_acc']:.4f}",
            f"{row['valid_acc']:.4f}",
            f"{100 * row['gap_acc']:+.2f}",
            f"[{100 * row['gap_acc_low']:+.2f}, {100 * row['gap_acc_high']:+.2f}]",
            "" if test is None else f"{test:.4f}",
        )
    console.print(table)
    console.print(
        f"{result['epochs']} epochs, {result['fit_s']:.1f} s of training and measuring, "
        f"{result['total_s']:.1f} s in all; "
        f"{result['params']:,} parameters, {result['device']}",
        soft_wrap=True,
    )
    toggled = "false" if config.model.bn else "true"
    console.print(
        f"next    python src/train.py model.bn={toggled}    (compare)\n        make ui    (look at the curves)",
        soft_wrap=True,
    )
