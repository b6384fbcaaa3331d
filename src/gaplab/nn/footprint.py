"""How much memory a network needs, known before any is taken: who asks for too much is killed without a word."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gaplab.errors import UserError
from gaplab.nn.build import plan


@dataclass(frozen=True)
class Footprint:
    """Numbers that a network holds: `params`; `values` that one sample leaves in its layers, the `largest` in one."""

    params: int
    values: int = 0
    largest: int = 0

    def bytes(self, batch: int, eval_batch: int, itemsize: int) -> int:
        """At least what training on the CPU takes: weights, gradients and what Adam keeps, and the layers' outputs."""
        return itemsize * max(4 * self.params + batch * self.values, 2 * self.params + eval_batch * self.largest)


def footprint(
    model: dict[str, Any], in_shape: tuple[int, int, int], num_classes: int, allowed_targets: tuple[str, ...]
) -> Footprint:
    """Of a network of gaplab's; nothing is known of another's, which may do anything while it is built.

    The network is built on the meta device, where tensors have a shape and no memory. Raises UserError as
    `build_network` does, and for a layer that no address space holds.
    """
    network_class, arguments = plan(model, in_shape, num_classes, allowed_targets)
    if not network_class.__module__.startswith("gaplab."):
        return Footprint(0)
    outputs: list[int] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(output.numel())

    try:
        with torch.device("meta"), torch.no_grad():
            network: nn.Module = network_class(**arguments).eval()
            for module in network.modules():
                if next(module.children(), None) is None:
                    module.register_forward_hook(note)
            network(torch.empty(1, *in_shape))
    except (TypeError, ValueError) as error:
        raise UserError(f"model._target_={model['_target_']}: {error}") from None
    except RuntimeError as error:
        raise UserError(f"model._target_={model['_target_']}: cannot be built ({str(error).splitlines()[0]})") from None
    return Footprint(sum(one.numel() for one in network.parameters()), sum(outputs), max(outputs))
