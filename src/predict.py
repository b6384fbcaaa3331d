"""What is on pictures: `python src/predict.py run=latest images=photo.png`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config, launch

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="predict")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.predict_from_hydra(cfg, launch.overrides())
    from gaplab.prediction import predict  # torch: seconds

    predict(settings, launch.overrides())


if __name__ == "__main__":
    cli.run(main, cli.predict_help, paths=("images", "model_uri", "run", "output"))
