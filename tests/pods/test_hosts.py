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
import numpy as np
import pytest

from lmm_jax.pods import hosts, place
from lmm_jax.pods.place import Place
from tests.ports import free_port

ROOT = pathlib.Path(__file__).parents[2]
SECRET = "what only the hosts of this test know"


@pytest.fixture
def environment(monkeypatch):
    """A machine that is part of nothing; `environment(NAME=…)` sets variables."""
    for name in list(os.environ):
        if name in hosts.VARIABLES or name.startswith(("TPU_", "MEGASCALE_", "JAX_COORDINATOR_", "LMM_HOSTS_")):
            monkeypatch.delenv(name)

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def tpu():
    """JAX as it is where there are TPUs and their library."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
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
    environment(TPU_PROCESS_ADDRESSES="a:8476,b:8476", MEGASCALE_NUM_SLICES="1", TPU_WORKER_ID="1")
    assert hosts.find_place() == Place("a:8482", 2, 1, ("a", "b"))
    environment(TPU_WORKER_ID="x")
    with pytest.raises(ValueError, match="TPU_WORKER_ID=x: expected a number"):
        hosts.find_place()
    environment(TPU_PROCESS_ADDRESSES="", TPU_WORKER_HOSTNAMES="alone", TPU_WORKER_ID="0")
    assert hosts.find_place() is None  # without asking anybody


def test_a_worker_of_a_tpu_vm_asks_its_metadata_server(environment, tpu, monkeypatch):
    monkeypatch.setattr(place, "TRIES", 2)
    attributes = {"agent-worker-number": "1", "worker-network-endpoints": "u:1:10.0.0.7,u:2:10.0.0.8", "tpu-env": ""}
    broken = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            assert self.path.startswith("/computeMetadata/v1/instance/attributes/")
            found = attributes.get(self.path.rpartition("/")[2])
            body = (found or "").encode()
            self.send_response(503 if broken and broken.pop() else 404 if found is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment(GCE_METADATA_IP=f"localhost:{server.server_address[1]}")
        assert hosts.find_place() == Place("10.0.0.7:8482", 2, 1, ("10.0.0.7", "10.0.0.8"))
        broken.append(True)
        assert hosts.find_place() == Place("10.0.0.7:8482", 2, 1, ("10.0.0.7", "10.0.0.8"))  # asked once more
        slices = {"NUM_SLICES": "2", "SLICE_ID": "1", "COORDINATOR_ADDRESS": "10.0.0.1:8081"}
        attributes["tpu-env"] = "ZONE: 'z'\n" + "".join(f"MEGASCALE_{k}: '{v}'\n" for k, v in slices.items())
        attributes["worker-network-endpoints"] = "one,two"
        assert hosts.find_place() == Place("10.0.0.1:8482", 4, 3)
        attributes["tpu-env"] = ""
        attributes["worker-network-endpoints"] = "u:1:10.0.0.7"
        attributes["agent-worker-number"] = "0"
        assert hosts.find_place() is None
        broken.extend([True, True])
        with pytest.raises(OSError, match="does not say which host of how many this is"):
            hosts.find_place()  # one that took itself for a single host would train beside the others
        attributes["agent-worker-number"] = "many"
        with pytest.raises(OSError, match="agent-worker-number=many"):
            hosts.find_place()
        del attributes["agent-worker-number"]
        assert hosts.find_place() is None  # a machine of the cloud, but no TPU VM
        environment(TPU_SKIP_MDS_QUERY="1", GCE_METADATA_IP="nobody")
        assert hosts.find_place() is None
        server.shutdown()
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    environment(GCE_METADATA_IP=f"localhost:{free_port()}")
    assert hosts.find_place() is None  # where there is no metadata server


# Joins, says so and then takes steps until it is told to stop, or has to do what its last words say.
HOST = """
import os, sys, threading, time
sys.argv = ["lmm", "train", *sys.argv[1:]]
from lmm_jax import cli
from lmm_jax.pods import hosts, wire
wire.SILENCE = float(os.environ.get("SILENCE", wire.SILENCE))
def run():
    hosts.start(folder=os.environ.get("FOLDER"))
    number = hosts.find_place().number
    if "spread" in sys.argv:
        found = hosts.spread([number, 0.5]).tolist(), hosts.everywhere(number == 0)
        print("spread", *found, hosts.anywhere([number == 1, False]).tolist(), flush=True)
    if "compiling" in sys.argv:
        if number == 1:
            threading.Timer(0.5, hosts.ask_to_stop).start()
        time.sleep(60)
    if "stuck" in sys.argv:
        if number == 1:
            threading.Timer(0.5, hosts.leave, (124, "step 8 takes longer than a step may")).start()
        time.sleep(60)
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
            variables = given(f"localhost:{self.port}", str(count), str(i)) | {"LMM_HOSTS_SECRET": SECRET}
            environment = os.environ | variables | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | env
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
        assert f"  {variables} LMM_HOSTS_SECRET=… lmm train --workdir 'gs://bucket/my run'\n" in pod.said(i)
        assert SECRET not in pod.said(i)
        assert "Traceback" not in pod.said(i) and "stack trace" not in pod.said(i)


