"""What a request to the served model takes, beside calling the model: latency, and pictures a second.

    python benchmarks/serving.py [--seconds 5]

It trains a small network, makes it champion, serves it by `src/serve.py`, asks it from processes of its own, and writes
the table in docs/serving.md. Requests are JSON, as curl sends them; the model is the one that was served, called in
this process on one picture or many.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import PROJECT, TRAIN, commit, machine, timed

PAGE = PROJECT / "docs" / "serving.md"
PORT = 5077
PICTURES = (1, 64)  # in a request
CLIENTS = 2


def request(pictures: np.ndarray) -> Callable[[], None]:
    """A function that sends them once more, each time over a connection of its own."""
    body = json.dumps({"inputs": pictures.tolist()}).encode()
    address = f"http://127.0.0.1:{PORT}/invocations"

    def send() -> None:
        question = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(question, timeout=60) as answer:
            assert len(json.load(answer)["predictions"]) == len(pictures)

    return send


def measure(call: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each call, for some seconds after a warm-up."""
    for _ in range(5):
        call()
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def client(pictures: np.ndarray, seconds: float) -> list[float]:
    return measure(request(pictures), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        outputs = f"paths.outputs={name}"
        timed(TRAIN, outputs, "model.bn=true", "trainer.max_epochs=1", "figures=false", "tracking.register=true")
        words = [sys.executable, str(PROJECT / "src" / "serve.py"), outputs, f"port={PORT}"]
        start = time.perf_counter()
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert server.stdout is not None
            print(server.stdout.readline(), end="")
            up = time.perf_counter() - start
            rows = [row for count in PICTURES for row in measured(count, seconds, Path(name))]
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    lines = [
        f"Measured by `benchmarks/serving.py` at {commit()} on {machine()}; the default MLP, MNIST's 28x28 pictures.",
        f"The server answered {up:.0f} s after the command.",
        "",
        "| pictures | asked how | p50, ms | p99, ms | pictures a second |",
        "|---|---|---|---|---|",
        *rows,
    ]
    text = "\n".join(lines)
    print(text)
    page = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?s)(<!-- measured -->\n).*?(<!-- /measured -->)", rf"\g<1>{text}\n\2", page))


def measured(count: int, seconds: float, outputs: Path) -> list[str]:
    import torch

    sys.path.insert(0, str(PROJECT / "src"))
    from gaplab.trained import load_model

    pictures = np.random.default_rng(0).integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
    model = load_model("models:/gaplab@champion", f"sqlite:///{outputs}/mlflow.db").probabilities
    direct = measure(lambda: model(torch.from_numpy(pictures)), seconds)
    single = measure(request(pictures), seconds)
    with multiprocessing.get_context("spawn").Pool(CLIENTS) as pool:
        several = pool.starmap(client, [(pictures, seconds)] * CLIENTS)
    rates = [count / np.mean(direct), count / np.mean(single), sum(count / np.mean(one) for one in several)]
    names = ["the model called", "one client", f"{CLIENTS} clients at once"]
    rows = []
    for name, taken, rate in zip(names, [direct, single, np.concatenate(several)], rates, strict=True):
        middle, high = 1e3 * np.percentile(taken, [50, 99])
        rows.append(f"| {count} | {name} | {middle:.2f} | {high:.2f} | {rate:,.0f} |")
    return rows


if __name__ == "__main__":
    main()
