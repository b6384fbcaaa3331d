"""What a sweep says, with intervals, tests and verdicts: `python src/report.py`."""

from gaplab import cli, config


@cli.command("report")
def main(settings: config.Report, typed: list[str]) -> None:
    from gaplab.analysis.report import report  # SciPy and matplotlib: seconds

    report(settings)


if __name__ == "__main__":
    main()
