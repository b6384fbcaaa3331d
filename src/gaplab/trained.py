"""What has been trained and can be asked: the network of a run, or a model of the registry, as one kind of thing."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaplab import config as configs
from gaplab.config import Config
from gaplab.errors import UserError
from gaplab.export import Probabilities, best_network
from gaplab.files import plain, read_json, read_text
from gaplab.finder import find_run
from gaplab.tracking.journal import read_receipt


@dataclass(frozen=True)
class Trained:
    """A classifier that has been trained.

    Attributes:
        name: for people.
        classes: names of the K classes.
        in_shape: (C, H, W).
        probabilities: raw uint8 images (B, C, H, W) -> float32 (B, K), as in evaluation.
        config: that it was trained with.
        digest: of the data that it was trained on.
        folder: of its run, if that is here.
        run_id: in MLflow, if it is there.
        result: of its run, or what its model keeps of it.
    """

    name: str
    classes: list[str]
    in_shape: tuple[int, int, int]
    probabilities: Callable[[Tensor], Tensor]
    config: Config
    digest: str
    folder: Path | None
    run_id: str | None
    result: dict[str, Any] = field(default_factory=dict)


def load(run: str | None, model: str | None, outputs: Path, uri: str | None, typed: Sequence[str]) -> Trained:
    """A run, or a model of the registry; neither means the latest run. Raises UserError.

    Args:
        run: as `finder.find_run` takes it.
        model: an address as `models:/gaplab@champion`.
        outputs: folder of runs and sweeps.
        uri: of the tracking store; None without one.
        typed: the overrides that a person typed, which alone may allow packages.
    """
    return load_run(run or "latest", outputs, uri, typed) if model is None else load_model(model, uri, typed)


def load_either(key: str, name: str, outputs: Path, uri: str | None, typed: Sequence[str]) -> Trained:
    """As `load`, by an address or a run's name alone, typed for `key`."""
    return load_model(name, uri, typed) if name.startswith("models:") else load_run(name, outputs, uri, typed, key)


def load_run(name: str, outputs: Path, uri: str | None, typed: Sequence[str] = (), key: str = "run") -> Trained:
    """The network of a run's best epoch; as `load`."""
    folder = find_run(outputs, name, key, "checkpoints/best.ckpt")
    if folder is not None:
        return _of_folder(folder, folder, read_receipt(folder).get("run_id"), typed)
    if uri is None:
        raise UserError(f"{key}={name}: no folder of it here, and tracking=none")
    from gaplab.tracking.store import download

    with tempfile.TemporaryDirectory(prefix="gaplab-") as target:
        download(uri, name, ["config.yaml", "checkpoints/best.ckpt", "checkpoints/best.ckpt.sha256"], Path(target))
        return _of_folder(Path(target), None, name, typed)


def _of_folder(source: Path, folder: Path | None, run_id: str | None, typed: Sequence[str]) -> Trained:
    config = configs.loads(read_text(source / "config.yaml"), str(source / "config.yaml"), typed)
    network, facts = best_network(source, config)
    model = Probabilities(network).eval()

    @torch.inference_mode()
    def probabilities(images: Tensor) -> Tensor:
        half = config.trainer.precision == "bf16-mixed"  # as it was trained and measured
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(images)

    return Trained(
        facts.name,
        facts.classes,
        (facts.in_shape[0], facts.in_shape[1], facts.in_shape[2]),
        probabilities,
        config,
        facts.digest,
        folder,
        run_id,
        read_json(source / "result.json"),
    )


def load_model(address: str, uri: str | None, typed: Sequence[str] = ()) -> Trained:
    """A model of the registry; as `load`. Its run's folder is not looked for."""
    if uri is None:
        raise UserError(f"model={address}: the registry is in MLflow, and tracking=none")
    from gaplab.tracking.registry import fetch

    with tempfile.TemporaryDirectory(prefix="gaplab-") as target:
        module, path, run_id = fetch(address, uri, Path(target))
        facts = read_json(path / "extra_files" / "facts.json")
        config = configs.loads(read_text(path / "extra_files" / "config.yaml"), address, typed)
        try:
            channels, height, width = (int(side) for side in facts["in_shape"])
            classes, digest = [str(name) for name in facts["classes"]], str(facts["digest"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{plain(address)}: not a model that gaplab has logged") from None
    result = facts.get("result")
    return Trained(
        f"{configs.run_name(config)} ({address})",
        classes,
        (channels, height, width),
        torch.inference_mode()(module),
        config,
        digest,
        None,
        run_id,
        result if isinstance(result, dict) else {},
    )


def check_same_kind(one: Trained, other: Trained) -> None:
    """Raises UserError unless both take the same pictures and know the same classes."""
    if one.in_shape != other.in_shape:
        raise UserError(f"{other.name}: takes pictures of {_shape(other)}, not of {_shape(one)}")
    if one.classes != other.classes:
        raise UserError(f"{other.name}: knows other classes than {one.name}")


def _shape(one: Trained) -> str:
    return "x".join(map(str, one.in_shape))
