"""A model of the registry behind HTTP, on this machine alone: `python src/serve.py`."""

from gaplab import cli, config


@cli.command("serve")
def main(settings: config.Serve, typed: list[str]) -> None:
    from gaplab.tracking.serving import serve  # MLflow: seconds

    serve(settings)


if __name__ == "__main__":
    main()
