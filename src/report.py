"""What a sweep says, with intervals, tests and verdicts: `python src/report.py`."""

import hydra
from omegaconf import DictConfig

from gaplab import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
@cli.job
def main(cfg: DictConfig) -> None:
    settings = config.report_from_hydra(cfg)
    from gaplab.analysis.report import report  # SciPy and matplotlib: seconds

    report(settings)


if __name__ == "__main__":
    cli.run(main, cli.report_help)
