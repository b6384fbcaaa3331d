"""The champion behind HTTP: what it answers, what it refuses, and that it leaves nothing running."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import uvicorn
from conftest import SMALL, assert_refused, composed, put_into_mlflow, typed

from gaplab import config as configs
from gaplab import export, launch
from gaplab.config import Serve
from gaplab.errors import UserError
from gaplab.tracking.registry import Registry, download
from gaplab.tracking.server import check_port
from gaplab.tracking.serving import serve
from gaplab.trained import load_run


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    home = tmp_path_factory.mktemp("serving")
    launch.launch(composed(*SMALL, f"paths.outputs={home}"), home / "runs" / "one")
    uri, run_id = f"sqlite:///{home}/mlflow.db", put_into_mlflow(home / "runs" / "one")
    model_id = export.log(home / "runs" / "one", run_id, list(configs.USUAL_TARGETS), uri)
    models = Registry(uri, "gaplab")
    models.crown(models.add(model_id, run_id, "served"))
    return home


@pytest.fixture(scope="module")
def server(champion, tmp_path_factory):
    """The port of MLflow's scoring server with the champion, in a thread."""
    from mlflow.pyfunc import load_model
    from mlflow.pyfunc.scoring_server import init

    port = free_port()
    path, _ = download(Serve.model_uri, f"sqlite:///{champion}/mlflow.db", tmp_path_factory.mktemp("model"))
    one = uvicorn.Server(uvicorn.Config(init(load_model(str(path))), port=port, log_level="error"))
    thread = threading.Thread(target=one.run)
    thread.start()
    while not one.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield port
    one.should_exit = True
    thread.join()


@pytest.mark.full
def test_the_command_serves_until_it_is_interrupted_and_leaves_nothing(champion, digits):
    port = free_port()
    command = [sys.executable, str(configs.PROJECT / "src" / "serve.py"), f"paths.outputs={champion}", f"port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert f"http://127.0.0.1:{port}/invocations; pictures are uint8 of shape [-1, 1, 28, 28]" in said
    assert ask(port, inputs(digits[0][:1].tolist()))[0] == 200
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    check_port(port, "free again")


def ask(port, body, kind="application/json", path="/invocations"):
    question = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(question, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def inputs(value):
    return json.dumps({"inputs": value}).encode()


@pytest.mark.parametrize("count", [1, 5])
def test_it_says_what_the_network_says(champion, server, digits, count):
    status, text = ask(server, inputs(digits[0][:count].tolist()))
    assert status == 200
    network = load_run("one", champion, None)
    expected = network.probabilities(digits[0][:count])
    assert np.allclose(json.loads(text)["predictions"], expected, atol=1e-6)


ZEROS = np.zeros((1, 1, 28, 28), int)
REFUSED = {
    "no JSON": (b"{", 400, "Ensure that input is a valid JSON formatted string"),
    "another shape": (inputs(np.zeros((1, 28, 28), int).tolist()), 400, "Failed to enforce schema of data"),
    "a pixel of 300": (inputs((ZEROS + 300).tolist()), 400, "Python integer 300 out of bounds for uint8"),
    "a pixel of -1": (inputs((ZEROS - 1).tolist()), 400, "Python integer -1 out of bounds for uint8"),
    "no inputs": (b'{"pictures": [1]}', 400, "must be a JSON dictionary with exactly one of the input fields"),
    "rows of unequal length": (inputs([[[[0] * 28] * 27 + [[0] * 3]]]), 400, "Invalid input"),
    "words": (inputs([[[["black"] * 28] * 28]]), 400, "Invalid input"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_with_a_reason(server, case):
    body, status, reason = REFUSED[case]
    found, text = ask(server, body)
    assert (found, reason in text) == (status, True), text


def test_other_kinds_and_methods_are_refused(server):
    assert ask(server, b"\x89PNG", "image/png") == (415, ask(server, b"\x89PNG", "image/png")[1])
    assert "only supports the following content types" in ask(server, b"\x89PNG", "image/png")[1]
    assert ask(server, None)[0] == 405
    assert ask(server, None, path="/ping")[0] == 200


def test_bad_input_is_one_line(champion, server, tmp_path):
    where = f"paths.outputs={champion}"
    assert_refused(typed("serve", where, f"port={server}", cwd=tmp_path), f"port={server}: cannot be used")


def test_a_version_that_is_not_there_is_named(champion):
    store = configs.MLflow(uri=f"sqlite:///{champion}/mlflow.db")
    settings = Serve(tracking=store, model_uri="models:/gaplab/7", port=free_port())
    with pytest.raises(UserError, match="models:/gaplab/7: "):
        serve(settings)


def test_a_store_that_is_not_there_is_named(tmp_path):
    settings = Serve(tracking=configs.MLflow(uri=f"sqlite:///{tmp_path}/mlflow.db"), port=free_port())
    with pytest.raises(UserError, match="no such store"):
        serve(settings)
