"""Which runs of a sweep may be trained as one. Nothing heavy is imported."""

from collections.abc import Sequence
from dataclasses import replace

from gaplab import config as configs
from gaplab.config import Config


def refusal(config: Config) -> str | None:
    """Why a run is trained alone, in the words of its config; None where it needs not be."""
    trainer = config.trainer
    if not config.model._target_.startswith("gaplab."):  # it may do what cannot be done for several at once
        return f"model._target_={config.model._target_}"
    if configs.world_size(trainer) > 1:
        return f"trainer.devices={trainer.devices}"
    if trainer.precision == "bf16-mixed":
        return "trainer.precision=bf16-mixed"
    if trainer.deterministic:
        return "trainer.deterministic=true"
    if trainer.accumulate_grad_batches > 1:
        return f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}"
    if trainer.log_activations_every:
        return f"trainer.log_activations_every={trainer.log_activations_every}"
    return None


def kind(config: Config) -> str:
    """What two runs must share to be trained as one: the shapes of all that is computed, and when."""
    chance = 0.5 if config.model.dropout else 0.0
    model = replace(config.model, dropout=chance, init="", init_gain=1.0, init_std=1.0)
    trainer = replace(config.trainer, max_epochs=1, early_stopping=None, gradient_clip_val=None, profile=False)
    return repr((model, replace(config.data, label_noise=0.0), trainer, config.allowed_targets))


def label(config: Config, count: int) -> str:
    """`count` runs as `config`, in words."""
    return f"{count} runs of {configs.run_name(replace(config, name=None)).rpartition(' ')[0]}"


def groups(config: Sequence[Config]) -> list[list[int]]:
    """The places of runs that may be trained as one, each place in one group; in order."""
    found: dict[str, list[int]] = {}
    for place, one in enumerate(config):
        found.setdefault(f"alone {place}" if refusal(one) else kind(one), []).append(place)
    return list(found.values())


def size(count: int, most: int, processes: int) -> int:
    """Of the largest of `shares`."""
    return max(shares(count, most, processes))


def shares(count: int, most: int, processes: int) -> list[int]:
    """Sizes of parts of `count` runs, at most `most` each, as equal as may be, and enough to keep `processes` busy."""
    parts = -(-count // most)
    parts = min(count, -(-parts // processes) * processes)
    return [count // parts + (number < count % parts) for number in range(parts)]
