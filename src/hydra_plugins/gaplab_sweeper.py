"""Makes gaplab's sweep known to Hydra as `hydra/sweeper=gaplab`; Hydra finds it here by itself."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class GaplabSweeperConf:
    _target_: str = "hydra_plugins.gaplab_sweeper.GaplabSweeper"
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="gaplab", node=GaplabSweeperConf, provider="gaplab")


class GaplabSweeper(Sweeper):
    """Every combination of the swept values; typed overrides replace those of `params`, which a config file gives."""

    def __init__(self, params: dict[str, str]) -> None:
        self._params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config

    def sweep(self, arguments: list[str]) -> Any:
        from gaplab import sweep

        return sweep.sweep(
            self._config, self._context, [f"{key}={value}" for key, value in self._params.items()], arguments
        )
