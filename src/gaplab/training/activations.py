"""Looks at the activations of a network while it is trained, and at BatchNorm as the identity.

Shapes: B samples, units D of a dense layer or channels C of a convolutional one; "unit" means either.
"""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gaplab.training.classifier import Classifier

SAMPLES = 256
IDENTITY_SAMPLES = 32
MAX_VALUES = 20_000  # of a layer, for its percentiles
CONSTANT = 1e-6  # a unit whose output varies by no more is dead
PERCENTILES = {"p15": 0.15, "p50": 0.50, "p85": 0.85}

log = logging.getLogger(__name__)


class ActivationsCallback(Callback):
    """Looks at the activations before the first optimizer step and after every `every`-th one, whatever the chunk size.

    Args:
        images: uint8 (B, C, H, W), the same in every look.
        every: optimizer steps between two looks.
        kinds: classes of the activation functions to look at.
        record: called with the values of a look, by their public names (see `look`), and its optimizer step.

    Attributes:
        history: optimizer step and values of each look; empty where there is nothing to look at.
    """

    def __init__(
        self,
        images: Tensor,
        every: int,
        kinds: tuple[type[nn.Module], ...],
        record: Callable[[dict[str, float], int], None],
    ) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []
        self._images = images
        self._every = every
        self._kinds = kinds
        self._record = record

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        network, self._images = pl_module.network, self._images.to(pl_module.device)
        if len(self._images) < 2:
            log.warning("activations are not logged: the valid split has one sample, and a batch needs two")
            return

        def on_step(step: int) -> None:
            if step % self._every == 0:
                self._keep(look(network, self._images, self._kinds), step)

        if not self.history:  # a run that goes on has had it
            with trainer.precision_plugin.forward_context():  # training_step, where the others are, is in it already
                first = look(network, self._images, self._kinds)
            if not first:
                names = ", ".join(f"nn.{kind.__name__}" for kind in self._kinds)
                log.warning("activations are not logged: the network calls none of %s", names)
                return
            self._keep(first, pl_module.at.steps)
        pl_module.after_step.append(on_step)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [(step, values) for step, values in state_dict["history"]]

    def _keep(self, values: dict[str, float], step: int) -> None:
        self.history.append((step, values))
        self._record(values, step)


def look(network: nn.Module, images: Tensor, kinds: tuple[type[nn.Module], ...]) -> dict[str, float]:
    """What goes into each activation function, and how many units are dead, on one batch of images.

    `act/<n>/p15`, `p50` and `p85`, n from 1: percentiles of the input of the n-th call, over all units and samples (at
    most about `MAX_VALUES` of them, evenly spread); a module that is called twice counts twice. `act/<n>/dead`: the
    share of units whose output is constant over the batch (a channel: and over all positions). `act/unit/p15` … : the
    same percentiles of a single unit, the first one of the last call. {} when no module of `kinds` is called.

    BatchNorm normalizes with the batch's own statistics, as in training; dropout is off. Nothing is changed by it: no
    weight, no running statistic, no mode, no gradient, and no random stream.

    References:
        Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        2015, arXiv:1502.03167, figure 1 (b, c).
    """
    levels: list[Tensor] = []
    dead: list[Tensor] = []
    unit: list[Tensor] = []  # of the newest call

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (*args, *kwargs.values())[0]  # the function may be about to overwrite it
        levels.append(_percentiles(x))
        unit[:] = [_percentiles(x[:, :1])]

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        dead.append(_dead_share(output))

    modes = [(module, module.training) for module in network.modules()]
    norms = [(norm, norm.track_running_stats) for norm in network.modules() if isinstance(norm, _BatchNorm)]
    handles = []
    for module, _ in modes:
        if isinstance(module, kinds):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    device = images.device
    try:
        network.eval()
        for norm, _ in norms:  # in training, without running statistics to move: the batch's own
            norm.training, norm.track_running_stats = True, False
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            network(images)
    finally:
        for norm, tracks in norms:
            norm.track_running_stats = tracks
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
        if torch.is_autocast_enabled(device.type):  # older torch: copies of weights without gradients, pytorch#112583
            torch.clear_autocast_cache()
    if not levels:
        return {}
    rows = torch.cat([torch.stack(levels), torch.stack(dead)[:, None]], dim=1).tolist()  # the one wait for a GPU
    values = {
        f"act/{number}/{name}": value
        for number, row in enumerate(rows, 1)
        for name, value in zip((*PERCENTILES, "dead"), row, strict=True)
    }
    return values | {f"act/unit/{name}": value for name, value in zip(PERCENTILES, unit[0].tolist(), strict=True)}


def _percentiles(x: Tensor) -> Tensor:
    """Of (B, D) or (B, C, ...), over all its values or an even part of them, interpolated linearly: (3,)."""
    stride = -(-x.numel() // MAX_VALUES)
    while math.gcd(stride, x.numel()) > 1:  # a stride that shares a factor with C, H or W would skip some of theirs
        stride += 1
    values = x.movedim(1, -1).reshape(-1)[::stride]  # a view of what a convolution gives, in channels_last
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.quantile(torch.tensor(list(PERCENTILES.values()), dtype=values.dtype, device=values.device))


def _dead_share(output: Tensor) -> Tensor:
    """Share of the units of (B, D) or (B, C, ...) that say the same to every sample, at every position."""
    others = [axis for axis in range(output.ndim) if axis != 1]
    spread = output.amax(others) - output.amin(others)  # (D,)
    return (spread <= CONSTANT).to(torch.promote_types(output.dtype, torch.float32)).mean()


def restore_identity_(norm: _BatchNorm) -> None:
    """alpha = sqrt(Var + eps), beta = E, from the running statistics: in evaluation mode, `norm` is then the identity.

    References:
        Ioffe, Szegedy, 2015, arXiv:1502.03167, section 3: "we could recover the original activations, if that were the
        optimal thing to do".
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)


def identity_error(network: nn.Module, images: Tensor) -> float | None:
    """How far BatchNorm with restored alpha and beta is from the identity: the largest |y − x| / max(1, |x|).

    x is what each BatchNorm layer is given in a forward pass over `images`, in float64 and evaluation mode, on a copy
    of `network`. None without a BatchNorm layer that learns alpha and beta and keeps running statistics.
    """
    network = copy.deepcopy(network).double().eval()
    errors: list[Tensor] = []

    def compare(norm: Any, args: tuple[Tensor, ...]) -> None:
        restored = copy.deepcopy(norm)
        restored._forward_pre_hooks.clear()  # this one
        restore_identity_(restored)
        errors.append(((restored(args[0]) - args[0]).abs() / args[0].abs().clamp(min=1)).max())

    for norm in network.modules():
        if isinstance(norm, _BatchNorm) and norm.affine and norm.track_running_stats:
            norm.register_forward_pre_hook(compare)
    with torch.no_grad():
        network(images)
    return float(torch.stack(errors).max()) if errors else None
