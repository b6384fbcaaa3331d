"""What a run came to: `result.json`, and the table that a person sees."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gaplab.config import Config, run_name
from gaplab.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class RunResult:
    """What `result.json` holds. Accuracies and gaps are fractions, losses nats, times seconds; None is not known.

    `times` says where those of this process went, by the phases of `PHASES`.
    """

    run_id: str
    status: str
    seed: int
    condition: str
    config_hash: str
    epochs: int = 0
    steps: int = 0
    params: int = 0
    fit_s: float = 0.0
    total_s: float = 0.0
    steps_per_s: float | None = None
    device: str = ""
    batchnorm: str | None = None  # on several devices: "synchronized", or "averaged" running statistics
    train_acc: float | None = None
    valid_acc: float | None = None
    gap_acc: float | None = None
    gap_acc_low: float | None = None
    gap_acc_high: float | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    train_acc_running: float | None = None
    train_acc_clean: float | None = None  # under label noise: against the labels without it
    gap_acc_clean: float | None = None
    gap_acc_clean_low: float | None = None
    gap_acc_clean_high: float | None = None
    train_loss_clean: float | None = None
    best: dict[str, float] | None = None
    test_acc: float | None = None
    test_loss: float | None = None
    diverged: bool = False
    error: str | None = None
    times: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what happens meanwhile to `times`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - start

    def write(self, folder: Path) -> None:
        """A loss that is not finite is None, for JSON: the test split may have one where the others have none."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        write_whole(folder / "result.json", json.dumps(values, indent=2, allow_nan=False) + "\n")


PHASES = {
    "compose": "Python, Hydra, the config",
    "imports": "torch, Lightning",
    "data": "read, verified, split",
    "network": "built and drawn",
    "steps": "optimizer steps",
    "evaluation": "both splits, honestly",
    "checkpoints": "written, read back",
    "test": "best weights, test split",
    "figures": "drawn, saved",
    "tracking": "waiting for MLflow's sender",
    "rest": "Lightning's loop, journal, all else",
}

RESULT_NAMES = {
    "train_acc": "train/acc", "valid_acc": "valid/acc", "gap_acc": "gap/acc", "gap_acc_low": "gap/acc_low",
    "gap_acc_high": "gap/acc_high", "train_loss": "train/loss", "valid_loss": "valid/loss",
    "train_acc_running": "train/acc_running", "train_acc_clean": "train/acc_clean", "gap_acc_clean": "gap/acc_clean",
    "gap_acc_clean_low": "gap/acc_clean_low", "gap_acc_clean_high": "gap/acc_clean_high",
    "train_loss_clean": "train/loss_clean",
}  # fmt: skip


def print_summary(console: Console, result: RunResult, config: Config) -> None:
    """The table at the end of a run, and what to type next."""
    from rich import box
    from rich.markup import escape

    from gaplab.terminal import Table

    last = asdict(result)
    best = last["best"]
    table = Table(title=escape(run_name(config)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("", "epoch", "train", "valid", "gap, pp", "95 % interval", "test"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for label, row, epoch, test in (
        ("best valid", best, best["epoch"], result.test_acc),
        ("last epoch", last, result.epochs, None),
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
    batchnorm = f", BatchNorm {result.batchnorm}" if result.batchnorm else ""
    console.print(
        f"{result.epochs} epochs, {result.fit_s:.1f} s of training and measuring, "
        f"{result.total_s:.1f} s in all; "
        f"{result.params:,} parameters, {result.device}{batchnorm}",
        soft_wrap=True,
    )


def print_times(console: Console, result: RunResult) -> None:
    """Where the time went: `trainer.profile`."""
    from rich import box

    from gaplab.terminal import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("where the time went")
    for heading in ("seconds", "share"):
        table.add_column(heading, justify="right")
    table.add_column("", style="dim")
    known = {name: result.times.get(name, 0.0) for name in PHASES}
    whole = known["compose"] + result.total_s
    known["rest"] = max(0.0, whole - sum(known.values()))
    for name, seconds in known.items():
        table.add_row(name, f"{seconds:.2f}", f"{100 * seconds / whole:.1f} %", PHASES[name])
    console.print(table)
