"""What a person waits for: answers without work, the first optimizer step, the whole of a short run, and its memory.

    python benchmarks/startup.py [--repeats 3]

Medians over fresh processes; MNIST, one epoch of the default network, MLflow tracking on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "src" / "train.py"


def timed(*arguments: str) -> tuple[float, float, float]:
    """Unix time of the start, seconds, and peak resident memory in MB of `python src/train.py …`."""
    begun, start = time.time(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    return begun, time.perf_counter() - start, usage.ru_maxrss / 1024


def short_run() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as outputs:
        begun, seconds, peak = timed(f"paths.outputs={outputs}", "model.bn=true", "trainer.max_epochs=1")
        (journal,) = Path(outputs).glob("runs/*/journal.jsonl")
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        values = {name: value for event in events for name, value in event.get("values", {}).items()}
        when = {event["event"]: event["time"] for event in reversed(events)}  # the first of each kind
    config = when["run"] - begun
    first_step = config + float(values["time/to_first_step_s"])
    return {
        "config composed and checked, s": config,
        "torch, Lightning, data, network ready, s": when["params"] - begun,
        "first optimizer step, s": first_step,
        "end of the run, s": seconds,
        "peak memory, MB": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    runs = [
        {"--help, s": timed("--help")[1], "a wrong key, s": timed("model.bnn=true")[1], **short_run()}
        for _ in range(repeats)
    ]
    print("| figure | median | min-max |\n|---|---|---|")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f}-{max(values):.2f} |")


if __name__ == "__main__":
    main()
