"""Train a classifier and measure its overfitting gap: `python src/train.py model.bn=true`."""

from gaplab import cli, config, launch


@cli.command("train")
def main(settings: config.Config, typed: list[str]) -> None:
    folder = launch.main(settings, typed)
    if folder is not None and config.registers(run := config.load(folder / "config.yaml")):
        from gaplab.promotion import after_run  # MLflow: seconds

        after_run(folder, run, typed)


if __name__ == "__main__":
    main()
