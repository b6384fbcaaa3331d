"""What a person waits for: answers without work, the first optimizer step, the whole of a short run, and its memory.

    python benchmarks/startup.py [--turns 3]

Medians over fresh processes, in turns; MNIST, one epoch of the default network, MLflow tracking on, a new store and
data that were never read before (first), then the same store and data again (second). `minimal.py` does the same with
Lightning and its MLflow logger.
"""

import argparse
import tempfile
from pathlib import Path

from harness import PROJECT, TRAIN, first_step, keep, ratio, run, spread, timed

MINIMAL = PROJECT / "benchmarks" / "minimal.py"


def gaplab(outputs: Path) -> dict[str, float]:
    events, begun, seconds, peak = run(outputs, "model.bn=true", "trainer.max_epochs=1")
    return {"first step": first_step(events) - begun, "end": seconds, "peak memory, MB": peak}


def minimal(outputs: Path) -> dict[str, float]:
    begun, seconds, peak, output = timed(MINIMAL, outputs)
    return {"first step": float(output.split()[-1]) - begun, "end": seconds, "peak memory, MB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    for _ in range(turns):
        note("gaplab --help", timed(TRAIN, "--help")[1])
        note("gaplab, a wrong key", timed(TRAIN, "model.bnn=true")[1])
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            for which in ("first", "second"):
                for name, measure, folder in (("gaplab", gaplab, one), ("minimal", minimal, other)):
                    for figure, value in measure(Path(folder)).items():
                        note(f"{name}, {which} run, {figure}", value)
    ratios = {
        f"{run} run, {figure}": ratio(seen[f"gaplab, {run} run, {figure}"], seen[f"minimal, {run} run, {figure}"])
        for run in ("first", "second")
        for figure in ("first step", "end")
    }
    keep("startup", {"turns": turns, "seen": seen, "ratios": ratios})
    print("| figure | median (least–most), seconds |\n|---|---|")
    for name, values in seen.items():
        print(f"| {name} | {spread(values, 2)} |")
    for name, value in ratios.items():
        print(f"| gaplab / minimal, {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
