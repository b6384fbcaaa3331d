"""Training beside an MLflow server that is away, slow or broken: the run is what it would have been, and MLflow gets
all of it, once. `make test-faults` prints what each trouble cost."""

import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

from gaplab import config as configs
from gaplab.tracking.journal import SEND_WAIT_S, read_journal, read_receipt

EPOCHS = 30
RUN = [
    f"trainer.max_epochs={EPOCHS}", "trainer.threads=1", "trainer.accelerator=cpu", "data.train_size=1000",
    "data.valid_size=500", "figures=false",
]  # fmt: skip
NOISE_S = 3.0  # of the seconds between two moments of a command; of its whole time, what the same run's times differ by
TIMES = ("run_id", "fit_s", "total_s", "steps_per_s", "times")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Proxy:
    """Stands before the server; `mode` is pass, 500, slow, hang or drop (the first answer to each request is lost)."""

    def __init__(self, backend: int) -> None:
        self.backend, self.port, self.mode = backend, free_port(), "pass"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.dropped: set[bytes] = set()
        self._server: ThreadingHTTPServer | None = None

    def start(self, mode: str = "pass") -> None:
        self.mode = mode
        if self._server is None:
            self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                mode = proxy.mode
                if mode == "hang":
                    while proxy.mode == "hang":
                        time.sleep(0.1)
                    return
                if mode == "500":
                    self.send_error(500)
                    return
                if mode == "slow":
                    time.sleep(2)
                link = http.client.HTTPConnection("127.0.0.1", proxy.backend, timeout=60)
                link.request(self.command, self.path, body, dict(self.headers))
                got = link.getresponse()
                answer = got.read()
                link.close()
                request = self.command.encode() + self.path.encode() + body
                if mode == "drop" and request not in proxy.dropped:
                    proxy.dropped.add(request)
                    return
                self.send_response(got.status)
                self.send_header("Content-Type", got.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815 (http.server's names)

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # whoever asked did not wait for the answer
                    super().handle()

        return Handler


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Iterator[Proxy]:
    home, port = tmp_path_factory.mktemp("server"), free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{home}/mlflow.db",
        "--artifacts-destination", str(home / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env=os.environ | settings, stdout=log, stderr=log, cwd=home, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.2)
        one = Proxy(port)
        yield one
        one.mode = "pass"
        one.stop()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


class Command(NamedTuple):
    """A training command: its seconds, those of them after the end of its run, its stderr and the run's folder."""

    seconds: float
    after: float
    error: str
    folder: Path


def train(outputs: Path, *words: str, meanwhile: Callable[[Path], None] | None = None) -> Command:
    script = configs.PROJECT / "src" / "train.py"
    start = time.monotonic()
    command = [sys.executable, str(script), *RUN, f"paths.outputs={outputs}", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if meanwhile is not None:
        threading.Thread(target=meanwhile, args=(outputs,), daemon=True).start()
    _, error = process.communicate(timeout=300)
    seconds = time.monotonic() - start
    assert process.returncode == 0, error
    now = time.time()
    (folder,) = (outputs / "runs").iterdir()
    return Command(seconds, now - list(read_journal(folder))[-1]["time"], error, folder)


def epoch_of(outputs: Path) -> int:
    steps = [event["step"] for one in outputs.glob("runs/*") for event in read_journal(one) if "step" in event]
    return max(steps, default=0)


def when(condition: Callable[[Path], bool], act: Callable[[], None]) -> Callable[[Path], None]:
    def watch(outputs: Path) -> None:
        while not condition(outputs):
            time.sleep(0.02)
        act()

    return watch


def sync(outputs: Path) -> "subprocess.CompletedProcess[str]":
    script = configs.PROJECT / "src" / "sync.py"
    return subprocess.run([sys.executable, str(script), f"paths.outputs={outputs}"], capture_output=True, text=True)


@pytest.fixture(scope="module")
def undisturbed(proxy: Proxy, tmp_path_factory) -> tuple[dict[str, Any], list[Command]]:
    """What a run says beside a good server, and runs without MLflow."""
    proxy.start()
    good = train(tmp_path_factory.mktemp("good"), f"tracking.uri={proxy.uri}")
    assert good.error == ""
    alone = [train(tmp_path_factory.mktemp("alone"), "tracking=none") for _ in range(3)]
    print("\ntracking=none:", ", ".join(f"{one.seconds:.1f} s ({one.after:.1f} s after its end)" for one in alone))
    print(f"a good server: {good.seconds:.1f} s ({good.after:.1f} s)")
    assert_all_is_there(proxy, good.folder)
    return json.loads((good.folder / "result.json").read_text()), alone


def assert_all_is_there(proxy: Proxy, folder: Path) -> tuple[int, int]:
    """MLflow has what the journal says, once; how many metric values are missing, and how many are there twice."""
    from mlflow import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{proxy.backend}")
    events = list(read_journal(folder))
    experiment = client.get_experiment_by_name("gaplab").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`gaplab.id` = '{events[0]['id']}'")
    said = Counter(
        (name, event["step"], value)
        for event in events
        if event["event"] == "metrics"
        for name, value in event["values"].items()
    )
    said += Counter(  # the gaps of accuracy once more, in percentage points
        {
            (f"{name}_pp", step, round(100 * value, 6)): count
            for (name, step, value), count in said.items()
            if name.startswith(("gap/acc", "best/gap/acc"))
        }
    )
    there = Counter(
        (name, metric.step, metric.value)
        for name in {name for name, _, _ in said} | set(run.data.metrics)
        for metric in client.get_metric_history(run.info.run_id, name)
    )
    missing, twice = sum((said - there).values()), sum((there - said).values())
    assert (missing, twice) == (0, 0)
    assert len(said) > 10 * EPOCHS
    params, tags = (
        {name: value for event in events if event["event"] == kind for name, value in event["values"].items()}
        for kind in ("params", "tags")
    )
    assert run.data.params == params
    assert tags.items() <= run.data.tags.items()
    names = {file.path for place in ("", "checkpoints") for file in client.list_artifacts(run.info.run_id, place)}
    artifacts = [event for event in events if event["event"] == "artifact"]
    assert {f"{one['folder']}/{Path(one['path']).name}".lstrip("/") for one in artifacts} <= names
    assert (run.info.status, run.data.tags["attempt"], len(run.inputs.dataset_inputs)) == ("FINISHED", "1", 1)
    assert read_receipt(folder)["run_id"] == run.info.run_id
    return missing, twice


def begun(outputs: Path) -> bool:
    return epoch_of(outputs) >= 2


def in_the_middle(outputs: Path) -> bool:
    sent = any("run_id" in read_receipt(one) for one in outputs.glob("runs/*"))
    return sent and epoch_of(outputs) >= EPOCHS // 3


def later(outputs: Path) -> bool:
    return epoch_of(outputs) >= EPOCHS * 2 // 3


def at_the_end(outputs: Path) -> bool:
    return epoch_of(outputs) >= EPOCHS


def gone_and_back(proxy: Proxy) -> Callable[[Path], None]:
    def watch(outputs: Path) -> None:
        when(in_the_middle, proxy.stop)(outputs)
        when(later, proxy.start)(outputs)

    return watch


# what the server does at the start; what happens meanwhile; whether a sync is needed
CASES: dict[str, tuple[str, Callable[[Proxy], Callable[[Path], None]] | None, bool]] = {
    "absent at the start, back during the run": ("refuse", lambda proxy: when(begun, proxy.start), False),
    "absent for the whole run": ("refuse", None, True),
    "gone in the middle and back": ("pass", gone_and_back, False),
    "gone in the middle for good": ("pass", lambda proxy: when(in_the_middle, proxy.stop), True),
    "gone at the end": ("pass", lambda proxy: when(at_the_end, proxy.stop), True),
    "2 s for each answer": ("slow", None, False),
    "answers 500": ("500", None, True),
    "does not answer": ("hang", None, True),
    "the first answer to each request is lost": ("drop", None, False),
}


@pytest.mark.parametrize("case", CASES)
def test_trouble_with_the_server_costs_seconds_and_no_data(case: str, proxy: Proxy, undisturbed, tmp_path: Path):
    expected, alone = undisturbed
    mode, meanwhile, needs_sync = CASES[case]
    if mode == "refuse":
        proxy.stop()
    else:
        proxy.start(mode)
    act = meanwhile(proxy) if meanwhile else None
    seconds, after, error, folder = train(tmp_path, f"tracking.uri={proxy.uri}", meanwhile=act)
    result = json.loads((folder / "result.json").read_text())
    assert {name: value for name, value in result.items() if name not in TIMES} == {
        name: value for name, value in expected.items() if name not in TIMES
    }
    assert error == "" or (error.startswith("MLflow does not have the whole run") and error.count("\n") == 1)
    with FileLock(folder / ".mlflow.lock", timeout=300):  # until its sender is done
        pass
    if needs_sync:
        assert "python src/sync.py" in error
        assert "run_id" not in read_receipt(folder) or "problem" in read_receipt(folder)
        if mode == "refuse" or meanwhile:
            away = sync(tmp_path)
            assert (away.returncode, away.stdout, away.stderr.count("\n")) == (1, "", 1)
            assert away.stderr.startswith("error: 0 runs sent, 1 not: http://127.0.0.1:")
        proxy.start()
        done = sync(tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"sent  runs/{folder.name}\n1 run sent\n"
    else:
        assert "problem" not in read_receipt(folder)
    missing, twice = assert_all_is_there(proxy, folder)
    again = sync(tmp_path)
    assert (again.returncode, again.stdout) == (0, "nothing to send: MLflow has all of it\n")
    assert json.loads((folder / "result.json").read_text())["run_id"] == read_receipt(folder)["run_id"]
    seconds -= statistics.mean(one.seconds for one in alone)
    after -= statistics.mean(one.after for one in alone)
    print(
        f"\n{case}: {seconds:+.1f} s, {after:+.1f} s of them after its end; {missing} missing, {twice} twice; "
        f"{'sync sent the rest' if needs_sync else 'sent by itself'}; said: {error.strip() or 'nothing'}"
    )
    assert after < SEND_WAIT_S + NOISE_S
    spread = max(one.seconds for one in alone) - min(one.seconds for one in alone)
    assert seconds < SEND_WAIT_S + NOISE_S + 2 * spread


def test_a_sweep_without_its_server_waits_once_and_not_for_each_job(proxy: Proxy, tmp_path: Path):
    from mlflow import MlflowClient

    def sweep(outputs: Path, tracking: str) -> tuple[float, str]:
        script = configs.PROJECT / "src" / "train.py"
        words = [*RUN, "trainer.max_epochs=2", "seed=range(4)", f"paths.outputs={outputs}", tracking]
        start = time.monotonic()
        done = subprocess.run([sys.executable, str(script), "-m", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return time.monotonic() - start, done.stderr

    proxy.stop()
    alone = [sweep(tmp_path / f"alone{number}", "tracking=none")[0] for number in range(2)]
    seconds, error = sweep(tmp_path / "dead", f"tracking.uri={proxy.uri}")
    assert error.startswith("MLflow does not have the whole run: http://127.0.0.1:")
    assert error.count("\n") == 1
    (folder,) = (tmp_path / "dead" / "sweeps").iterdir()
    with FileLock(folder / ".mlflow.lock", timeout=120):
        pass
    proxy.start()
    done = sync(tmp_path / "dead")
    assert (done.returncode, done.stdout) == (0, f"sent  sweeps/{folder.name}\n1 run sent\n")
    client = MlflowClient(f"http://127.0.0.1:{proxy.backend}")
    parent = client.get_run(read_receipt(folder)["run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    results = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    assert {run.info.run_id for run in children} == {result["run_id"] for result in results}
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 5
    for run in children:
        assert [one.step for one in client.get_metric_history(run.info.run_id, "gap/acc")] == [1, 2]
    seconds -= statistics.mean(alone)
    print(f"\na sweep of 4 jobs, absent for the whole of it: {seconds:+.1f} s; said: {error.strip()}")
    assert seconds < SEND_WAIT_S + NOISE_S + 2 * (max(alone) - min(alone))
