"""A model of the registry behind HTTP, on this machine alone: `python src/serve.py`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="serve")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.serve_from_hydra(cfg)
    from gaplab.tracking.serving import serve  # MLflow: seconds

    serve(settings)


if __name__ == "__main__":
    cli.run(main, cli.serve_help, paths=("model_uri",))
