"""How good a trained network is on a split, or on other data: `python src/evaluate.py run=latest`."""

from gaplab import cli, config


@cli.command("evaluate")
def main(settings: config.Evaluate, typed: list[str]) -> None:
    from gaplab.evaluation import evaluate  # torch: seconds

    evaluate(settings, typed)


if __name__ == "__main__":
    main()
