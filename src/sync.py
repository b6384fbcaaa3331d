"""Send to MLflow what it does not have yet: `python src/sync.py`."""

from gaplab import cli, config


@cli.command("sync")
def main(settings: config.Sync, typed: list[str]) -> None:
    from gaplab.tracking.sync import sync

    sync(settings)


if __name__ == "__main__":
    main()
