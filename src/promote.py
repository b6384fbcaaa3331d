"""The versions of the model in MLflow's registry, and which is champion: `python src/promote.py`."""

from gaplab import cli, config


@cli.command("promote")
def main(settings: config.Promote, typed: list[str]) -> None:
    from gaplab.promotion import promote  # torch and MLflow: seconds

    promote(settings, typed)


if __name__ == "__main__":
    main()
