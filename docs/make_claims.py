"""Write docs/claims.md and the README's table from the newest full sweep of each claim: `python docs/make_claims.py`.

Every number comes from the `report.json` that `python src/report.py sweep=<folder>` wrote beside the sweep.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
PAGE, PICTURES, README = PROJECT / "docs" / "claims.md", PROJECT / "docs" / "claims", PROJECT / "README.md"
FIGURES = {
    "overfitting": ["conditions", "honest_vs_running"],
    "higher_lr": ["interaction"],
    "init_robustness": ["interaction"],
    "dropout_redundant": ["interaction"],
    "activations": ["activations"],
    "identity": [],
}
FIGURE_1 = "experiment=ioffe_szegedy_fig1"
HEAD = """\
# Six claims about BatchNorm, measured

Each claim is a sweep with a decision rule (`src/gaplab/analysis/claims.py`); each verdict stands as it fell. MNIST,
multilayer perceptrons (`identity`: other networks too), on CPU. Replicates are paired by seed: same split, same data
order, same initial weights where the shapes allow. `python docs/make_claims.py` writes this page from the `report.json`
of each sweep. Intervals are 95 % t intervals over seeds, of one contrast each; verdicts are corrected for the family.

"""


def main(outputs: Path) -> None:
    reports = {claim: newest(outputs, f"claim={claim}_full") for claim in FIGURES}
    PICTURES.mkdir(exist_ok=True)
    parts = [HEAD, summary(reports)]
    parts += [section(claim, folder, report) for claim, (folder, report) in reports.items()]
    parts.append(figure_1(*newest(outputs, FIGURE_1)))
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    part = reports["overfitting"][1]["sections"][0]
    text = README.read_text(encoding="utf-8")
    init = part["conditions"][0]["label"].rpartition(" ")[2]
    few = part | {"conditions": [one for one in part["conditions"] if one["label"].endswith(init)]}
    text = replaced(text, "claims", f"{conditions(few)}\n{summary(reports)}")
    README.write_text(replaced(text, "running", running(part)), encoding="utf-8")


def replaced(text: str, mark: str, block: str) -> str:
    """`text` with what stands between `<!-- mark -->` and `<!-- /mark -->` replaced."""
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, _, after = rest.partition(f"<!-- /{mark} -->\n")
    return f"{before}<!-- {mark} -->\n{block}<!-- /{mark} -->\n{after}"


def running(part: dict[str, Any]) -> str:
    """The gap as it is and by the running accuracy, with dropout and without, for the reference's other levels."""
    first = part["conditions"][0]["label"]
    dropout = next(one for one in part["conditions"] if one["label"] == first.replace("dropout=0.0", "dropout=0.5"))
    honest, usual = [], []
    for one in (part["conditions"][0], dropout):
        mean = {metric: estimate["mean"] for metric, estimate in one["estimates"].items() if estimate}
        honest.append(100 * mean["gap/acc"])
        usual.append(100 * (mean["train/acc_running"] - mean["valid/acc"]))
    rows = [("plain", honest[0], usual[0]), ("dropout 0.5", honest[1], usual[1])]
    rows.append(("effect of dropout 0.5", honest[1] - honest[0], usual[1] - usual[0]))
    lines = ["| mean over the same runs, gap in pp | honest | by the running accuracy |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {one:+.2f} | {other:+.2f} |" for name, one, other in rows)]) + "\n"


def newest(outputs: Path, word: str) -> tuple[Path, dict[str, Any]]:
    """The newest sweep that was typed with `word`, and its report."""
    for path in sorted(outputs.glob("sweeps/*/sweep.json"), reverse=True):
        if word in json.loads(path.read_text())["overrides"]:
            report = path.parent / "report" / "report.json"
            if not report.is_file():
                sys.exit(f"error: {path.parent} has no report yet; run python src/report.py sweep={path.parent.name}")
            return path.parent, json.loads(report.read_text())
    sys.exit(f"error: no sweep with {word} in {outputs}; run python src/train.py -m {word}")


