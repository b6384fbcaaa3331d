"""Optimizers and learning-rate schedules from their configs."""

from dataclasses import MISSING, Field, asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler

from gaplab import config
from gaplab.errors import UserError
from gaplab.targets import accepted, load_class


def build_optimizer(network: nn.Module, settings: config.Optimizer, allowed_targets: list[str]) -> Optimizer:
    """The optimizer over all parameters of `network`, in torch's fused form where there is one.

    Weight decay acts on weights alone; on BatchNorm's parameters and on biases only with `decay_norm_and_bias`. Raises
    UserError when the class cannot be reached or built.
    """
    optimizer_class = load_class(settings._target_, allowed_targets, Optimizer, "optimizer._target_")
    offered = {
        name: value for name, value in asdict(settings).items() if name not in ("_target_", "decay_norm_and_bias")
    }
    parameters = list(network.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if settings.weight_decay and not settings.decay_norm_and_bias:
        groups = [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    taken = accepted(optimizer_class, offered)
    for item in fields(settings):  # a key that is left at its default may be unknown to an optimizer of another kind
        if item.name in offered.keys() - taken.keys() and getattr(settings, item.name) != _default(item):
            raise UserError(f"optimizer.{item.name}: {settings._target_} takes no such argument")
    try:
        return optimizer_class(groups, **taken, **accepted(optimizer_class, {"fused": True}))
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer._target_={settings._target_}: {error}") from None


def align_(optimizer: Optimizer) -> None:
    """Lay what a loaded optimizer keeps out in memory as its parameters are: torch's fused forms go by place alone, and
    silently mix up the values of a convolution when one is in channels_last and the other is not."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def can_be_captured(optimizer: Optimizer) -> bool:
    """Whether a CUDA graph may hold its step, once it is made for that."""
    return isinstance(optimizer, SGD) or all("capturable" in group for group in optimizer.param_groups)


def make_capturable_(optimizer: Optimizer) -> None:
    """Have a CUDA graph be able to hold the step of one that `can_be_captured`."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        if "capturable" in group:  # SGD counts no steps
            group["capturable"] = True
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.ndim == 0:  # a count, which Python may have kept
                kept[name] = value.to(parameter.device)


def update_(network: nn.Module, optimizer: Optimizer, clip: float | None) -> None:
    """Take an optimizer step with the gradients of `network`, clipped to the L2 norm `clip`, and drop them."""
    if clip is not None:
        nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    for group in optimizer.param_groups:  # as zero_grad, which looks at more and takes 3 % of a small step
        for parameter in group["params"]:
            parameter.grad = None


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def build_scheduler(
    optimizer: Optimizer, settings: config.Scheduler, lr: float, total_steps: int, steps_per_epoch: int
) -> lr_scheduler.LRScheduler | None:
    """A schedule that is stepped once per optimizer step; None for a constant rate.

    References:
        Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arXiv:1608.03983 (cosine).
        Smith, Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018,
        arXiv:1708.07120 (one_cycle).
    """
    if isinstance(settings, config.Cosine):
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=settings.min_lr)
    if isinstance(settings, config.OneCycle):
        try:
            return lr_scheduler.OneCycleLR(
                optimizer, max_lr=lr, total_steps=total_steps, pct_start=settings.pct_start, cycle_momentum=False
            )
        except ZeroDivisionError:
            raise UserError(
                f"scheduler.pct_start={settings.pct_start}: one of {total_steps} steps, too few to rise in"
            ) from None
    if isinstance(settings, config.Step):
        return lr_scheduler.StepLR(optimizer, settings.step_size * steps_per_epoch, settings.gamma)
    return None
