"""What computed a run is recorded, and runs whose environments differ are reported, in one line."""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import SMALL, composed
from omegaconf import OmegaConf
from rich.console import Console

from gaplab import config as configs
from gaplab import launch, provenance, sweep, worker
from gaplab.result import RunResult
from gaplab.tracking.journal import append, read_journal

OLD = {"git/commit": "a" * 40, "cpu/capability": "x86_64 AVX2", "cpu/threads": "1", "version/torch": "2.15.0"}
NEW = OLD | {"git/commit": "b" * 40, "cpu/capability": "x86_64 AVX512"}


@pytest.mark.parametrize(
    ("runs", "said"),
    {
        "the same": ([[OLD], [OLD]], None),
        "what one did not record": ([[OLD], [{}]], None),
        "what does not decide a result": ([[OLD | {"version/hydra-core": "1"}], [OLD]], None),
        "two commits": (
            [[OLD], [OLD | {"git/commit": "b" * 40}], [OLD]],
            "these runs have different environments, which may explain differences between them: "
            "commit aaaaaaa (2 runs), bbbbbbb (1 run)",
        ),
        "changes beside a commit": (
            [[OLD | {"git/diff": "12345678"}], [OLD | {"git/diff": "9abcdef0"}]],
            "commit aaaaaaa with uncommitted changes (12345678) (1 run), "
            "aaaaaaa with uncommitted changes (9abcdef0) (1 run)",
        ),
        "kinds of CPU and threads": (
            [[OLD], [OLD | {"cpu/threads": "2", "cpu/capability": "x86_64 AVX512"}]],
            "CPU x86_64 AVX2 (1 run), x86_64 AVX512 (1 run); CPU threads 1 (1 run), 2 (1 run)",
        ),
        "a resumed run": (
            [[OLD, NEW]],
            "the environment changed during this run, so its results may differ from an uninterrupted run's: "
            "commit aaaaaaa then bbbbbbb; CPU x86_64 AVX2 then x86_64 AVX512",
        ),
        "a resumed run among others": (
            [[OLD, OLD | {"cpu/threads": "2"}], [OLD]],
            "CPU threads 1 then 2 (1 run), 1 (1 run)",
        ),
        "text that a terminal obeys": (
            [[{"compute/device": "\x1b[2J"}], [{"compute/device": 1}]],
            r"device \x1b[2J (1 run), 1 (1 run)",
        ),
    }.values(),
)  # fmt: skip
def test_environments_that_differ_are_named_with_their_runs(runs, said):
    found = provenance.difference(runs)
    assert (found is None) if said is None else said in found


def test_attempts_count_from_where_the_run_last_began_anew():
    def events(*attempts):
        for tags in attempts:
            yield {"event": "run"}
            yield {"event": "tags", "values": tags}
            if tags != failed:
                yield {"event": "metrics", "step": 1, "values": {"valid/acc": 0.5}}

    failed, first, resumed = {"a": "0"}, {"a": "1"}, {"a": "2", provenance.RESUMED: "last.ckpt, epoch 1"}
    anew = {"a": "3"}
    assert provenance.attempts(events(first, resumed, anew, resumed)) == [anew, resumed]
    assert provenance.attempts(events(first, failed, resumed)) == [first, failed, resumed]  # it began nothing
    assert provenance.attempts(events(first)) == [first]
    assert provenance.attempts([]) == []


def test_the_commit_and_the_changes_beside_it_are_recorded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    assert "git/commit" not in provenance.source_tags.__wrapped__()

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    def tags() -> dict[str, str]:
        return {name: value for name, value in provenance.source_tags.__wrapped__().items() if name.startswith("git/")}

    (tmp_path / "train.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = tags()
    assert clean == {"git/commit": clean["git/commit"], "git/dirty": "false"}
    (tmp_path / "train.py").write_text("2")
    one = tags()
    (tmp_path / "train.py").write_text("3")
    other = tags()
    assert one | {"git/diff": ""} == other | {"git/diff": ""} == clean | {"git/dirty": "true", "git/diff": ""}
    assert one["git/diff"] != other["git/diff"]


def test_the_cpu_and_its_threads_are_recorded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected = {"cpu/capability": "x86_64 AVX2", "cpu/threads": "3", "compute/device": "cpu"}
    assert provenance.compute_tags("cpu") == expected
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n\nvendor_id\t: AuthenticAMD\n")
    assert provenance.compute_tags("cpu")["cpu/capability"] == "x86_64 AuthenticAMD AVX2"


def test_a_run_resumed_on_another_kind_of_cpu_says_so_once(tmp_path: Path, monkeypatch, capsys):
    config = composed(*SMALL, "trainer.max_epochs=1", "data.train_size=100", f"paths.outputs={tmp_path}")
    kinds = iter(["AVX512", "AVX512", "AVX2"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: next(kinds))
    outs = []
    for _ in range(3):
        result = launch.launch(config, tmp_path / "run")
        outs.append(" ".join(capsys.readouterr().out.split()))
    assert [out.count("environment changed") for out in outs] == [0, 0, 1]
    assert "results may differ from an uninterrupted run's: CPU" in outs[2]
    tags = provenance.attempts(read_journal(tmp_path / "run"))
    assert [one.get(provenance.RESUMED, "").partition(", ")[2] for one in tags] == ["", "epoch 1", "epoch 1"]
    assert {one["compute/device"] for one in tags} == {result.device} == {"cpu"}


def test_a_sweep_resumed_at_another_commit_says_so(tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "sweeps" / "2026-01-01_00-00-00_a_000000"
    jobs = []
    for seed in (0, 1, 2):
        config = composed("tracking=none", f"seed={seed}", f"paths.outputs={tmp_path}")
        jobs.append(sweep.Job(folder / f"{seed}_seed-{seed}", [f"seed={seed}"], config))
    sweep._save(folder, jobs, [])

    def finish(job: sweep.Job, tags: dict[str, str]) -> None:
        append(job.folder, "run", name="a", host="b")
        append(job.folder, "tags", values=tags)
        append(job.folder, "finish", status="FINISHED")
        name = configs.config_hash(job.config)
        numbers = {"train_acc": 0.9, "valid_acc": 0.8, "gap_acc": 0.1}
        RunResult("", "FINISHED", job.config.seed, "", name, **numbers).write(job.folder)

    for job in jobs[:2]:
        finish(job, OLD)
    commit = {"git/commit": NEW["git/commit"]}  # the kind of CPU is known once torch is imported, by the jobs
    monkeypatch.setattr(provenance, "source_tags", lambda: commit)
    monkeypatch.setattr(sweep, "_launch", lambda _launcher, waiting: [finish(job, NEW) for job in waiting] and None)
    hydra_config = OmegaConf.create(
        {"hydra": {"runtime": {"choices": {"hydra/launcher": "basic"}}, "overrides": {"hydra": []}}}
    )
    sweep._run(Console(width=300), folder, jobs, jobs[2:], hydra_config, None, [])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note.rpartition("them: ")[2] for note in notes] == [
        "commit aaaaaaa (2 runs), bbbbbbb (1 run)",
        "commit aaaaaaa (2 runs), bbbbbbb (1 run); CPU x86_64 AVX2 (2 runs), x86_64 AVX512 (1 run)",
    ]
    sweep._run(Console(width=300), folder, jobs, [], hydra_config, None, [])
    assert capsys.readouterr().out.count("note: ") == 1


def test_accelerator_gpu_is_cuda_for_every_launcher():
    assert worker.accelerator("gpu") == "cuda"
    assert worker.device_of(composed("trainer.accelerator=cpu")) == torch.device("cpu")
