"""From a model config to a network that takes raw pixels."""

from typing import Any

import torch
from torch import Tensor, nn

from gaplab.errors import UserError
from gaplab.nn.blocks import Layers, Normalize
from gaplab.nn.init import init_
from gaplab.targets import accepted, load_class

TOGGLES = ("bn", "bn_position", "bn_momentum", "bn_eps", "dropout", "activation")
INITIAL = ("init", "init_gain", "init_std")


class Network(nn.Module):
    """Normalization and a network in one: raw uint8 images (B, C, H, W) -> logits (B, K)."""

    def __init__(self, normalize: Normalize, body: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.normalize(images))


def plan(
    model: dict[str, Any], in_shape: tuple[int, int, int], num_classes: int, allowed_targets: tuple[str, ...]
) -> tuple[type, dict[str, Any]]:
    """The class of `build_network`'s network, and the arguments that it is built with."""
    target = model["_target_"]
    network_class = load_class(target, allowed_targets, nn.Module, "model._target_")
    own = {
        name: value for name, value in model.items() if name not in (*TOGGLES, *INITIAL, "_target_", "name", "kwargs")
    }
    layers = Layers(**{name: model[name] for name in TOGGLES})
    offered = {"in_shape": tuple(in_shape), "num_classes": num_classes, "layers": layers, **own}
    arguments = accepted(network_class, offered) | model["kwargs"]
    if "layers" not in arguments and (model["bn"] or model["dropout"]):
        raise UserError(
            f"model._target_={target}: takes no argument `layers`, so model.bn and model.dropout cannot act in it; "
            "switch them off, or build its layers with it"
        )
    return network_class, arguments


def build_network(
    model: dict[str, Any],
    in_shape: tuple[int, int, int],
    num_classes: int,
    seed: int = 0,
    allowed_targets: tuple[str, ...] = ("gaplab", "torch", "torchvision", "lightning"),
) -> Network:
    """The network that a model config describes, with its initial weights.

    Args:
        model: the keys of the config group `model`, or a checkpoint's `hyper_parameters["model"]`.
        in_shape: (C, H, W) of a picture.
        num_classes: K.
        seed: the run's seed.
        allowed_targets: packages that `model["_target_"]` may name.

    Raises UserError when the class cannot be reached or built, or takes no `layers` while a toggle is on.
    """
    network_class, arguments = plan(model, in_shape, num_classes, allowed_targets)
    with torch.random.fork_rng(
        devices=[]
    ):  # constructors draw weights that init_ replaces; leave the run's stream alone
        torch.manual_seed(seed)
        try:
            body = network_class(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"model._target_={model['_target_']}: {error}") from None
    init_(body, model["init"], model["init_gain"], model["init_std"], model["activation"], seed)
    network = Network(Normalize(in_shape[0]), body)
    if network_class.__module__.partition(".")[0] in (
        "gaplab",
        "torchvision",
    ):  # another's may take views of its tensors
        network.to(memory_format=torch.channels_last)  # torch's convolutions are faster so, on CPU too
    return network
