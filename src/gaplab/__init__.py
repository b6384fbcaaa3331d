"""gaplab: how large is a classifier's overfitting gap, what closes it, and is the difference real?

As a library: `from gaplab import compare, compose, gap, Score, train`; docs/library.md shows them at work. Importing
gaplab imports none of what it is made of; each name does so when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gaplab.config import Config
    from gaplab.errors import TrainingError, UserError
    from gaplab.metrics import Gap, Score, gap
    from gaplab.result import RunResult
    from gaplab.stats import Contrast

__all__ = ["Config", "Contrast", "Gap", "RunResult", "Score", "TrainingError", "UserError", "compare", "compose", "gap",
           "train"]  # fmt: skip
_HOMES = {
    "Config": "config", "Contrast": "stats", "Gap": "metrics", "RunResult": "result", "Score": "metrics",
    "TrainingError": "errors", "UserError": "errors", "gap": "metrics",
}  # fmt: skip


def compose(*overrides: str) -> Config:
    """The typed, checked config that `python src/train.py <overrides>` would run.

    Args:
        overrides: `key=value` and `group=choice`, as typed: `compose("model.bn=true", "data.train_size=2000")`.

    Raises:
        UserError: a key or value is wrong; its text is the line that the command would print.
    """
    from hydra import compose, initialize_config_dir

    from gaplab import config as configs
    from gaplab.cli import explain
    from gaplab.errors import UserError

    configs.register()
    try:
        with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
            return configs.from_hydra(compose("train", list(overrides)), overrides)
    except UserError:
        raise
    except Exception as error:  # Hydra's and OmegaConf's are of many kinds, with the sentence somewhere inside
        raise UserError(explain(error)) from error


def train(config: Config) -> RunResult:
    """Train the network that `config` says and measure its gap.

    It is the run that `python src/train.py` makes, with its folder, its checkpoints and its MLflow run, and prints what
    that prints.

    Returns:
        What `result.json` holds: accuracies and gaps as fractions in [0, 1], losses in nats, times in seconds.

    Raises:
        UserError: the config asks for what cannot be had, or for `resume` or `tracking.register`, which are the
            command's alone.
        TrainingError: the run failed; it is recorded as FAILED.
    """
    from gaplab.config import registers
    from gaplab.errors import UserError
    from gaplab.launch import launch

    if config.resume is not None:
        raise UserError("resume: goes on with a run's own config; python src/train.py resume=… does that")
    if registers(config):
        raise UserError("tracking.register=true: python src/train.py does that; or python src/promote.py run=…")
    return launch(config)


def compare(
    first: Mapping[int, float], second: Mapping[int, float], margin: float = 0.002, name: str = "second - first"
) -> Contrast:
    """Whether `second - first`, paired by seed, is real, equivalent to none, or inconclusive.

    Args:
        first, second: {seed: value}, such as `{run.seed: run.gap_acc}`; seeds that only one of them has are left out.
        margin: largest difference that counts as none, in the values' unit: 0.002 is 0.2 percentage points.
        name: of the contrast.

    Returns:
        The verdict with mean difference, 95 % interval, p values, and the seeds that would decide it. Fewer than 6
        seeds never decide. It is a family of its own; for several at once, `gaplab.stats.compare` corrects.

    Raises:
        ValueError: a value is not finite.
    """
    from gaplab import stats

    differences = [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]
    return stats.compare({name: differences}, margin)[0]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
