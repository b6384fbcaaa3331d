"""MLflow's pages for the runs on this machine: `python src/ui.py`."""

from gaplab import cli, config


@cli.command("ui")
def main(settings: config.Ui, typed: list[str]) -> None:
    from gaplab.tracking.ui import ui

    ui(settings)


if __name__ == "__main__":
    main()
