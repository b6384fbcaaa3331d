"""Sweeps over seeds: one after another, in processes, and trained as one (hydra/launcher=fused), side by side.

    python benchmarks/fused.py [--most 256]

Each sweep is the command as a person types it, from start to end, with checkpoints and journals and without MLflow; its
seconds are divided by its runs. Those of 16 runs are repeated in turns, and medians taken; the longest leaves out one
after another. An hour on an idle machine. Then the peak memory of a process that trains so many as one, whatever is
faster.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from harness import HERE, TRAIN, keep, timed

SHORT = ["data.batch_size=32", "trainer.max_epochs=2"]
SWEEPS = {
    "mlp, batch 32": ["model=mlp", "data.batch_size=32", "data.train_size=10000", "trainer.max_epochs=5"],
    "mlp, batch 128": ["model=mlp", "data.batch_size=128", "data.train_size=20000", "trainer.max_epochs=8"],
    "cnn, batch 32": ["model=cnn", "data.train_size=2000", *SHORT],
    "resnet, batch 32": ["model=resnet", "model.depth=8", "data.train_size=1000", *SHORT],
}
MOST = {"mlp, batch 32": 256, "mlp, batch 128": 64, "cnn, batch 32": 16, "resnet, batch 32": 16}
NUMBERS = (1, 4, 16, 64, 256)
LONG = 256
TURNS = {16: 2}  # else one
ENGINES = {"one by one": "basic", "processes": "joblib", "fused": "fused"}
COMMON = ["model.bn=true", "data.valid_size=1000", "figures=false", "tracking=none"]


def sweep(words: list[str], number: int, engine: str) -> tuple[float, str]:
    """Seconds of a run, and what the launcher said of the trial."""
    with tempfile.TemporaryDirectory() as outputs:
        seeds = f"seed={','.join(map(str, range(number)))}"
        _, seconds, _, said = timed(
            TRAIN, "-m", *COMMON, *words, seeds, f"hydra/launcher={engine}", f"paths.outputs={outputs}"
        )
    reason = next((line for line in said.splitlines() if f"{number} runs of" in line), "")
    return seconds / number, reason


def peak(number: int) -> float:
    """MB of a process that trains so many of the small network as one."""
    with tempfile.TemporaryDirectory() as outputs:
        return timed(HERE / "fused.py", "--peak", str(number), outputs)[2]


def train(number: int, outputs: Path) -> None:
    """Train them in this process."""
    sys.path.insert(0, str(HERE.parent / "src"))
    from hydra import compose, initialize_config_dir

    from gaplab import config as configs
    from gaplab import sweep as sweeps

    configs.register()
    words = ["trainer.max_epochs=1", "data.train_size=2000", "trainer.threads=1", f"paths.outputs={outputs}"]
    with initialize_config_dir(str(HERE.parent / "conf"), version_base="1.3"):
        first = configs.from_hydra(compose("train", [*COMMON, *words]))
    folder = outputs / "sweeps" / "one"
    folder.mkdir(parents=True)
    jobs = [sweeps.Job(folder / str(seed), [f"seed={seed}"], replace(first, seed=seed)) for seed in range(number)]
    sweeps._save(folder, jobs, [])
    if problems := sweeps.run_together([job.folder for job in jobs]):
        raise RuntimeError(str(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=256, help="runs of a sweep")
    parser.add_argument("--peak", nargs=2, metavar=("NUMBER", "OUTPUTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        train(int(given.peak[0]), Path(given.peak[1]))
        return
    rows = []
    for name, words in SWEEPS.items():
        for number in (one for one in NUMBERS if one <= min(given.most, MOST[name])):
            engines = {label: one for label, one in ENGINES.items() if number < LONG or one != "basic"}
            taken: dict[str, list[float]] = {label: [] for label in engines}
            said = set()
            for _ in range(TURNS.get(number, 1)):
                for label, engine in engines.items():
                    seconds, reason = sweep(words, number, engine)
                    taken[label].append(seconds)
                    said |= {reason.partition(": ")[2]} - {""}
            rows.append({"network": name, "runs": number, "seconds": taken, "said": sorted(said)})
            medians = {label: statistics.median(seconds) for label, seconds in taken.items()}
            least = min(seconds for label, seconds in medians.items() if label != "fused")
            shown = " | ".join(f"{medians[label]:.2f}" if label in medians else "" for label in ENGINES)
            print(f"| {name} | {number} | {shown} | {medians['fused'] / least:.2f} | {'; '.join(said)} |", flush=True)
    memory = {number: peak(number) for number in NUMBERS if number <= max(given.most, 64)}
    print("MB: " + ", ".join(f"{number} as one {megabytes:.0f}" for number, megabytes in memory.items()))
    keep("fused", {"rows": rows, "memory": memory})


if __name__ == "__main__":
    main()
