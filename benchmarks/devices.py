"""Two devices beside one: seconds of an epoch, each process on one core with one thread, interleaved, as medians.

    python benchmarks/devices.py [--repeats 5] [--work cnn resnet] [--devices 1 2]

The parallel efficiency is seconds on 1 device / (N x seconds on N): 1 if nothing were lost. An epoch is training and
the honest evaluation of both splits, as `train.py` does it; a first epoch, in which memory is found, is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
WORK = {
    "mlp": ["model=mlp", "data.train_size=50000", "data.valid_size=10000"],
    "cnn": ["model=cnn", "data.train_size=6000", "data.valid_size=1000"],
    "resnet": ["model=resnet", "data.train_size=1000", "data.valid_size=200"],
}
SAID = ["model.bn=true", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.max_epochs=4", "data.batch_size=128",
        "tracking=none", "figures=false"]  # fmt: skip


def epoch_seconds(work: str, devices: int) -> float:
    """The median of one run's epochs but the first, from its journal."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, str(PROJECT / "src" / "train.py"), *SAID, *WORK[work]]
        subprocess.run(
            [*command, f"trainer.devices={devices}", f"paths.outputs={outputs}"], check=True, stdout=subprocess.DEVNULL
        )
        (journal,) = Path(outputs).glob("runs/*/journal.jsonl")
        events = [json.loads(line) for line in journal.read_text().splitlines()]
    seconds = [
        event["values"]["time/epoch_s"]
        for event in events
        if event["event"] == "metrics" and "time/eval_s" in event["values"]
    ]
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs="+", default=["cnn", "resnet"], choices=WORK)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    words = parser.parse_args()
    print("| network | devices | seconds an epoch (least to most) | times as fast | efficiency |")
    print("|---|---|---|---|---|")
    for work in words.work:
        seen: dict[int, list[float]] = {devices: [] for devices in words.devices}
        for _ in range(words.repeats):
            for devices, seconds in seen.items():
                seconds.append(epoch_seconds(work, devices))
        one = statistics.median(seen[words.devices[0]])
        for devices, seconds in seen.items():
            median = statistics.median(seconds)
            spread = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            efficiency = one / median * words.devices[0] / devices
            print(f"| {work} | {devices} | {spread} | {one / median:.2f} | {efficiency:.2f} |", flush=True)


if __name__ == "__main__":
    main()
