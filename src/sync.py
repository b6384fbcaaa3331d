"""Send to MLflow what it does not have yet: `python src/sync.py`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="sync")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.sync_from_hydra(cfg)
    from gaplab.tracking.sync import sync

    sync(settings)


if __name__ == "__main__":
    cli.run(main, cli.sync_help)
