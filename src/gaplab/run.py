"""A run under way, as it is handed to whoever trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gaplab.config import Config
from gaplab.result import RunResult
from gaplab.tracking.journal import Tracker

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Run:
    """A run that has a folder and a journal, and is yet to get a result.

    Attributes:
        config: checked.
        folder: its own, existing.
        tracker: its journal.
        result: filled in as things become known.
        started: `time.perf_counter()` when the command began.
        console: where to tell people of it.
    """

    config: Config
    folder: Path
    tracker: Tracker
    result: RunResult
    started: float
    console: Console
