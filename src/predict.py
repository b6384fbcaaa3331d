"""What is on pictures: `python src/predict.py run=latest images=photo.png`."""

from gaplab import cli, config


@cli.command("predict")
def main(settings: config.Predict, typed: list[str]) -> None:
    from gaplab.prediction import predict  # torch: seconds

    predict(settings, typed)


if __name__ == "__main__":
    main()
