"""The report over real files: what it writes, and what it says of input that is wrong or thin."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import composed, typed
from rich.console import Console
from synthetic import accuracies, noise

from gaplab import config as configs
from gaplab.analysis.compare import sections
from gaplab.analysis.report import report
from gaplab.analysis.runs import Collection, read_run
from gaplab.errors import UserError
from gaplab.notes import NOTE, joined
from gaplab.tracking.journal import append, read_journal

GRID = [("mnist", bn, dropout) for bn in ("false", "true") for dropout in ("0", "0.5")]


@pytest.fixture(autouse=True)
def _few_figures(monkeypatch):
    """One of a dozen takes a tenth of the time; tests/analysis/test_figures.py draws them all."""
    from gaplab.analysis import figures

    drawings = figures.drawings
    monkeypatch.setattr(figures, "drawings", lambda *words: dict(list(drawings(*words).items())[:1]))


def write_sweep(outputs: Path, name: str, grid=GRID, seeds=range(6), claim: str | None = None) -> Path:
    """A sweep's folder as its jobs leave it, without training."""
    folder = outputs / "sweeps" / name
    jobs = []
    for data, bn, dropout in grid:
        first = composed(
            f"data={data}", f"model.bn={bn}", f"model.dropout={dropout}", f"sweep.claim={claim or 'null'}"
        )  # fmt: skip
        text = configs.to_yaml(first)
        for seed in seeds:
            config = replace(first, seed=seed)
            job = folder / f"{len(jobs)}_{data}_{bn}_{dropout}_{seed}"
            job.mkdir(parents=True)
            (job / "config.yaml").write_text(configs.SEED.sub(f"seed: {seed}", text))
            gap = 0.03 - 0.01 * (dropout == "0.5") - 0.005 * (bn == "true") + 0.0003 * noise(bn, dropout, seed)
            metrics = accuracies(0.99, 0.99 - gap) | {"test/acc": 0.97}
            events = [
                {"time": 0, "event": "run", "name": job.name},
                {"time": 1, "event": "params", "values": {k: str(v) for k, v in configs.flatten(config).items()}},
                {
                    "time": 1,
                    "event": "tags",
                    "values": {"sweep": name, "git/commit": "1234567890", "git/dirty": "false"},
                },
                {
                    "time": 1,
                    "event": "dataset",
                    "digest": "d",
                    "source": "/pictures",
                    "profile": {"classes": 10, "train": 270, "valid": 30, "test": 1000},
                },
                *({"time": 2, "event": "metrics", "step": epoch, "values": metrics} for epoch in (1, 2)),
                {"time": 3, "event": "finish", "status": "FINISHED"},
            ]
            (job / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
            result = {
                "status": "FINISHED",
                "params": 22346,
                "config_hash": configs.config_hash(config),
                "run_id": f"{len(jobs):032x}",
            }
            (job / "result.json").write_text(json.dumps(result))
            jobs.append({"folder": job.name, "overrides": []})
    (folder / "sweep.json").write_text(
        json.dumps({"jobs": jobs, "overrides": ["model.bn=false,true", "seed=range(6)"]})
    )
    return folder


def settings(outputs: Path, **keys) -> configs.Report:
    return configs.Report(paths=configs.Paths(str(outputs)), **keys)


def test_a_report_is_written_beside_the_newest_sweep(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.undo()  # all figures
    write_sweep(tmp_path, "2026-01-01_00-00-00_old_000000", seeds=[0])
    newest = write_sweep(tmp_path, "2026-01-02_00-00-00_new_000000", claim="overfitting")
    folder = report(settings(tmp_path))
    assert folder == newest / "report"
    content = json.loads((folder / "report.json").read_text())
    (part,) = content["sections"]
    assert part["factors"] == {"bn": ["false", "true"], "dropout": ["0.0", "0.5"]}
    (bn,) = [one for one in part["contrasts"]["gap/acc"]["effects"] if one["name"] == "bn: true − false"]
    assert bn["verdict"] == "real"
    assert bn["difference"] == pytest.approx(-0.005, abs=0.0005)
    assert [verdict["verdict"] for verdict in content["verdicts"]] == ["supported"]
    rows = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
    assert len(rows) == 24
    assert {"run", "seed", "status", "model.bn", "model.dropout", "gap/acc", "valid/acc"} <= rows[0].keys()
    assert "run_id" not in rows[0]
    page = (folder / "report.html").read_text()
    assert "supported" in page
    for name in part["figures"]:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert {"conditions.png", "learning_curves.png", "interaction.png", "honest_vs_running.png"} <= set(part["figures"])
    out = capsys.readouterr().out
    assert "Does BatchNorm shrink the overfitting gap? supported" in out
    assert "bn: true − false" in out


def test_the_sweeps_description_says_what_was_asked_and_found(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gaplab.tracking.journal.start_sender", lambda *_: None)
    folder = write_sweep(tmp_path, "2026-01-02_00-00-00_new_000000", claim="overfitting")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    append(folder, "run", name="sweep", id="0" * 32, uri=uri)
    append(folder, "tags", values={NOTE: joined("24 runs are to come.", "the question")})
    append(folder, "finish", status="FINISHED")
    for _ in range(2):  # a second report replaces what the first one said
        report(settings(tmp_path, tracking=configs.MLflow(uri=uri)))
    note = [event["values"][NOTE] for event in read_journal(folder) if event["event"] == "tags"][-1]
    assert note.startswith("Does BatchNorm shrink the overfitting gap? **supported**")
    assert "24 of 24 runs finished." in note
    assert "network mlp hidden\\_dims=\\[64, 128, 64\\]" in note
    assert "| `bn=false dropout=0.0`&emsp; | 6&emsp; | 0.9900 ± 0.0000&emsp; |" in note
    assert "- `bn: true − false` **helps**: gap/acc -0.48 pp [-0.51, -0.46] real; valid/acc +0.48 pp" in note
    assert note.endswith("### What was asked\n\nthe question")
    assert "to come" not in note


def test_runs_of_several_kinds_of_cpu_are_said_on_the_page_and_in_the_terminal(tmp_path: Path, capsys):
    folder = write_sweep(tmp_path, "2026-01-02_00-00-00_new_000000", seeds=[0])
    for number, job in enumerate(sorted(folder.glob("*_mnist_*"))):
        append(job, "tags", values={"cpu/capability": f"x86_64 {'AVX2' if number else 'AVX512'}", "cpu/threads": "1"})
    page = (report(settings(tmp_path)) / "report.html").read_text()
    said = "CPU x86_64 AVX512 (1 run), x86_64 AVX2 (3 runs)"
    assert said in page
    assert (
        f"note: these runs have different environments, which may explain differences between them: {said}"
        in " ".join(capsys.readouterr().out.split())
    )


def test_what_is_missing_is_said_and_the_rest_reported(tmp_path: Path, capsys):
    folder = write_sweep(tmp_path, "2026-01-02_00-00-00_new_000000")
    shutil.rmtree(folder / "0_mnist_false_0_0")
    failed = folder / "7_mnist_false_0.5_1" / "result.json"
    failed.write_text(json.dumps({"status": "FAILED", "error": "out of memory"}))
    for name in ("result.json", "journal.jsonl"):
        (folder / "23_mnist_true_0.5_5" / name).unlink()
    report(settings(tmp_path, metrics=["gap/acc", "gap/ac"]))
    out = capsys.readouterr().out
    assert "note: the folder of job 0_mnist_false_0_0 is gone" in out
    assert 'note: no run has a metric gap/ac; did you mean "gap/acc"?' in out
    assert "left out, failed: 1 runs: bn=false dropout=0.5 (seeds 1)" in out
    assert "left out, unfinished: 1 runs: bn=true dropout=0.5 (seeds 5)" in out


def test_sweeps_of_different_data_are_reported_apart(tmp_path: Path, capsys):
    one = write_sweep(tmp_path, "a", seeds=range(2))
    other = write_sweep(tmp_path, "b", [("kmnist", "false", "0"), ("kmnist", "true", "0")], range(2))
    folder = report(settings(tmp_path, sweep=[str(one), "b"]))
    out = capsys.readouterr().out
    assert "note: 2 data sets or splits (mnist, kmnist): conditions are compared within each" in out
    content = json.loads((folder / "report.json").read_text())
    assert [len(part["conditions"]) for part in content["sections"]] == [4, 2]
    assert folder.parent == tmp_path / "reports"
    assert other.is_dir()


def test_hand_picked_runs_and_claims(tmp_path: Path, capsys):
    folder = write_sweep(tmp_path, "a")
    picked = [str(job) for job in sorted(folder.glob("*_mnist_*_0_*"))]
    report(settings(tmp_path, runs=picked, claim="overfitting"))
    out = capsys.readouterr().out
    assert "12 picked runs" in out
    assert "Does BatchNorm shrink the overfitting gap? supported" in out
    assert "dropout" not in out.partition("p (Holm)")[0].partition("condition")[2].partition("\n")[0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "no sweep in "),
        ({"sweep": "nowhere"}, "nowhere: no sweep there"),
        ({"runs": ["nowhere"]}, "runs=nowhere: no run there"),
        ({"sweep": "0" * 32}, "no such store"),
    ],
)
def test_nothing_to_report_on_is_one_line(tmp_path: Path, keys, said):
    with pytest.raises(UserError, match=said):
        report(configs.Report(
            paths=configs.Paths(str(tmp_path)), tracking=configs.MLflow(uri=f"sqlite:///{tmp_path}/mlflow.db"), **keys
        ))  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_no_known_metric_is_one_line(tmp_path: Path):
    write_sweep(tmp_path, "a", seeds=[0])
    with pytest.raises(UserError, match="no run has a metric foo/bar; known: gap/acc, test/acc"):
        report(settings(tmp_path, metrics=["foo/bar"]))


def test_the_command_says_one_line_and_helps(tmp_path: Path):
    wrong = typed("report", "margn=0.1", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert 'margn: no such key; did you mean "margin"?' in wrong.stderr
    wrong = typed("report", "margin=-1", cwd=tmp_path)
    assert wrong.stderr == "error: margin=-1.0: must be a number in (0, 1)\n"
    wrong = typed("report", f"paths.outputs={tmp_path}", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "no sweep in " in wrong.stderr
    assert "margin=0.002" in typed("report", "--help", cwd=tmp_path).stdout


def test_the_report_names_network_data_command_and_the_best_condition(tmp_path: Path, capsys):
    folder = report(settings(tmp_path, sweep=str(write_sweep(tmp_path, "a"))))
    content = json.loads((folder / "report.json").read_text())
    (part,) = content["sections"]
    assert part["facts"] == {
        "network": "mlp hidden_dims=[64, 128, 64] init=kaiming_normal activation=relu",
        "parameters": "22,346",
        "optimizer": "Adam lr=0.001 weight_decay=0.0",
        "schedule": "constant",
        "epochs": "10",
        "batch size": "128",
        "images": "270 train, 30 valid, 1,000 test",
        "data": "mnist in /pictures",
    }
    assert [one["label"] for one in part["conditions"] if one["best"]] == ["bn=true dropout=0.5"]
    assert content["commands"] == ["python src/train.py -m model.bn=false,true 'seed=range(6)'"]
    assert any(note.startswith("30 validation images: one image is 3.3 pp") for note in part["notes"])
    page, out = (folder / "report.html").read_text(), capsys.readouterr().out
    for text in (page.replace("&#39;", "'"), out):
        assert "python src/train.py -m model.bn=false,true 'seed=range(6)'" in text
        assert "mnist in /pictures" in text
        assert "270 train, 30 valid, 1,000 test" in text
    assert "bn=true dropout=0.5 (highest valid/acc)" in out
    assert "helps" in out


def test_joined_sweeps_count_each_condition_and_seed_once_and_name_both_commands(tmp_path: Path):
    first, second = (write_sweep(tmp_path, name, claim="overfitting") for name in "ab")
    for result in second.glob("*_mnist_true_*/result.json"):
        result.write_text(json.dumps({"status": "KILLED"}))
    folder = report(settings(tmp_path, sweep=["a", "b"]))
    content = json.loads((folder / "report.json").read_text())
    (part,) = content["sections"]
    assert [len(one["seeds"]) for one in part["conditions"]] == [6] * 4
    assert not any(one["unfinished"] for one in part["conditions"])
    assert any(note.startswith("24 runs repeat a condition and seed") for note in part["notes"])
    assert sum(run["counts"] for run in content["runs"]) == 24
    assert all(run["counts"] == (run["status"] == "FINISHED") for run in content["runs"] if "_true_" in run["run"])
    assert [verdict["verdict"] for verdict in content["verdicts"]] == ["supported"]
    assert content["sources"] == [str(first), str(second)]
    assert len(content["commands"]) == 2


def test_a_gap_is_never_judged_without_accuracy(tmp_path: Path):
    write_sweep(tmp_path, "a")
    folder = report(settings(tmp_path, metrics=["gap/acc"]))
    (part,) = json.loads((folder / "report.json").read_text())["sections"]
    assert {one["verdict"] for one in part["outcomes"]["effects"]} == {"helps", "independent"}


def test_no_number_is_cut_on_a_narrow_terminal(tmp_path: Path):
    from gaplab.analysis import report as module

    found = Collection("a", [read_run(job) for job in write_sweep(tmp_path, "a").glob("*_mnist_*")])
    (part,) = sections(found.runs, ["gap/acc", "valid/acc"], 0.002)
    console = Console(width=60, record=True, file=io.StringIO())
    module._print(console, found, [part], [], 0.002)
    assert "…" not in console.export_text()
