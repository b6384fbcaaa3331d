"""The network of a run's best epoch as a model of its own: raw pixels in, probabilities out, nothing of gaplab needed.

Run as `python -m gaplab.export <run folder> <MLflow run id> <allowed package,…>`, with `MLFLOW_TRACKING_URI` in the
environment, it logs the model and prints its id. It ends with one line and status 2 when that can never be, with 3 when
a package of its config is not allowed, and with 1 when it may be later. A process of its own, as MLflow and
torch.export take seconds and a hundred MB.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaplab import config as configs
from gaplab.config import Config
from gaplab.errors import UserError
from gaplab.files import plain, read_json
from gaplab.nn.build import Network, build_network
from gaplab.notes import without_noise
from gaplab.training.reader import read_checkpoint, sha256

EXAMPLE = "example.npy"
BATCHES = (1, 2, 7)  # sizes that must give what the network gives
TOLERANCE = 1e-6  # of a probability


class Probabilities(nn.Module):
    """Raw uint8 images (B, C, H, W) -> float32 probabilities (B, K), each row of sum 1."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).float().softmax(1)


@dataclass(frozen=True)
class Facts:
    """What must be known of a model to use it: `in_shape` (C, H, W); `digest` is that of the data trained on."""

    name: str
    classes: list[str]
    in_shape: list[int]
    digest: str
    epoch: int


def best_network(folder: Path, config: Config) -> tuple[Network, Facts]:
    """The network of `best.ckpt` in a run's folder, in eval mode on the CPU. Raises UserError."""
    path = folder / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise UserError(f"{plain(folder)}: no checkpoints/best.ckpt there; the run has not finished an epoch")
    checkpoint = read_checkpoint(path)
    try:
        said = checkpoint["hyper_parameters"]
        facts = Facts(
            configs.run_name(config),
            [str(name) for name in said["classes"]],
            [int(size) for size in said["in_shape"]],
            str(said["data"]),
            int(checkpoint["progress"]["epochs"]),
        )
        in_shape = (facts.in_shape[0], facts.in_shape[1], facts.in_shape[2])
        network = build_network(
            asdict(config.model), in_shape, len(facts.classes), allowed_targets=tuple(config.allowed_targets)
        )
        if config.trainer.precision == "64-true":
            network.double()
        state = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{plain(path)}: not of the network that config.yaml says ({plain(reason)[:200]})") from None
    return network.eval().requires_grad_(False), facts


def log(folder: Path, run_id: str, allowed_targets: list[str], uri: str) -> str:
    """Log a run's best network to the MLflow run; the model's id. One that is logged already is not logged again.

    Args:
        folder: of the run.
        run_id: MLflow's.
        allowed_targets: packages that the run's config may name; it is somebody else's word.
        uri: of the tracking store.

    Raises UserError, and whatever MLflow or the network come up with.
    """
    config = _load_config(folder, allowed_targets)
    network, facts = best_network(folder, config)
    from gaplab.tracking import registry

    model = Probabilities(network).eval()
    with tempfile.TemporaryDirectory(prefix="gaplab-") as name:
        files = _extra_files(Path(name), folder, config, facts)
        return registry.log_model(
            uri, model, _example(folder, facts), run_id, facts.epoch, weights_of(folder), files, _verify
        )


def _load_config(folder: Path, allowed_targets: list[str]) -> Config:
    config = replace(configs.load(folder / "config.yaml"), allowed_targets=allowed_targets)
    configs.check(config)
    return config


def weights_of(folder: Path) -> str:
    """SHA-256 of the best epoch's checkpoint in a run's folder."""
    return sha256(folder / "checkpoints" / "best.ckpt")


def _example(folder: Path, facts: Facts) -> np.ndarray:
    """Two pictures or more: of one alone, torch.export would make a model that takes one at a time."""
    try:
        example = np.load(folder / EXAMPLE, allow_pickle=False)
    except (OSError, ValueError):
        example = np.zeros(0)
    if example.dtype != np.uint8 or list(example.shape[1:]) != facts.in_shape or not len(example):
        example = np.random.default_rng(0).integers(0, 256, (2, *facts.in_shape), dtype=np.uint8)
    return np.resize(example, (2, *facts.in_shape))


def _verify(exported: nn.Module, model: nn.Module, example: np.ndarray) -> None:
    """Raises UserError unless the exported model says what the network says, whatever the number of pictures."""
    for size in BATCHES:
        images = torch.from_numpy(np.resize(example, (size, *example.shape[1:])))
        with torch.no_grad():
            one, other = exported(images), model(images)
        if one.shape != other.shape or not (one - other).abs().max() <= TOLERANCE:
            raise UserError(f"the exported model does not say what the network says of {size} pictures; not logged")


def _extra_files(target: Path, folder: Path, config: Config, facts: Facts) -> list[Path]:
    """The model card and what a program needs to know, to lie beside the model."""
    result = read_json(folder / "result.json")
    (target / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
    (target / "facts.json").write_text(json.dumps(asdict(facts) | {"result": _plain(result)}, indent=1) + "\n")
    (target / "README.md").write_text(card(config, facts, result), encoding="utf-8")
    figures = [folder / "figures" / f"{name}.png" for name in ("learning_curves", "confusion_matrix")]
    return [target / name for name in ("README.md", "facts.json", "config.yaml")] + [
        path for path in figures if path.is_file() and not path.is_symlink()
    ]


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("seed", "condition", "config_hash", "epochs", "params", "best", "test_acc", "test_loss", "device")
    return {name: result[name] for name in kept if name in result}


def card(config: Config, facts: Facts, result: dict[str, Any]) -> str:
    """The model card, in Markdown: what it is, how good, how to call it, where it ends."""
    from jinja2 import Environment, FileSystemLoader

    best = without_noise(result.get("best") or {})
    labels = ", labels without label noise" if "gap_acc_clean" in best else ""
    known = {
        f"train accuracy{labels}": best.get("train_acc"),
        "validation accuracy": best.get("valid_acc"),
        "test accuracy": result.get("test_acc"),
    }
    measured = {name: f"{value:.4f}" for name, value in known.items() if isinstance(value, float)}
    gap, low, high = (best.get(name) for name in ("gap_acc", "gap_acc_low", "gap_acc_high"))
    if isinstance(gap, float) and isinstance(low, float) and isinstance(high, float):
        measured[f"overfitting gap, pp{labels}"] = (
            f"{100 * gap:+.2f}, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
        )
    settings = {
        name: configs.masked(plain(value)).replace("|", "/")
        for name, value in configs.flatten(config).items()
        if configs.decides(name)
    }
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True)
    shown = replace(facts, name=plain(facts.name), classes=[plain(name) for name in facts.classes])
    return template.get_template("card.md").render(
        facts=shown, data=plain(config.data.name), measured=measured, settings=settings
    )


def main(folder: Path, run_id: str, allowed_targets: list[str]) -> int:
    from gaplab.tracking.registry import is_permanent, reason

    torch.set_num_threads(1)  # it runs beside other work
    uri = os.environ["MLFLOW_TRACKING_URI"]  # not an argument: it may hold a password
    try:
        _load_config(folder, allowed_targets)
    except UserError as error:
        print(plain(error), file=sys.stderr)
        return 3
    try:
        print(log(folder, run_id, allowed_targets, uri))
    except UserError as error:
        print(plain(error), file=sys.stderr)
        return 2
    except Exception as error:  # of MLflow, the network, the disk, the exporter
        print(reason(error, uri), file=sys.stderr)
        return 2 if is_permanent(error) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")))
