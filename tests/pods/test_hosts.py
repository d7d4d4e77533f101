"""Which host of how many a process is, who is missing, and when all stop; without a model."""

import http.server
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from lmm_jax.pods import hosts
from lmm_jax.pods.wire import Place
from tests.ports import free_port

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def environment(monkeypatch):
    """A machine that is part of nothing; `environment(NAME=…)` sets variables."""
    for name in (*hosts.VARIABLES, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def tpu(monkeypatch):
    """JAX as it is where there are TPUs and their library."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    yield
    jax.config.update("jax_platforms", before)


def given(address="10.0.0.1:1234", count="4", number="2"):
    return dict(zip(hosts.VARIABLES, (address, count, number), strict=True))


def test_the_variables_say_which_host_this_is(environment):
    assert hosts.find_place() is None
    environment(**given())
    assert hosts.find_place() == Place("10.0.0.1:1234", 4, 2)
    with pytest.raises(ValueError, match="lmm evaluate runs on one host, and this is host 2 of 4"):
        hosts.refuse("lmm evaluate")
    environment(**given(count="1", number="0"))
    assert hosts.find_place() is None


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (given(number="4"), "JAX_PROCESS_ID=4 of JAX_NUM_PROCESSES=4"),
        (given(count="many"), "expected numbers from 0"),
        (given(address="10.0.0.1"), "expected ADDRESS:PORT"),
    ],
)
def test_variables_that_contradict_are_refused(environment, variables, words):
    environment(**variables)
    with pytest.raises(ValueError, match=words):
        hosts.find_place()


def test_a_pod_of_gke(environment, tpu):
    environment(TPU_WORKER_HOSTNAMES="a,b,c,d", TPU_WORKER_ID="3")
    environment(MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1", MEGASCALE_COORDINATOR_ADDRESS="first:8080")
    assert hosts.find_place() == Place("first:8482", 8, 7)
    environment(TPU_WORKER_HOSTNAMES="alone", MEGASCALE_NUM_SLICES="1")
    assert hosts.find_place() is None  # without asking anybody


def test_a_worker_of_a_tpu_vm_asks_its_metadata_server(environment, tpu):
    attributes = {"agent-worker-number": "1", "worker-network-endpoints": "u:1:10.0.0.7,u:2:10.0.0.8", "tpu-env": ""}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = attributes[self.path.rpartition("/")[2]].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment(GCE_METADATA_IP=f"localhost:{server.server_address[1]}")
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
            assert hosts.find_place() == Place("10.0.0.7:8482", 2, 1, ("10.0.0.7", "10.0.0.8"))
            attributes["worker-network-endpoints"] = "u:1:10.0.0.7"
            attributes["agent-worker-number"] = "0"
            assert hosts.find_place() is None
        server.shutdown()


# Joins, says so and then each line of `steps` that it is let do: a step, or an error.
HOST = """
import sys, time
sys.argv = ["lmm", "train", *sys.argv[1:]]
from lmm_jax import cli
from lmm_jax.pods import hosts
def run():
    hosts.start()
    pace = 0.02 * (1 + hosts.find_place().number)  # one is ahead of the other
    for step in range(1, 10_000):
        time.sleep(pace)
        if hosts.is_last(step):
            print("last", step, flush=True)
            return 75
        if step == 20 and sys.argv[-2:] == ["broken", str(hosts.find_place().number)]:
            raise ValueError(f"a record of host {sys.argv[-1]}")
try:
    code = run()
except Exception as error:
    code = cli._leave(cli._report(error), error)
sys.exit(code)
"""


class Hosts:
    """Processes that do as `HOST`; their output goes to files."""

    def __init__(self, folder, count, which, *words, port=None, **env):
        self.folder, self.port = folder, port or free_port()
        self.processes = {}
        for i in which:
            place = given(f"localhost:{self.port}", str(count), str(i))
            environment = os.environ | place | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | env
            with (folder / f"out_{i}").open("w") as out:
                self.processes[i] = subprocess.Popen(
                    [sys.executable, "-c", HOST, *words],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )

    def codes(self, seconds=60):
        try:
            return [process.wait(seconds) for process in self.processes.values()]
        finally:
            for process in self.processes.values():
                process.kill()

    def said(self, host):
        return (self.folder / f"out_{host}").read_text()

    def wait_until_said(self, host, words, seconds=60):
        end = time.monotonic() + seconds
        while words not in self.said(host):
            assert self.processes[host].poll() is None and time.monotonic() < end, self.said(host)
            time.sleep(0.02)


def test_a_missing_host_is_named_with_what_to_run_there(tmp_path):
    begin = time.monotonic()
    pod = Hosts(tmp_path, 3, [0, 2], "--workdir", "gs://bucket/my run", LMM_HOSTS_TIMEOUT="4")
    assert pod.codes() == [1, 1]
    assert time.monotonic() - begin < 30
    variables = f"JAX_COORDINATOR_ADDRESS=localhost:{pod.port} JAX_NUM_PROCESSES=3 JAX_PROCESS_ID=1"
    for i in (0, 2):
        assert f"host {i} of 3: waiting for the others at localhost:{pod.port}" in pod.said(i)
        assert "not all hosts came in 4 s: host 1 is missing; run there" in pod.said(i)
        assert f"  {variables} lmm train --workdir 'gs://bucket/my run'\n" in pod.said(i)
        assert "Traceback" not in pod.said(i) and "stack trace" not in pod.said(i)


def test_without_host_0_the_others_say_so(tmp_path):
    pod = Hosts(tmp_path, 2, [1], LMM_HOSTS_TIMEOUT="2")
    assert pod.codes() == [1]
    assert f"nobody answers at localhost:{pod.port + 1} in 2 s: host 0 is missing" in pod.said(1)
    assert "JAX_PROCESS_ID=0 lmm train\n" in pod.said(1)


def test_another_command_is_refused_on_all_hosts(tmp_path):
    port = free_port()
    (tmp_path / "other").mkdir()
    pods = (
        Hosts(tmp_path, 2, [0], "--seed", "1", port=port),
        Hosts(tmp_path / "other", 2, [1], "--seed", "2", port=port),
    )
    assert [pod.codes() for pod in pods] == [[2], [2]]
    for said in (pods[0].said(0), pods[1].said(1)):
        assert "host 1 is refused: it runs `train --seed 2`, host 0 `train --seed 1`" in said


def test_sigterm_to_any_host_gives_all_the_same_last_step(tmp_path):
    pod = Hosts(tmp_path, 3, range(3))
    for i in range(3):
        pod.wait_until_said(i, "of 3: 1 of 3 devices are here")
    time.sleep(0.5)
    pod.processes[2].send_signal(signal.SIGTERM)
    pod.processes[1].send_signal(signal.SIGTERM)
    assert pod.codes() == [75, 75, 75]
    assert len({re.search(r"last (\d+)", pod.said(i))[1] for i in range(3)}) == 1


@pytest.mark.parametrize(("how", "lost"), [("broken", 1), ("broken", 0), (signal.SIGKILL, 1), (signal.SIGKILL, 0)])
def test_the_end_of_one_host_is_that_of_all_with_its_reason(tmp_path, how, lost):
    pod = Hosts(tmp_path, 2, range(2), str(how), str(lost))
    pod.wait_until_said(1 - lost, "of 2: 1 of 2 devices are here")
    if how == "broken":
        assert pod.codes() == [1, 1]
        reason = f"host {1 - lost} of 2: host {lost}: ValueError: a record of host {lost}"
        assert reason in pod.said(1 - lost)
        return
    begin = time.monotonic()
    pod.processes[lost].send_signal(how)
    codes = pod.codes()
    assert time.monotonic() - begin < 15
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] in (1, -signal.SIGABRT)  # JAX may be sooner, and aborts
    assert f"host {1 - lost} of 2: host {lost}: is gone: killed, or its machine is lost" in pod.said(1 - lost)
