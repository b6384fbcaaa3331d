"""What is on pictures, by a trained network: `src/predict.py`."""

import csv
import glob
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gaplab import config as configs
from gaplab.config import MLflow, Predict
from gaplab.data.pictures import SUFFIXES, decode, few_levels, is_picture, is_system, kind_of, list_kinds
from gaplab.errors import UserError
from gaplab.files import plain, write_whole
from gaplab.terminal import Table
from gaplab.trained import Trained, load

Answer = tuple[str, list[tuple[str, float]]]  # a file, its most probable classes with their probabilities


def predict(settings: Predict, typed: Sequence[str] = ()) -> None:
    """Name the most probable classes of each picture. One that cannot be read is named on stderr and left out.

    Raises UserError when there is no picture, or none that can be read.
    """
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    files = find_files(settings.images)
    uri = settings.tracking.uri if isinstance(settings.tracking, MLflow) else None
    network = load(settings.run, settings.model_uri, outputs, uri, typed)
    if network.in_shape[1] != network.in_shape[2]:
        raise UserError(f"{network.name}: takes pictures that are not square, which files are not cut to")
    answers: list[Answer] = []
    left_out = 0
    largest: list[int] = []
    console = Console(stderr=True, highlight=False)
    with _bar(console, shown=len(files) > settings.batch_size) as bar:
        task = bar.add_task("", total=len(files))
        waiting = iter(files)
        while part := list(islice(waiting, settings.batch_size)):
            found, broken, values = _answer(network, part, settings.top_k)
            largest += values
            for name, reason in broken:
                console.print(f"left out: {plain(name)} ({reason})", markup=False, soft_wrap=True)
            answers += found
            left_out += len(broken)
            bar.advance(task, len(part))
    if not answers:
        raise UserError(f"images: none of {len(files)} pictures could be read")
    _say(answers, settings)
    if note := few_levels(largest)[1]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if left_out:
        console.print(f"{left_out} of {len(files)} pictures left out", markup=False)


def find_files(images: Any) -> list[str]:
    """The pictures that were typed, in that order; those of a folder or a pattern are sorted.

    Args:
        images: a file, a folder (looked through at any depth), a pattern, a list of these, or `-` for names on stdin.

    Raises UserError for what names nothing.
    """
    if images is None or images == [] or images == "":
        raise UserError("images: a value is needed; give images=<file, folder or pattern>, or images=- for stdin")
    found: list[str] = []
    for one in configs.listed(images):
        if one == "-":
            names = [line.rstrip("\n") for line in sys.stdin]
            found += [name for name in names if name]
            if not found:
                raise UserError("images=-: no names on stdin")
        else:
            found += _named(one)
    return found


def _named(name: str) -> list[str]:
    path = configs.folder("images", name)
    if path.is_dir():
        files = [
            file for file in path.rglob("*") if file.is_file() and not any(map(is_system, file.relative_to(path).parts))
        ]
        inside = sorted(str(file) for file in files if is_picture(file.name))
        if not inside:
            raise UserError(f"images={name}: no picture in this folder ({', '.join(sorted(SUFFIXES))})")
        if others := Counter(kind_of(file.name) for file in files if not is_picture(file.name)):
            print(f"not read: {list_kinds(others)}", file=sys.stderr)
        return inside
    if path.exists():
        return [name]
    matching = sorted(glob.glob(str(Path(name).expanduser()), recursive=True))
    if not matching:
        what = "nothing matches" if glob.has_magic(name) else "no such file or folder"
        raise UserError(f"images={name}: {what}")
    return [one for one in matching if Path(one).is_file()]


def _answer(network: Trained, names: list[str], top_k: int) -> tuple[list[Answer], list[tuple[str, str]], list[int]]:
    """What the pictures show, which could not be read and why, and the largest values of 16-bit ones."""
    good, pixels, largest, broken = [], [], [], []
    for name in names:
        try:
            if not Path(name).is_file():  # a pipe would keep us waiting
                raise OSError("no such file")
            image, value = decode(Path(name).expanduser(), network.in_shape[1], network.in_shape[0])
            good.append(name)
            pixels.append(image)
            largest.append(value)
        except Exception as error:  # of a file that is made to break decoders, it may be any
            broken.append((name, plain(str(error).partition("\n")[0] or type(error).__name__)))
    if not good:
        return [], broken, []
    values, places = network.probabilities(torch.stack(pixels)).topk(min(top_k, len(network.classes)))
    rows = zip(good, places.tolist(), values.double().tolist(), strict=True)
    return (
        [(name, [(network.classes[place], value) for place, value in zip(*row, strict=True)]) for name, *row in rows],
        broken,
        largest,
    )


def _bar(console: Console, shown: bool) -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def _say(answers: list[Answer], settings: Predict) -> None:
    text = {"table": _table, "json": _json, "csv": _csv}[settings.format](answers)
    if settings.output is None:
        print(text, end="", flush=True)
        return
    path = configs.folder("output", settings.output)
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"output={settings.output}: cannot be written ({error.strerror})") from None
    print(f"{len(answers)} pictures in {plain(path)}", file=sys.stderr)


def _table(answers: list[Answer]) -> str:
    table = Table(box=None, pad_edge=False)
    table.add_column("picture", overflow="fold")
    for rank in range(max(len(classes) for _, classes in answers)):
        table.add_column("answer" if rank == 0 else "", overflow="fold")
        table.add_column("", justify="right")
    for name, classes in answers:
        cells = [cell for one, value in classes for cell in (escape(plain(one)), f"{100 * value:.1f} %")]
        table.add_row(escape(plain(name)), *cells)
    console = Console(file=io.StringIO(), highlight=False, color_system=None)
    if not sys.stdout.isatty():
        console.width = 10_000
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def _json(answers: list[Answer]) -> str:
    rows: Iterator[dict[str, Any]] = (
        {"file": name, "predictions": [{"class": one, "probability": value} for one, value in classes]}
        for name, classes in answers
    )
    return json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n"


def _csv(answers: list[Answer]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "rank", "class", "probability"])
    for name, classes in answers:
        table.writerows([name, rank, one, f"{value:.6f}"] for rank, (one, value) in enumerate(classes, 1))
    return text.getvalue()
