"""What more data, more runs and tracking cost.

    python benchmarks/scale.py [--turns 3] [--samples 10000 100000 1000000 6000000] [--runs 1000] [--only resident …]

  resident   seconds and memory of an epoch against the number of samples, which are made, not stored
  streamed   pictures beyond the memory budget, decoded while training, beside the bare decoder
  tracking   epochs of about a second with MLflow and without
  store      the first step of a run beside an empty store, and beside one that holds many runs

Each run is a fresh process; turns are interleaved.
"""

import argparse
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from harness import first_step, keep, median, ratio, run, spread
from PIL import Image, ImageOps

VALID = 1000
EPOCHS = {10_000: 30, 100_000: 6, 1_000_000: 2}  # more samples: 1, and no figure of a first epoch is left out
PIXELS = 28 * 28


def epochs(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [event["values"] for event in events if "time/epoch_s" in event.get("values", {})]


def made(samples: int) -> Iterator[str]:
    """The words for that many grey pictures of 28 x 28, without a file."""
    yield from ("allowed_targets=[gaplab,torch,torchvision,made]", "data._target_=made.Pictures", "data.name=made")
    for part, count in (("train", samples + VALID), ("test", 1000)):
        yield from (f"+data.{part}_kwargs.samples={count}", f"+data.{part}_kwargs.side=28")
        yield from (f"+data.{part}_kwargs.channels=1", f"~data.{part}_kwargs.train")
    yield from ("data.num_train=null", f"data.valid_size={VALID}", f"data.train_size={samples}")


def resident(turns: int, sizes: list[int]) -> dict[str, Any]:
    rows = {size: {"steps_s": [], "epoch_s": [], "peak_mb": []} for size in sizes}
    for _ in range(turns):
        for size, row in rows.items():
            number = EPOCHS.get(size, 1)
            with tempfile.TemporaryDirectory() as outputs:
                words = ("model.bn=true", "tracking=none", "figures=false", f"trainer.max_epochs={number}", *made(size))
                events, _, _, peak = run(Path(outputs), *words)
            seen = epochs(events)[1:] or epochs(events)
            row["steps_s"].append(median([one["time/epoch_s"] - one["time/eval_s"] for one in seen]))
            row["epoch_s"].append(median([one["time/epoch_s"] for one in seen]))
            row["peak_mb"].append(peak)
    print("| samples | training, s | per million samples | whole epoch | peak memory, MB |\n|---|---|---|---|---|")
    for size, row in rows.items():
        each = [seconds * 1e6 / size for seconds in row["steps_s"]]
        print(
            f"| {size} | {spread(row['steps_s'])} | {spread(each, 2)} | {spread(row['epoch_s'])} | "
            f"{median(row['peak_mb']):.0f} |"
        )
    least, most = min(sizes), max(sizes)
    more = (median(rows[most]["peak_mb"]) - median(rows[least]["peak_mb"])) * 2**20 / (most - least)
    print(f"bytes per further sample: {more:.0f}, {more / PIXELS:.3f} of its size as uint8")
    return {"rows": [{"samples": size, **row} for size, row in rows.items()], "bytes": more, "of_uint8": more / PIXELS}


def streamed(turns: int) -> dict[str, Any]:
    """Pictures a second: while a small network trains, and of a pool of processes that only decode."""
    seen: dict[str, list[float]] = {"bare": [], "training": []}
    with tempfile.TemporaryDirectory() as folder:
        root, cores = Path(folder) / "pictures", len(os.sched_getaffinity(0))
        write_pictures(root)
        files = sorted(root.rglob("*.jpg"))
        words = ["data=image_folder", f"data.root={root}", "data.image_size=32", "data.memory_budget_gb=0.0001"]
        words += ["data.train_size=3500", "data.valid_size=100", f"data.workers={cores}", "trainer.max_epochs=3"]
        for _ in range(turns):
            with multiprocessing.Pool(cores) as pool:
                pool.map(decoded, files[:100])  # its processes have begun
                start = time.perf_counter()
                pool.map(decoded, files, chunksize=16)
                seen["bare"].append(len(files) / (time.perf_counter() - start))
            events, *_ = run(Path(folder), "model.bn=true", "tracking=none", "figures=false", *words)
            rates = [3500 / (one["time/epoch_s"] - one["time/eval_s"]) for one in epochs(events)]
            seen["training"].append(median(rates))
    found = ratio(seen["training"], seen["bare"])
    for name, values in seen.items():
        print(f"pictures a second, {name}: {spread(values, 0)}")
    print(f"training / bare decoder: {found:.2f}")
    return {"seen": seen, "ratio": found}


def decoded(path: Path) -> "np.ndarray":
    with Image.open(path) as opened:
        return np.array(ImageOps.fit(opened.convert("RGB"), (32, 32), Image.Resampling.BILINEAR))


def write_pictures(root: Path) -> None:
    """JPEG files of photographs' size, two classes."""
    rng = np.random.default_rng(0)
    for name in ("one", "other"):
        (root / "train" / name).mkdir(parents=True)
        for number in range(2000):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(root / "train" / name / f"{number}.jpg")


def tracking(turns: int) -> dict[str, Any]:
    """The same run of one-second epochs, with MLflow in a new store and without."""
    seen: dict[str, list[float]] = {"none": [], "mlflow": []}
    for _ in range(turns):
        for name, values in seen.items():
            with tempfile.TemporaryDirectory() as outputs:
                words = ["model.bn=true", f"tracking={name}", "figures=false", "data.train_size=55000"]
                words += ["data.batch_size=32", "trainer.max_epochs=12"]
                events, *_ = run(Path(outputs), *words)
            ends = [event["time"] for event in events if "time/epoch_s" in event.get("values", {})]
            values.append(
                median([later - earlier for earlier, later in pairwise(ends)])
            )  # journal, checkpoints and all
    found = ratio(seen["mlflow"], seen["none"])
    print(f"seconds an epoch, without tracking {spread(seen['none'])}, with {spread(seen['mlflow'])}: {found:.3f}")
    return {"seen": seen, "ratio": found}


def store(turns: int, runs: int) -> dict[str, Any]:
    """Seconds from the command to the first optimizer step, and to the end of the command."""
    seen: dict[str, list[float]] = {f"{kind}, {figure}": [] for kind in ("empty", "full") for figure in ("step", "end")}
    with tempfile.TemporaryDirectory() as folder:
        full, words = Path(folder) / "full", ["trainer.max_epochs=1", "data.train_size=1000", "figures=false"]
        fill(full, runs)
        for turn in range(turns):
            for kind, outputs in (("empty", Path(folder) / f"empty{turn}"), ("full", full)):
                if kind == "empty":
                    run(outputs, *words)
                events, begun, seconds, _ = run(outputs, *words)
                seen[f"{kind}, step"].append(first_step(events) - begun)
                seen[f"{kind}, end"].append(seconds)
    ratios = {figure: ratio(seen[f"full, {figure}"], seen[f"empty, {figure}"]) for figure in ("step", "end")}
    for name, values in seen.items():
        print(f"store of {runs if 'full' in name else 1} runs, seconds to the {name.split()[-1]}: {spread(values, 2)}")
    print(f"full / empty: {ratios}")
    return {"runs": runs, "seen": seen, "ratios": ratios}


def fill(outputs: Path, runs: int) -> None:
    """Many runs, in folders and in the store: one that was run, and copies of it under other names."""
    run(outputs, "trainer.max_epochs=2", "data.train_size=1000", "figures=false")
    (first,) = (outputs / "runs").iterdir()
    for number in range(1, runs):
        shutil.copytree(first, outputs / "runs" / f"{first.name}{number:05}", ignore=shutil.ignore_patterns("*.ckpt*"))
    logging.disable(logging.INFO)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "gaplab")
    (like,) = client.search_runs([experiment.experiment_id])
    now = int(time.time() * 1000)
    for number in range(1, runs):
        copy = client.create_run(experiment.experiment_id, run_name=f"copy {number}", tags={"condition": "copied"})
        metrics = [Metric(key, value, now, 1) for key, value in like.data.metrics.items()]
        params = [Param(key, value) for key, value in like.data.params.items()]
        client.log_batch(copy.info.run_id, metrics, params)
        client.set_terminated(copy.info.run_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--samples", nargs="+", type=int, default=[10_000, 100_000, 1_000_000, 6_000_000])
    parser.add_argument("--runs", type=int, default=1000)
    names = ("resident", "streamed", "tracking", "store")
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    words = parser.parse_args()
    measures = {
        "resident": lambda: resident(words.turns, words.samples),
        "streamed": lambda: streamed(words.turns),
        "tracking": lambda: tracking(words.turns),
        "store": lambda: store(words.turns, words.runs),
    }
    for name in words.only:
        keep(name, {"turns": words.turns} | measures[name]())


if __name__ == "__main__":
    main()
