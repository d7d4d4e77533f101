"""Several processes as the hosts of a pod: they equal one, stop together, and name what is missing."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from lmm_jax import lock
from lmm_jax.training.metrics import read_metrics
from tests.conftest import COMPILED, ROOT
from tests.ports import free_port

FEW = ("--config.train.steps=8", "--config.train.save_every=4", "--config.train.log_every=1")


class Pod:
    """Processes that run one command; their output goes to files."""

    def __init__(self, folder, hosts, *words, which=None, devices=1, port=None, **env):
        """`which`: numbers of the hosts that are started, all if None."""
        self.folder, self.port = folder, port or free_port()
        folder.mkdir(exist_ok=True)
        self.processes = {}
        for i in range(hosts) if which is None else which:
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{self.port}",
                "JAX_NUM_PROCESSES": str(hosts),
                "JAX_PROCESS_ID": str(i),
                "LMM_HOSTS_TIMEOUT": "60",
                **env,
            }
            command = [sys.executable, "-m", "tests.training.recorded", folder / f"records_{i}", *map(str, words)]
            with (folder / f"out_{i}").open("w") as out:
                self.processes[i] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
                )

    def codes(self, seconds=90):
        """Exit codes by host, once all have ended."""
        try:
            return {i: process.wait(seconds) for i, process in self.processes.items()}
        finally:
            for process in self.processes.values():
                process.kill()

    def said(self, host):
        return (self.folder / f"out_{host}").read_text()

    def wait_until_said(self, host, pattern, seconds=120):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.said(host)):
            assert self.processes[host].poll() is None and time.monotonic() < end, self.said(host)
            time.sleep(0.02)


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}


def difference(workdir, other):
    """Largest difference of loss over the same steps."""
    one, two = losses(workdir), losses(other)
    assert one.keys() == two.keys()
    return max(abs(one[step] - two[step]) for step in one)


def records(folder):
    """What stood in each pack: `{(step, pack): rows}`; no pack is read twice."""
    found = [json.loads(line) for file in folder.glob("records_*") for line in file.read_text().splitlines()]
    counted = collections.Counter((step, pack) for step, pack, _ in found)
    assert counted and set(counted.values()) == {1}
    return {(step, pack): [r for r in rows if r >= 0] for step, pack, rows in found}


def train(tiny_args, workdir, *more):
    return ["train", *tiny_args, "--workdir", workdir, *more]


@pytest.fixture(scope="module")
def runs(tiny_args, tmp_path_factory):
    """A run on one host of two devices, and the same on two hosts until one gets SIGTERM, then on one."""
    folder = tmp_path_factory.mktemp("hosts")
    one = Pod(folder / "one", 1, *train(tiny_args, folder / "run_1", *FEW), devices=2)
    command = train(tiny_args, folder / "run_2", *FEW)
    two = Pod(folder / "two", 2, *command)
    two.wait_until_said(0, r"step 3/8")
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.codes() == {0: 75, 1: 75}, two.said(0) + two.said(1)
    then = Pod(folder / "then", 1, *command, devices=2)
    assert then.codes() == {0: 0} and one.codes() == {0: 0}, then.said(0) + one.said(0)
    return one, two, then


def test_two_hosts_equal_one_and_one_host_continues_them(runs):
    one, two, then = (records(pod.folder) for pod in runs)
    assert two | then == one and not two.keys() & then.keys()
    of_host_1 = (runs[1].folder / "records_1").read_text().splitlines()
    assert {json.loads(line)[1] for line in of_host_1} == {4, 5, 6, 7}  # of the eight packs of a step
    assert difference(runs[0].folder.parent / "run_1", runs[0].folder.parent / "run_2") <= 1e-5


def test_sigterm_to_one_host_stops_both_after_the_same_step(runs):
    _, two, then = runs
    (stopped,) = {int(re.search(r"asked to stop; step (\d+) is saved", two.said(i))[1]) for i in range(2)}
    assert 3 <= stopped < 8 and max(step for step, _ in records(two.folder)) == stopped
    assert f"from step {stopped} of 8" in then.said(0)


def test_host_0_alone_writes_and_each_says_which_it_is(runs):
    two = runs[1]
    for i in range(2):
        assert f"host {i} of 2: waiting for the others at localhost:{two.port}" in two.said(i)
        assert f"host {i} of 2: 1 of 2 devices are here" in two.said(i)
    assert "step 3/8" in two.said(0) and "3/8" not in two.said(1)
    assert len((two.folder.parent / "run_2" / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.long
@pytest.mark.parametrize("hosts", [2, 4])
def test_thirty_steps_of_a_pod_equal_one_host(tiny_args, tmp_path, hosts):
    steps = ("--config.train.steps=30", "--config.train.save_every=10", "--config.train.log_every=1")
    for n in (1, hosts):
        pod = Pod(tmp_path / f"of_{n}", n, *train(tiny_args, tmp_path / f"run_{n}", *steps), devices=4 // n)
        assert set(pod.codes(300).values()) == {0}, pod.said(0)
    assert records(tmp_path / "of_1") == records(tmp_path / f"of_{hosts}")
    assert difference(tmp_path / "run_1", tmp_path / f"run_{hosts}") <= 1e-5


@pytest.mark.long
def test_a_run_goes_from_two_hosts_to_one_to_four(tiny_args, tmp_path):
    more = ("--config.train.steps=12", "--config.train.log_every=1")
    for n, until in {2: 3, 1: 7, 4: 12}.items():
        pod = Pod(tmp_path / f"of_{n}", n, *train(tiny_args, tmp_path / "run", *more), devices=4 // n)
        pod.wait_until_said(0, rf"step {until}/12", 300)
        for process in pod.processes.values():
            process.send_signal(signal.SIGTERM)
        assert len(set(pod.codes().values())) == 1, pod.said(0)
        assert pod.processes[0].returncode == 75 or until == 12
    whole = Pod(tmp_path / "whole", 1, *train(tiny_args, tmp_path / "other", *more), devices=4)
    assert whole.codes() == {0: 0}, whole.said(0)
    assert difference(tmp_path / "run", tmp_path / "other") <= 1e-5


@pytest.mark.long
def test_bad_data_on_one_host_stops_all_with_its_reason(tiny_args, tmp_path):
    command = train(tiny_args, tmp_path / "run", *FEW, "--config.data.max_bad_run=1")
    pod = Pod(tmp_path / "two", 2, *command, BROKEN_HOST="1")
    assert pod.codes() == {0: 2, 1: 2}
    reason = r"host 0 of 2: host 1: BadData: \d+ records one after another could not be read.*bad_records_1.jsonl"
    assert re.search(reason, pod.said(0))


@pytest.mark.long
def test_what_host_0_refuses_ends_all(runs, tiny_args, tmp_path):
    """What all can know each of them says; that another process trains there, host 0 alone."""
    workdir = runs[0].folder.parent / "run_2"
    with lock.hold(workdir, "lmm train"):
        pod = Pod(tmp_path / "two", 2, *train(tiny_args, workdir, *FEW))
        assert pod.codes() == {0: 2, 1: 2}
    assert "host 1 of 2: host 0: Held" in pod.said(1) and "is being written to by `lmm train`" in pod.said(1)
