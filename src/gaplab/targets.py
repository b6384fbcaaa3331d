"""`_target_`: reach a class by its dotted name, but only under an allow-list of packages.

A config may come back from a tracking server, so it is somebody else's input. Only classes are reached, never
functions: `torch.hub.load` is a function of an allowed package, and it runs downloaded code.
"""

import importlib
import inspect
from collections.abc import Collection
from typing import Any

from gaplab.errors import UserError


def check_target(target: str, allowed: Collection[str], key: str) -> None:
    """Refuse `target` by its name alone, importing nothing. `key` is the config key that the message names."""
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise UserError(f"{key}={target!r}: expected the dotted name of a class, like my_package.MyNet")
    if parts[0] not in allowed:
        raise UserError(
            f"{key}={target}: package {parts[0]!r} is not in allowed_targets [{', '.join(allowed)}]; "
            f"if you trust it, add allowed_targets=[{','.join([*allowed, parts[0]])}]"
        )


def load_class(target: str, allowed: Collection[str], base: type, key: str) -> type:
    """The class that `target` names: a subclass of `base`, defined in an allowed package.

    Raises UserError when it cannot be imported, is no class of that kind, or is an allowed module's reference to
    something from elsewhere (`torch.serialization.os.system`).
    """
    check_target(target, allowed, key)
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}={target}: no module named {error.name!r}; is it installed, or on PYTHONPATH?") from None
    except AttributeError:
        raise UserError(f"{key}={target}: module {module_name!r} has no {name!r}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key}={target}: not a subclass of {base.__module__}.{base.__qualname__}")
    check_target(f"{found.__module__}.{found.__qualname__.split('.')[0]}", allowed, key)
    return found


def accepted(function: Any, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of `offered` that the parameters of `function` name; all of them when it takes `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in offered.items() if name in names}
