"""Optimizers of several networks that take the same steps at the same rates, as one."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import LRScheduler

from gaplab.training.optim import align_

# what they do to a number depends on that number, its gradient and its moments alone
ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad)


def likeness(optimizer: Optimizer, scheduler: LRScheduler | None) -> str:
    """Equal for optimizers that may be joined: they go on by the same rule at the same rates."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    steps = {float(kept["step"]) for kept in optimizer.state.values() if "step" in kept}
    schedule = None if scheduler is None else sorted(scheduler.state_dict().items())
    alone = None if type(optimizer) in ELEMENTWISE else id(optimizer)
    return repr((type(optimizer), alone, groups, steps, schedule))


class Joint:
    """One optimizer in place of several, over values that lie side by side.

    Theirs stay what a checkpoint needs: they hold the rates, and views of what the one keeps.

    Args:
        networks: r of them.
        optimizers: of each; alike (`likeness`).
        stacked: the values (r, ...) of each parameter, by its name.

    Attributes:
        optimizer: the one.
    """

    def __init__(
        self, networks: Sequence[nn.Module], optimizers: Sequence[Optimizer], stacked: Mapping[str, Tensor]
    ) -> None:
        self._own = list(optimizers)
        first, rule = self._own[0], cast(Any, type(self._own[0]))
        self._is_stacked = rule in ELEMENTWISE
        self._has_begun = False
        self._rows: list[tuple[Tensor, ...]] = []  # a joint parameter, and each network's
        self._values: Mapping[str, Tensor] = stacked if self._is_stacked else dict(networks[0].named_parameters())
        if not self._is_stacked:
            align_(first)
            self.optimizer: Optimizer = first
            return
        joints = {parameter: self._values[name] for name, parameter in networks[0].named_parameters()}
        groups: list[dict[str, Any]] = [
            group | {"params": [joints[parameter] for parameter in group["params"]]} for group in first.param_groups
        ]
        self.optimizer = rule(groups)
        self._rows = list(zip(*map(_parameters, (self.optimizer, *self._own)), strict=True))
        for joint, *own in self._rows:
            each = [one.state.get(parameter, {}) for one, parameter in zip(self._own, own, strict=True)]
            found = {name: _joined([kept[name] for kept in each], joint) for name in each[0]}
            self.optimizer.state[joint].update(found)
        self._share()

    def take_rates(self) -> None:
        """Have the next step go by the learning rates that the optimizers have now."""
        for group, own in zip(self.optimizer.param_groups, self._own[0].param_groups, strict=True):
            group["lr"] = own["lr"]

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """With the gradient (r, ...) of each parameter, by its name; those that are not there stay as they are."""
        for name, gradient in gradients.items():
            self._values[name].grad = gradient if self._is_stacked else gradient[0]
        self.optimizer.step()
        for name in gradients:
            self._values[name].grad = None
        if not self._has_begun and self._is_stacked:  # whatever it keeps is there now, and stays in its place
            self._share()
            for one in self._own:
                one.step()  # without gradients it does nothing, and its schedule is content
        self._has_begun = True

    def leave(self, place: int) -> None:
        """Give the optimizer of a network that leaves copies of its own."""
        for kept in self._own[place].state.values():
            kept.update({name: value.clone() for name, value in kept.items() if isinstance(value, Tensor)})

    def _share(self) -> None:
        for joint, *own in self._rows:
            kept = self.optimizer.state.get(joint)
            for place, (one, parameter) in enumerate(zip(self._own, own, strict=True)):
                if kept:
                    one.state[parameter] = {
                        name: value[place] if isinstance(value, Tensor) and value.shape == joint.shape else value
                        for name, value in kept.items()
                    }


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _joined(values: Sequence[Any], joint: Tensor) -> Any:
    """What several optimizers keep under a name; of what is no value for each element, such as a count, the first."""
    first = values[0]
    if not isinstance(first, Tensor):
        return first
    if first.shape == joint.shape[1:]:
        return torch.stack(list(values)).contiguous()  # laid out as the parameters: see `optim.align_`
    return first.clone()