def test_without_host_0_the_others_say_so(tmp_path):
    pod = Hosts(tmp_path, 2, [1], LMM_HOSTS_TIMEOUT="2")
    assert pod.codes() == [1]
    assert f"nobody answers at localhost:{pod.port + 1} in 2 s: host 0 is missing" in pod.said(1)
    assert "JAX_PROCESS_ID=0 LMM_HOSTS_SECRET=… lmm train\n" in pod.said(1)


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
    pod = Hosts(tmp_path, 3, range(3), "spread")
    for i in range(3):
        pod.wait_until_said(i, "spread [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]] False [True, False]")
    time.sleep(0.5)
    pod.processes[2].send_signal(signal.SIGTERM)
    pod.processes[1].send_signal(signal.SIGTERM)
    assert pod.codes() == [75, 75, 75]
    assert len({re.search(r"last (\d+)", pod.said(i))[1] for i in range(3)}) == 1


def test_one_host_alone_spreads_its_own_numbers():
    found = hosts.spread([1, 2.5])
    assert found.shape == (1, 2) and found.dtype == np.float64 and found.tolist() == [[1, 2.5]]
    assert hosts.everywhere(True) and not hosts.everywhere(False)
    assert hosts.anywhere([True, False]).tolist() == [True, False]
    hosts.ask_to_stop()  # nobody to ask
    hosts.leave(1, "nobody to tell")


def test_a_stop_while_all_compile_ends_all_at_once(tmp_path):
    begin = time.monotonic()
    pod = Hosts(tmp_path, 2, range(2), "compiling")
    assert pod.codes() == [75, 75] and time.monotonic() - begin < 40
    for i in range(2):
        assert f"host {i} of 2: asked to stop before the first step: nothing was lost" in pod.said(i)


def test_a_thread_ends_all_hosts_while_the_main_one_is_stuck(tmp_path):
    begin = time.monotonic()
    pod = Hosts(tmp_path, 2, range(2), "stuck")
    assert pod.codes() == [124, 124] and time.monotonic() - begin < 40
    assert "host 0 of 2: host 1: step 8 takes longer than a step may" in pod.said(0)


def test_output_that_nobody_reads_does_not_keep_a_process_from_its_end():
    code = "import threading; from lmm_jax.pods import wire; threading.Timer(0.5, wire.end, (3,)).start()\n"
    code += "while True: print('x' * 1000)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.wait(20) == 3


@pytest.mark.parametrize(
    ("frozen", "silence"),
    [(0, 2.0), *(pytest.param(*x, marks=pytest.mark.long) for x in ((1, 2.0), (1, 25.0), (0, 25.0)))],
)
def test_a_frozen_host_is_named_by_the_others_which_end(tmp_path, frozen, silence):
    count = 2 if silence < 25 else 3
    pod = Hosts(tmp_path, count, range(count), SILENCE=str(silence))
    for i in range(count):
        pod.wait_until_said(i, f"of {count}: 1 of {count} devices are here")
    pod.processes[frozen].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    others = [process for i, process in pod.processes.items() if i != frozen]
    assert {process.wait(40) for process in others} == {1}
    assert silence - 1 <= time.monotonic() - begin <= 30
    for i in {*range(count)} - {frozen}:
        said = pod.said(i)
        assert f"host {i} of {count}: host {frozen}: has given no sign of life for 25 s" in said
        assert "Traceback" not in said and "stack trace" not in said
    pod.processes[frozen].send_signal(signal.SIGCONT)
    assert pod.codes()[frozen] in (1, -signal.SIGABRT)


def test_hosts_that_see_one_folder_know_one_another_by_it(tmp_path):
    folder = tmp_path / "runs" / "mine"
    pod = Hosts(tmp_path, 2, [1], LMM_HOSTS_SECRET="", FOLDER=str(folder))
    pod.wait_until_said(1, "waiting for the others")
    first = Hosts(tmp_path, 2, [0], port=pod.port, LMM_HOSTS_SECRET="", FOLDER=str(folder))
    pod.processes |= first.processes
    pod.wait_until_said(0, "of 2: 1 of 2 devices are here")
    pod.wait_until_said(1, "of 2: 1 of 2 devices are here")
    assert not (tmp_path / "runs").exists()  # as it was
    pod.processes[1].send_signal(signal.SIGTERM)
    assert pod.codes() == [75, 75]


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
