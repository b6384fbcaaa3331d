"""MLflow's pages for the runs on this machine: `python src/ui.py`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="ui")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.ui_from_hydra(cfg)
    from gaplab.tracking.ui import ui

    ui(settings)


if __name__ == "__main__":
    cli.run(main, cli.ui_help)