def summary(reports: dict[str, tuple[Path, dict[str, Any]]]) -> str:
    lines = ["| claim | verdict | what was measured |", "|---|---|---|"]
    for _, report in reports.values():
        verdict = report["verdicts"][0]
        lines.append(f"| {verdict['question']} | **{verdict['verdict']}** | {verdict['summary']} |")
    return "\n".join(lines) + "\n"


def section(claim: str, folder: Path, report: dict[str, Any]) -> str:
    verdict, part = report["verdicts"][0], report["sections"][0]
    lines = [f"## {verdict['question']}", "", f"**{verdict['verdict'].capitalize()}**: {verdict['summary']}.", ""]
    if verdict["seeds_needed"]:
        lines += [f"{verdict['seeds_needed']} seeds would decide what is open, if what was seen is the truth.", ""]
    lines += [f"- {line}" for line in verdict["evidence"]]
    lines += [f"- {note}" for note in [*report["notes"], *part["notes"]]]
    lines += ["", f"`python src/train.py -m claim={claim}_full`, {len(report['runs'])} runs.", "", conditions(part)]
    lines += [picture(claim, folder, name) for name in FIGURES[claim]]
    return "\n".join(lines)


def figure_1(folder: Path, report: dict[str, Any]) -> str:
    text = [
        "## Figure 1 of the BatchNorm paper",
        "",
        f"`python src/train.py -m {FIGURE_1} 'seed=range(6)'`: binary input, three hidden layers of 100 sigmoid units, "
        "small Gaussian weights, 50 435 steps of 60 examples; plain SGD with learning rate 0.1, which the paper does "
        "not state. Accuracy is on the validation split: gaplab reads the test split once, at the end.",
        "",
        conditions(report["sections"][0]),
        *(curves(one) for one in report["sections"][0]["conditions"]),
        "",
        "The paper describes: (a) with BatchNorm training is faster and ends higher; (b, c) without it the 15th, 50th "
        "and 85th percentile of a unit's input move over training, with it they are much more stable.",
        "",
        picture("figure_1", folder, "activations"),
    ]
    return "\n".join(text)


def curves(condition: dict[str, Any]) -> str:
    """How fast a condition of Figure 1 learns, and where its unit's percentiles begin and end: means over the seeds."""
    valid = {int(epoch): value for epoch, value in condition["curves"]["valid/acc"].items()}
    reached = {target: min((e for e, v in valid.items() if v >= target), default=None) for target in (0.9, 0.95, 0.965)}
    fast = ", ".join(f"{target} after {'no' if epoch is None else epoch} epochs" for target, epoch in reached.items())
    ends = []
    for name in ("p15", "p50", "p85"):
        values = list(condition["curves"][f"act/unit/{name}"].values())
        ends.append(f"{name} {values[0]:+.2f} → {values[-1]:+.2f}")
    units = f"the unit's percentiles, first → last: {', '.join(ends)}"
    return f"- {condition['label']}: mean validation accuracy {fast}; {units}."


def conditions(part: dict[str, Any]) -> str:
    metrics = ["train/acc", "valid/acc", "gap/acc", "test/acc"]
    lines = ["| condition | seeds | train | valid | gap, pp | test |", "|---|---|---|---|---|---|"]
    for one in part["conditions"]:
        cells = [spread(one["estimates"].get(metric), 100 if metric == "gap/acc" else 1) for metric in metrics]
        lost = f" ({len(one['diverged'])} diverged)" if one["diverged"] else ""
        lines.append(f"| {one['label']} | {len(one['seeds'])}{lost} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(estimate: dict[str, Any] | None, factor: int) -> str:
    if estimate is None:
        return "–"
    digits = 2 if factor == 100 else 4
    sd = "" if estimate["sd"] is None else f" ± {factor * estimate['sd']:.{digits}f}"
    return f"{factor * estimate['mean']:.{digits}f}{sd}"


def picture(claim: str, folder: Path, name: str) -> str:
    target = PICTURES / f"{claim}_{name}.png"
    shutil.copyfile(folder / "report" / f"{name}.png", target)
    return f"![{claim}: {name.replace('_', ' ')}](claims/{target.name})\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT / "outputs")
