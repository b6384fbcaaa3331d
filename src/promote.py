"""The versions of the model in MLflow's registry, and which is champion: `python src/promote.py`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config, launch

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="promote")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.promote_from_hydra(cfg, launch.overrides())
    from gaplab.promotion import promote  # torch and MLflow: seconds

    promote(settings, launch.overrides())


if __name__ == "__main__":
    cli.run(main, cli.promote_help, paths=("run",))
