"""Train a classifier and measure its overfitting gap: `python src/train.py model.bn=true`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config, launch

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
@cli.job
def main(cfg: DictConfig) -> None:
    folder = launch.main(config.from_hydra(cfg, launch.overrides()), launch.overrides())
    if folder is not None and config.registers(run := config.load(folder / "config.yaml")):
        from gaplab.promotion import after_run  # MLflow: seconds

        after_run(folder, run, launch.overrides())


if __name__ == "__main__":
    cli.run(main, cli.train_help)
