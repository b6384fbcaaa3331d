"""Two machines that train one network: network namespaces with a real network between them. As root, on Linux."""

import json
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import SMALL, composed
from processes import of_gaplab, started
from ranks_forked import run_ranks
from test_devices import EXACT, ODD, farthest, trained  # type: ignore[import-not-found]

HOSTS = ("gaplab-a", "gaplab-b")
ENDPOINT = "trainer.rdzv_endpoint=10.77.0.1:29511"
TWO = ["trainer.num_nodes=2", ENDPOINT, "tracking=none", "trainer.threads=1"]


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@pytest.fixture
def hosts():
    """How to run a command on each of two hosts, which are joined by a cable."""
    for name in HOSTS:
        ip(f"netns add {name}")
    ip(f"link add veth-a netns {HOSTS[0]} type veth peer name veth-b netns {HOSTS[1]}")
    for number, name in enumerate(HOSTS, 1):
        ip(f"-n {name} address add 10.77.0.{number}/24 dev veth-{name[-1]}")
        ip(f"-n {name} link set veth-{name[-1]} up")
        ip(f"-n {name} link set lo up")
    yield [("ip", "netns", "exec", name) for name in HOSTS]
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], check=False)


def both(hosts, words: list[str], outputs: Path) -> "list[subprocess.Popen[str]]":
    words = [*words, *TWO, f"paths.outputs={outputs}"]
    return [started(*words, f"trainer.node_rank={rank}", before=host) for rank, host in enumerate(hosts)]


def wait_for_epoch(number: int, outputs: Path, processes) -> Path:
    while True:
        assert all(process.poll() is None for process in processes), [one.communicate() for one in processes]
        for folder in outputs.glob("runs/*"):
            journal = folder / "journal.jsonl"
            if journal.is_file() and f'"step": {number}' in journal.read_text():
                return folder
        time.sleep(0.05)


def ended(processes) -> list[tuple[int, str]]:
    said = [process.communicate()[1].strip() for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_two_hosts_train_the_network_that_one_does(hosts, tmp_path):
    words = [*ODD, *EXACT, "trainer.max_epochs=3"]
    begin = time.monotonic()
    processes = both(hosts, words, tmp_path)
    assert ended(processes) == [(0, ""), (0, "")]
    print(f"\ntwo hosts: {time.monotonic() - begin:.1f} s in all")
    (folder,) = tmp_path.glob("runs/*")
    alone = run_ranks(composed(*words), tmp_path / "alone", 1)
    result = json.loads((folder / "result.json").read_text())
    print(f"weights differ by {farthest(trained(folder), trained(tmp_path / 'alone')):.1e} at most")
    assert farthest(trained(folder), trained(tmp_path / "alone")) < 1e-12
    names = ("train_acc", "valid_acc", "test_acc", "train_acc_running", "gap_acc", "steps")
    assert {name: result[name] for name in names} == {name: alone[name] for name in names}


def test_a_host_that_is_cut_off_ends_the_run_on_both_and_they_go_on(hosts, tmp_path):
    words = [*ODD, *EXACT, "trainer.max_epochs=100"]
    processes = both(hosts, words, tmp_path)
    folder = wait_for_epoch(3, tmp_path, processes)
    ip(f"-n {HOSTS[1]} link set veth-b down")
    begin = time.monotonic()
    (first, said), (second, said_there) = ended(processes)
    seconds = time.monotonic() - begin
    print(f"\ncut off: both ended after {seconds:.1f} s\n  {said}\n  {said_there}")
    assert (first, second) == (1, 1)
    assert seconds < 30
    assert said.startswith("error: machine 1 ")
    assert said_there.startswith("error: machine 0 ")
    assert json.loads((folder / "result.json").read_text())["status"] == "FAILED"
    assert of_gaplab(tmp_path) == []

    ip(f"-n {HOSTS[1]} link set veth-b up")
    again = [
        started(f"resume={folder}", *TWO[:2], f"trainer.node_rank={rank}", f"paths.outputs={tmp_path}", before=host)
        for rank, host in enumerate(hosts)
    ]
    assert ended(again) == [(0, ""), (0, "")]
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("FINISHED", 100 * 16)


def test_ctrl_c_on_one_host_saves_and_ends_both(hosts, tmp_path):
    processes = both(hosts, [*ODD, "trainer.max_epochs=100"], tmp_path)
    folder = wait_for_epoch(3, tmp_path, processes)
    begin = time.monotonic()
    processes[0].send_signal(signal.SIGTERM)
    found = ended(processes)
    print(f"\nSIGTERM on one host: both ended after {time.monotonic() - begin:.1f} s: {found}")
    assert [status for status, _ in found] == [143, 143]
    assert json.loads((folder / "result.json").read_text())["status"] == "KILLED"
    assert of_gaplab(tmp_path) == []


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "error: machine 1 of 2 did not join within 4 s"),
        (1, "error: trainer.rdzv_endpoint=10.77.0.1:29511: no answer within 4 s"),
    ],
)
def test_a_host_that_never_joins_is_named(hosts, rank, said, tmp_path):
    words = [*SMALL, *TWO, "trainer.join_timeout_s=4", f"paths.outputs={tmp_path}", f"trainer.node_rank={rank}"]
    ((status, error),) = ended([started(*words, before=hosts[rank])])
    assert status == 2
    assert error.startswith(said)
    assert len(error.splitlines()) == 1


def test_a_port_in_use_is_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"trainer.rdzv_endpoint=127.0.0.1:{server.getsockname()[1]}"
        ((status, error),) = ended([started(*TWO[:1], *TWO[2:], endpoint, f"paths.outputs={tmp_path}")])
    assert (status, error) == (2, f"error: {endpoint}: cannot be listened at (the port is in use)")


def test_hosts_with_other_words_are_refused(hosts, tmp_path):
    words = [*SMALL, *TWO, f"paths.outputs={tmp_path}"]
    begin = partial(started, *words)
    processes = [
        begin("trainer.node_rank=0", before=hosts[0]),
        begin("trainer.node_rank=1", "optimizer.lr=0.5", before=hosts[1]),
    ]
    assert {status for status, _ in ended(processes)} == {2}
