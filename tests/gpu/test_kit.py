"""The checks of `make test-gpu`, in their small form on the CPU, so that the kit works on the day a GPU is at hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Forked

sys.path.append(str(Path(__file__).parent))

import kit

NEED_A_GPU = ["out_of_memory", "memory", "two_ranks", "nccl"]
NAMES = {function.__name__: function for _, function in kit.CHECKS}
BENCHMARKS = kit.PROJECT / "benchmarks"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEED_A_GPU])
def test_a_check_passes_on_the_cpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr(kit.subprocess, "Popen", lambda command, **_: Forked(*command[2:]))
    assert NAMES[name](kit.Kit(True, tmp_path))


@pytest.mark.parametrize("name", NEED_A_GPU)
def test_what_only_a_gpu_shows_is_not_run_and_says_so(name, tmp_path):
    with pytest.raises(kit.NotRunError, match="needs a GPU"):
        NAMES[name](kit.Kit(True, tmp_path))


def staged(monkeypatch, tmp_path, *checks):
    monkeypatch.setattr(kit, "CHECKS", list(checks))
    status = kit.main(["--dry", "--out", str(tmp_path)])
    return status, json.loads((tmp_path / "test-gpu.json").read_text())


def test_each_check_has_a_line_and_only_a_failure_changes_the_status(monkeypatch, tmp_path, capsys):
    def good(_):
        return "1 = 1"

    def missing(_):
        raise kit.NotRunError("this needs a GPU")

    def bad(_):
        raise AssertionError("1 != 2")

    status, found = staged(monkeypatch, tmp_path, ("good", good), ("missing", missing))
    lines = capsys.readouterr().out.splitlines()
    assert (status, found["counts"]) == (0, {"passed": 1, "FAILED": 0, "not run": 1})
    assert lines[1].startswith("passed")
    assert lines[1].endswith("good: 1 = 1")
    assert lines[2].startswith("not run")
    assert "1 passed, 0 failed, 1 not run" in lines[3]
    status, found = staged(monkeypatch, tmp_path, ("bad", bad))
    assert (status, found["counts"]["FAILED"]) == (1, 1)
    assert "AssertionError: 1 != 2" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(kit.torch.cuda, "is_available", lambda: False)
    assert kit.main([]) == 2
    assert "no GPU here; --dry runs the checks on the CPU" in capsys.readouterr().err


def test_a_run_on_a_gpu_enters_its_row_into_the_pages(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{kit.BEGIN}\nwritten, not yet run on a GPU\n{kit.END}\nafter\n")
    monkeypatch.setattr(kit, "PAGES", (page,))
    where = {"versions": {"torch": "2.11.0+cu130"}, "cuda": "13.0", "driver": "580", "device": "a GPU", "date": "today"}
    kit.write_status(kit.status_table(where, "16 passed, 0 failed, 0 not run"))
    text = page.read_text()
    assert "| 16 passed, 0 failed, 0 not run | a GPU | torch 2.11.0+cu130, CUDA 13.0, driver 580 | today | 1 |" in text
    assert "not yet run" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_the_pages_have_a_place_for_it():
    for page in kit.PAGES:
        assert page.read_text().count(kit.BEGIN) == page.read_text().count(kit.END) == 1


@pytest.mark.full
def test_the_benchmark_runs_on_the_cpu_and_leaves_the_page_alone(tmp_path):
    page = kit.PROJECT / "docs" / "benchmarks.md"
    before = page.read_bytes()
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert found["not_measured"] == []
    assert len(found["rows"]) == 8
    assert page.read_bytes() == before
