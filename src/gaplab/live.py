"""What a sweep shows while it runs and at its end, read from its jobs' folders: the same whoever runs them."""

import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.text import Text

from gaplab.files import plain, read_json
from gaplab.notes import without_noise
from gaplab.terminal import Table
from gaplab.tracking.journal import read_journal

POLL_S = 0.5
SHOWN_FAILURES = 8
SHOWN_NOTES = 3


class LiveView:
    """Done, running, failed, time left and best so far: a display on a terminal, a line for each ended job elsewhere.

    Args:
        console: where to.
        folders: of the jobs that are to run.
        epochs: that each of them has.
    """

    def __init__(self, console: Console, folders: list[Path], epochs: list[int]) -> None:
        self._console = console
        self._epochs = dict(zip(folders, epochs, strict=True))
        self._results: dict[Path, dict[str, Any]] = {}
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> None:
        self._start = time.monotonic()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        terminal = self._console.is_terminal
        if terminal:
            self._live.start()
        stopped = False
        while not stopped:
            stopped = self._stop.wait(POLL_S)
            for folder in [folder for folder in self._epochs if folder not in self._results]:
                result = read_json(folder / "result.json")
                # one that was killed is gone on with, where the engine starts it again
                if ended(result) and (stopped or result["status"] != "KILLED"):
                    self._results[folder] = result
                    if not terminal:
                        self._console.print(self._line(folder, result), markup=False, soft_wrap=True)
            if terminal:
                self._live.update(self._display(), refresh=True)
        if terminal:
            self._live.stop()

    def _line(self, folder: Path, result: dict[str, Any]) -> str:
        head = f"{len(self._results)}/{len(self._epochs)}  {folder.name}"
        if result["status"] != "FINISHED":
            return plain(f"{head}  {result['status']}: {result.get('error') or 'interrupted'}")
        result = without_noise(result)
        return (
            f"{head}  train {result['train_acc']:.4f}  valid {result['valid_acc']:.4f}  "
            f"gap {100 * result['gap_acc']:+.2f} pp  {result['total_s']:.1f} s"
        )

    def _display(self) -> Group:
        running = {
            folder: epochs_done(folder)
            for folder in self._epochs
            if folder not in self._results and (folder / "splits.npz").is_file()
        }
        done = [result for result in self._results.values() if result["status"] == "FINISHED"]
        total = sum(self._epochs.values())
        covered = sum(self._epochs[folder] for folder in self._results) + sum(running.values())
        counts = Text(f"{len(done)} done, {len(running)} running, ")
        failed = len(self._results) - len(done)
        counts.append(f"{failed} failed", style="bold red" if failed else "")
        waiting = len(self._epochs) - len(self._results) - len(running)
        counts.append(f", {waiting} waiting   {_clock(time.monotonic() - self._start)} so far")
        if covered:
            left = (time.monotonic() - self._start) / covered * (total - covered)
            counts.append(f", about {_clock(left)} left")
        lines: list[Any] = [counts, ProgressBar(total=total, completed=covered, width=min(60, self._console.width))]
        lines += [
            Text(f"  {folder.name}  epoch {number}/{self._epochs[folder]}", style="dim")
            for folder, number in running.items()
        ]
        if done:
            best = max(self._results.items(), key=lambda pair: (pair[1].get("best") or {}).get("valid_acc", -1.0))
            lines.append(Text(f"best valid accuracy so far {best[1]['best']['valid_acc']:.4f}: {best[0].name}"))
        return Group(*lines)


def ended(result: dict[str, Any]) -> bool:
    return result.get("status") in ("FINISHED", "FAILED", "KILLED")


def epochs_done(folder: Path) -> int:
    """Epochs that are finished, those of earlier attempts included: the newest goes on with them."""
    number = 0
    for event in read_journal(folder):
        if event["event"] == "metrics" and "valid/acc" in event["values"]:
            number = event["step"]
    return number


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def print_jobs(console: Console, jobs: list[tuple[str, str, bool]]) -> None:
    """The jobs of a sweep: folder, run name, whether it is finished already."""
    table = Table("job", "run", "", box=box.SIMPLE_HEAD)
    for folder, name, finished in jobs:
        table.add_row(escape(folder), escape(name), "finished" if finished else "")
    console.print(table)


def print_outcome(
    console: Console,
    names: list[str],
    labels: list[str],
    results: list[dict[str, Any]],
    failed: list[bool],
    resume: str,
    report: str,
    problem: str | None,
) -> None:
    """A row for each condition, then what failed and what to type next.

    Args:
        console: where to.
        names: of the jobs' folders.
        labels: of each job's condition.
        results: `result.json` of each job, empty where there is none.
        failed: whether each job did not end as it should.
        resume, report: commands to type next.
        problem: what became of the launcher, if it gave up.
    """
    table = Table(title=f"{len(results)} jobs", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("last epoch, mean ± sd over seeds")
    for heading in ("seeds", "not finished", "train", "valid", "gap, pp", "test of best"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label in dict.fromkeys(labels):
        mine = [result for result, one in zip(results, labels, strict=True) if one == label]
        done = [without_noise(result) for result in mine if result.get("status") == "FINISHED"]
        table.add_row(
            escape(label),
            str(len(done)),
            str(len(mine) - len(done) or ""),
            *(_spread([result.get(name) for result in done], digits, factor) for name, digits, factor in (
                ("train_acc", 4, 1), ("valid_acc", 4, 1), ("gap_acc", 2, 100), ("test_acc", 4, 1))),
        )  # fmt: skip
    console.print(table)
    if any(result.get("gap_acc_clean") is not None for result in results):
        console.print("data.label_noise: train and gap count the labels without noise", soft_wrap=True)
    noted = Counter(note for result in results for note in result.get("notes", []))
    for note, count in noted.most_common(SHOWN_NOTES):
        console.print(f"note: {plain(note)} ({count} of {len(results)} jobs)", markup=False, soft_wrap=True)
    if len(noted) > SHOWN_NOTES:
        console.print(f"note: {len(noted) - SHOWN_NOTES} more notes in the result.json of the jobs", soft_wrap=True)
    bad = [(name, result) for name, result, lost in zip(names, results, failed, strict=True) if lost]
    for name, result in bad[:SHOWN_FAILURES]:
        why = f"{result.get('status')}: {result.get('error') or 'interrupted'}" if result else "not run"
        console.print(plain(f"{name}  {why}"), markup=False, soft_wrap=True)
    if len(bad) > SHOWN_FAILURES:
        console.print(f"… and {len(bad) - SHOWN_FAILURES} more")
    if problem:
        console.print(problem, markup=False, soft_wrap=True)
    if bad:
        console.print(f"go on     {resume}", markup=False, soft_wrap=True)
    console.print(f"next      {report}    (intervals, tests and verdicts)", markup=False, soft_wrap=True)


def _spread(values: list[Any], digits: int, factor: float) -> str:
    known = [factor * value for value in values if isinstance(value, int | float) and abs(value) < 1e100]
    if not known:
        return ""
    sd = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{sd}"
