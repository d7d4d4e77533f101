"""launch/local_pod.sh, with a stand-in for `python -m lmm_jax`."""

import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Says what it was started with, then does what `plot` says.
PYTHON = f"""#!/usr/bin/env bash
[ "$1" != -c ] || exec {sys.executable} "$@"
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $JAX_PLATFORMS $JAX_NUM_CPU_DEVICES: $*"
echo "$LMM_HOSTS_SECRET" >> "$SECRETS"
echo "[Gloo] Rank 0 is connected"
trap 'kill $!; echo saved; exit 75' TERM
. "$PLOT"
"""
HANG = "sleep 30 & echo child $! >> $CHILDREN; wait $!; exit 3"


@pytest.fixture
def start(tmp_path):
    processes = []

    def start(plot, *words, **env):
        (tmp_path / "python").write_text(PYTHON)
        (tmp_path / "python").chmod(0o755)
        (tmp_path / "plot").write_text(plot)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VIRTUAL_ENV": "x", "PLOT": str(tmp_path / "plot"), **env}
        env["SECRETS"] = str(tmp_path / "secrets")
        env["CHILDREN"] = str(tmp_path / "children")
        process = subprocess.Popen(
            # A shell cannot trap what it was started to ignore, as these tests are where they run in the background.
            ["env", "--default-signal=INT", ROOT / "launch/local_pod.sh", *words],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def children(tmp_path, count):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = (tmp_path / "children").read_text().split()[1::2] if (tmp_path / "children").exists() else []
        if len(found) == count:
            return list(map(int, found))
        time.sleep(0.02)
    raise AssertionError(found)


def test_every_host_knows_its_place_and_the_first_failure_is_the_exit_code(start):
    process = start("[ $JAX_PROCESS_ID = 0 ] || exit 4; sleep 0.5; exit 5", "4", "--config", "a b")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 4
    lines = sorted(out.splitlines())
    (address,) = {line.split()[6].rstrip(":") for line in lines}
    assert lines == [f"[host {i}] {i} of 4 at {address}: cpu 2: -m lmm_jax train --config a b" for i in range(4)]


def test_hosts_know_one_another_by_a_secret_of_this_run(start, tmp_path):
    told = []
    for given in ({}, {}, {"LMM_HOSTS_SECRET": "of the user's own choice"}):
        process = start("true", "3", **given)
        out, _ = process.communicate(timeout=30)
        (secret,) = set((tmp_path / "secrets").read_text().splitlines())
        (tmp_path / "secrets").unlink()
        assert secret not in out
        told.append(secret)
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in told[:2]) and told[0] != told[1]
    assert told[2] == "of the user's own choice"


def test_devices_can_be_chosen_and_all_well_is_0(start):
    process = start("true", "16", JAX_NUM_CPU_DEVICES="3")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.count(": cpu 3:") == 16
    assert start("true", "10").communicate(timeout=30)[0].count(": cpu 1:") == 10


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_go_on_to_all(start, tmp_path, how):
    process = start(HANG, "2")
    children(tmp_path, 2)
    process.send_signal(how)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "[host 0] saved" in out and "[host 1] saved" in out


def test_a_second_ctrl_c_kills_all_with_their_children(start, tmp_path):
    process = start(f"trap '' TERM; {HANG}", "2")  # hosts that take their time to save
    pids = children(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    time.sleep(0.2)
    for pid in pids:
        path = pathlib.Path(f"/proc/{pid}/stat")
        assert not path.exists() or path.read_text().split()[2] == "Z"


def test_help_and_a_wrong_number(start):
    process = start("true", "--help")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "N processes" in out
    assert start("true", "0").wait(30) == 2
    assert start("true").wait(30) == 2
