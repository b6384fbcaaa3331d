"""How good a trained network is on a split, or on other data: `python src/evaluate.py run=latest`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config, launch

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.evaluate_from_hydra(cfg, launch.overrides())
    from gaplab.evaluation import evaluate  # torch: seconds

    evaluate(settings, launch.overrides())


if __name__ == "__main__":
    cli.run(main, cli.evaluate_help, paths=("run", "model_uri", "against", "output"))
