"""The pod scripts, against stand-ins for `gcloud` and `kubectl`; what they start on workers runs here for real."""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lmm_jax.aot import topology as slices

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = ("lmm", "train", "--config", "configs/m3.py:size=7b,name='a b'", "--workdir", "gs://bucket/run")

# A cloud is a folder: `state` holds the states of the queued resource that are still to be told, `plan` those of the
# next one, worker-0 and worker-1 are homes, fail-VERB says how often VERB fails, and `steps` are saved checkpoints.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
printf '%q ' "$@" >> "$CLOUD/calls"
echo >> "$CLOUD/calls"
/bin/sleep "${SLOW:-0}"
if [ "$1" = storage ]; then
  [ -e "$CLOUD/steps" ] || { echo "ERROR: One or more URLs matched no objects." >&2 && exit 1; }
  for step in $(cat "$CLOUD/steps") 999.orbax-checkpoint-tmp-7; do echo "gs://bucket/run/checkpoints/$step/"; done
  exit
fi
[ "$1 $2 $3" = "compute tpus queued-resources" ]
verb=$4
left=$(cat "$CLOUD/fail-$verb" 2> /dev/null || echo 0)
if [ "$left" -gt 0 ]; then
  echo $((left - 1)) > "$CLOUD/fail-$verb"
  echo "ERROR: ($verb) UNAVAILABLE" >&2 && exit 1
fi
if [ "$verb" != create ] && [ ! -e "$CLOUD/state" ]; then echo "ERROR: NOT_FOUND: no $5" >&2 && exit 1; fi
worker="*"
for argument; do
  case $argument in
    --command=*) command=${argument#*=} ;;
    --worker=[0-9]) worker=${argument#*=} ;;
  esac
done
case $verb in
  create)
    [ ! -e "$CLOUD/state" ] || { echo "ERROR: ALREADY_EXISTS" >&2 && exit 1; }
    mkdir "$CLOUD/worker-0" "$CLOUD/worker-1"
    cp "$CLOUD/plan" "$CLOUD/state"
    ;;
  describe)
    head -n 1 "$CLOUD/state"
    if [ "$(wc -l < "$CLOUD/state")" -gt 1 ]; then sed -i 1d "$CLOUD/state"; fi
    ;;
  delete)
    for pid in $(cat "$CLOUD"/worker-*/lmm_run/pid 2> /dev/null); do kill -KILL -- "-$pid" 2> /dev/null || true; done
    rm -rf "$CLOUD/state" "$CLOUD"/worker-?
    ;;
  ssh | scp)
    [ "$(cat "$CLOUD/state")" = ACTIVE ] || { echo "ERROR: cannot connect" >&2 && exit 255; }
    code=0
    for home in "$CLOUD"/worker-$worker; do
      if [ "$verb" = scp ]; then cp -p "$5" "$home/${6#*:}" && continue; fi
      echo "SSH: Attempting to connect to worker ${home##*-}..."
      host=(env -i HOME="$home" CLOUD="$CLOUD" PATH="$CLOUD/host:/usr/bin:/bin")
      (cd "$home" && "${host[@]}" bash -c "$command") || code=$?
    done
    exit "$code"
    ;;
esac
"""

# What python3 is on a worker: its environments get the `lmm` below, which acts line N of `plot` in attempt N.
PYTHON = r"""#!/usr/bin/env bash
set -eu
echo "$*" >> "$HOME/python"
case $* in
  *version_info*) [ ! -e "$CLOUD/old_python" ] || [ "${0##*/}" = python ] ;;
  *"venv "*)
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    cp "$CLOUD/lmm" .venv/bin/lmm
    echo "export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:\$PATH" > .venv/bin/activate
    ;;
  *sys.prefix*) echo "$PWD/.venv" ;;
esac
"""

LMM = r"""#!/usr/bin/env bash
save() { echo "$1" >> "$CLOUD/steps"; }
preempt() { echo SUSPENDED > "$CLOUD/state"; }
hang() {
  trap 'kill $!; exit 75' TERM
  /bin/sleep 30 &
  wait $!
}
counter=$CLOUD/attempts-${HOME##*-}
attempt=$(($(cat "$counter" 2> /dev/null || echo 0) + 1))
echo "$attempt" > "$counter"
echo "attempt $attempt in ${PWD##*/} with key ${WANDB_API_KEY:-none}, secret ${LMM_HOSTS_SECRET:-none}:"
printf '<%s>' "$@" && echo
line=$(sed -n "${attempt}p" "$CLOUD/plot")
eval "${line:-$(tail -n 1 "$CLOUD/plot")}"
"""

KUBECTL = r"""#!/usr/bin/env bash
set -eu
printf '%q ' "$@" >> "$CLOUD/calls"
echo >> "$CLOUD/calls"
if [ "$1 $2" = "get crd" ]; then [ ! -e "$CLOUD/no_jobset" ]; fi
for argument; do
  case $argument in
    --filename=-) cat > "$CLOUD/jobset.yaml" ;;
    --from-env-file=*) cp "${argument#*=}" "$CLOUD/secret" ;;
  esac
done
"""

SLEEP = '#!/bin/sh\necho "$1" >> "$CLOUD/sleeps"\nexec /bin/sleep 0.02\n'


class Cloud:
    """The stand-ins on PATH, and a clone whose scripts are run."""

    def __init__(self, folder, clone):
        self.folder, self.clone = folder, clone
        for path, text in {
            "bin/gcloud": GCLOUD,
            "bin/kubectl": KUBECTL,
            "bin/sleep": SLEEP,
            "host/sleep": SLEEP,
            "host/python3": PYTHON,
            "lmm": LMM,
        }.items():
            self.write(path, text).chmod(0o755)
        self.write("plan", "ACTIVE\n")
        self.write("plot", "hang\n")
        self.environment = {
            "PATH": f"{self.folder}/bin:{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "CLOUD": str(self.folder),
            "NAME": "m3",
            "ZONE": "us-west4-a",
            "TOPOLOGY": "v5e-16",
            "IMAGE": "europe-docker.pkg.dev/p/r/lmm:1",
            "POLL": "7",
            "BACKOFF": "10",
        }

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def start(self, script, *words, **changes):
        environment = {k: v for k, v in {**self.environment, **changes}.items() if v is not None}
        command = [self.clone / "launch" / script, *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True
        )

    def run(self, script, *words, code=0, **changes):
        process = self.start(script, *words, **changes)
        out, error = process.communicate(timeout=60)
        assert process.returncode == code, out + error
        return out if code == 0 else out + error

    def calls(self):
        """The verbs that were called, in order, each with all its words."""
        words = [shlex.split(line) for line in self.lines("calls")]
        return [(w[3] if w[:2] == ["compute", "tpus"] else w[0], w) for w in words]

    def count(self, verb):
        return sum(found == verb for found, _ in self.calls())

    def wait_for(self, name):
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.02)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "setup.py", folder)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def cloud(tmp_path, clone):
    cloud = Cloud(tmp_path, clone)
    yield cloud
    for path in cloud.folder.glob("worker-*/lmm_run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "pip install -e '.[test]'"
    scripts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.sh"))
    found = subprocess.run([tool, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_slices_are_those_of_the_compiler():
    names = [f"{kind}-{chips}" for kind, chip in slices.CHIPS.items() for chips in chip.grids]
    script = '. launch/common.sh; for n; do find_slice "$n"; echo "$n $accelerator $grid $((hosts * 4))"; done'
    out = subprocess.run(["bash", "-euc", script, "-", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = []
    for name in names:
        found = slices.find_slice(name)
        expected.append(f"{name} {found.accelerator} {found.grid.split(':')[1]} {name.split('-')[1]}")
    assert out.stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("topology", "changes", "flags"),
    [
        ("v5e-16", {}, "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=m3"),
        (
            "v6e-64",
            {"SPOT": "1", "PROJECT": "p1"},
            "--project=p1 --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --spot --node-id=m3",
        ),
        (
            "v5p-64",
            {"SLICES": "2"},
            "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --reserved --node-count=2 --node-prefix=m3",
        ),
    ],
)
def test_create_asks_for_the_slice(cloud, topology, changes, flags):
    extra = ["--reserved"] if "--reserved" in flags else []
    cloud.write("plan", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    cloud.run("tpu_vm.sh", "create", *extra, TOPOLOGY=topology, SLOW="0.05", **changes)
    (words,) = [words for verb, words in cloud.calls() if verb == "create"]
    assert words[3:] == ["create", "m3", "--zone=us-west4-a", *flags.split()]
    assert cloud.lines("sleeps") == ["7", "7"]  # until it was there
    cloud.run("tpu_vm.sh", "create", *extra, TOPOLOGY=topology, **changes)
    assert cloud.count("create") == 1


def test_create_ends_when_the_request_failed_or_waits_for_too_long(cloud):
    cloud.write("plan", "PROVISIONING\nFAILED\n")
    assert "m3 is FAILED; delete it" in cloud.run("tpu_vm.sh", "create", code=1)
    cloud.run("tpu_vm.sh", "delete")
    cloud.write("plan", "WAITING_FOR_RESOURCES\n")
    assert "stays in the queue" in cloud.run("tpu_vm.sh", "create", code=1, WAIT="0")


def test_the_life_of_a_run(cloud):
    key = "k3y with 'quotes' and $signs"
    cloud.run("tpu_vm.sh", "create", SLICES="2")
    assert cloud.run("tpu_vm.sh", "status", code=127)  # nothing is installed yet
    cloud.run("tpu_vm.sh", "setup", EXTRAS="tpu,wandb")
    assert "-m pip install --quiet --disable-pip-version-check -e .[tpu,wandb]" in cloud.lines("worker-1/python")
    assert "idle" in cloud.run("tpu_vm.sh", "status")

    cloud.run("tpu_vm.sh", "run", *TRAIN, WANDB_API_KEY=key)
    cloud.wait_for("attempts-1")
    answer = cloud.run("tpu_vm.sh", "status").splitlines()
    assert answer[0] == "state ACTIVE" and sum(line.endswith(": running") for line in answer) == 2
    assert "already runs" in cloud.run("tpu_vm.sh", "run", *TRAIN, code=1)
    log = cloud.run("tpu_vm.sh", "logs", "1", "50")
    assert f"attempt 1 in lmm_jax with key {key}, secret " in log
    told = [line for i in (0, 1) for line in cloud.lines(f"worker-{i}/lmm_run/log") if line.startswith("attempt")]
    (secret,) = {line.rpartition(" ")[2] for line in told}  # the same for all workers
    assert re.fullmatch("[0-9a-f]{64}:", secret)
    assert "".join(f"<{word}>" for word in TRAIN[1:]) in log
    assert not any("k3y" in line or secret[:-1] in line for line in cloud.lines("calls"))
    assert not list(cloud.folder.glob("worker-*/.lmm_env"))

    answer = cloud.run("tpu_vm.sh", "stop")
    assert answer.count(": exited 75") == 2  # preempted after a save: the same command goes on
    cloud.run("tpu_vm.sh", "run", *TRAIN, LMM_HOSTS_SECRET="of the user's own choice")
    deadline = time.monotonic() + 20
    while not any("secret of the user's own choice:" in line for line in cloud.lines("worker-1/lmm_run/log")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    cloud.run("tpu_vm.sh", "delete")
    assert cloud.run("tpu_vm.sh", "status") == "state ABSENT\n"
    cloud.run("tpu_vm.sh", "delete")
    verbs = [verb for verb, _ in cloud.calls() if verb != "describe"]
    assert verbs == [
        "create",
        "ssh",
        "scp",
        "ssh",
        "ssh",
        "scp",
        "ssh",
        "ssh",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "scp",
        "ssh",
        "delete",
    ]
    for verb, words in cloud.calls():
        if verb in ("ssh", "scp"):
            everyone = {"--worker=all", "--node=all"} <= set(words)
            assert everyone or {"--worker=1", "--node=0"} <= set(words)


def test_setup_waits_for_new_hosts_and_gives_up(cloud):
    cloud.run("tpu_vm.sh", "create")
    cloud.write("fail-scp", "4\n")
    cloud.run("tpu_vm.sh", "setup")
    assert cloud.count("scp") == 5 and cloud.lines("sleeps") == ["7"] * 4
    cloud.write("fail-scp", "5\n")
    assert "could be reached" in cloud.run("tpu_vm.sh", "setup", code=1)
    assert cloud.count("scp") == 10


def test_setup_replaces_the_clone_and_keeps_its_environment(cloud):
    cloud.write("old_python", "")
    cloud.run("tpu_vm.sh", "create")
    cloud.run("tpu_vm.sh", "setup")
    asked = cloud.lines("worker-0/python")
    assert "-m uv venv --quiet --seed --python 3.12 .venv" in asked and "-m venv .venv" not in asked
    stale = cloud.write("worker-0/lmm_jax/launch/stale.sh", "")
    cloud.run("tpu_vm.sh", "setup")
    assert not stale.exists() and (stale.parent / "worker.sh").exists()
    assert sum("uv venv" in line for line in cloud.lines("worker-0/python")) == 1


def test_a_worker_tells_killed_from_ended_and_kills_what_does_not_stop(cloud):
    cloud.write("plot", "trap '' TERM; while :; do /bin/sleep 0.05; done\n")
    for verb in (["create"], ["setup"], ["run", *TRAIN]):
        cloud.run("tpu_vm.sh", *verb)
    cloud.wait_for("attempts-1")
    os.killpg(int(cloud.lines("worker-0/lmm_run/pid")[0]), signal.SIGKILL)
    words = [
        line.split(": ")[1] for line in cloud.run("tpu_vm.sh", "status").splitlines() if line.startswith("worker ")
    ]
    assert words == ["lost", "running"]
    assert cloud.run("tpu_vm.sh", "stop", GRACE="0").count("exited 137") == 1


@pytest.mark.parametrize(
    ("verb", "changes", "words"),
    [
        ("create", {"NAME": "M3"}, "NAME=M3: small letters"),
        ("create", {"NAME": "m3; rm"}, "small letters"),
        ("status", {"NAME": None}, "NAME: name of the queued resource"),
        ("stop", {"ZONE": None}, "ZONE: zone of Google Cloud"),
        ("create", {"ZONE": "us-west4"}, "ZONE=us-west4: not a zone"),
        ("create", {"TOPOLOGY": None}, "TOPOLOGY: slice by its number of chips"),
        ("create", {"TOPOLOGY": "v5e-17"}, "TOPOLOGY=v5e-17: no such slice; chips can be 4 8 16"),
        ("create", {"TOPOLOGY": "v4-8"}, "no such kind; choose v5e"),
        ("create", {"TOPOLOGY": "tpu7x-64"}, "through GKE only"),
        ("create", {"SLICES": "0"}, "SLICES=0"),
        ("setup", {"EXTRAS": "tpu; ls"}, "EXTRAS=tpu; ls"),
        ("run", {}, "run which command?"),
        ("destroy", {}, "no verb 'destroy'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_called(cloud, verb, changes, words):
    assert words in cloud.run("tpu_vm.sh", verb, code=2, **changes)
    assert not cloud.calls()


def test_dry_runs_print_what_would_run(cloud):
    verbs = {v: TRAIN if v == "run" else () for v in ("create", "setup", "run", "status", "logs", "stop", "delete")}
    printed = {}
    for verb, words in verbs.items():
        out = cloud.run("tpu_vm.sh", "--dry-run", verb, *words, PATH="/usr/bin:/bin")  # no gcloud there
        printed[verb] = [w[1:] for w in map(shlex.split, out.splitlines()) if w[0] == "gcloud"]
    assert not cloud.calls()

    def acts(calls):  # without looking
        return without_temporary(words for words in calls if words[3] != "describe")

    for verb, words in verbs.items():
        cloud.write("calls", "")
        cloud.run("tpu_vm.sh", verb, *words)
        assert acts(printed[verb]) == acts(w for _, w in cloud.calls())
        assert acts(printed[verb])


def test_a_command_that_ends_while_it_is_looked_at_is_not_lost(cloud):
    for verb in (["create"], ["setup"], ["run", *TRAIN]):
        cloud.run("tpu_vm.sh", *verb)
    cloud.wait_for("attempts-1")
    cloud.write("host/grep", '#!/bin/sh\necho 0 > "$HOME/lmm_run/code"\nexit 1\n').chmod(0o755)  # asks if it is alive
    assert cloud.run("tpu_vm.sh", "status").count("exited 0") == 2


def babysit(cloud, *plot, code=0, **changes):
    cloud.write("plot", "".join(f"{line}\n" for line in plot))
    return cloud.run("babysit.sh", *TRAIN, code=code, **changes)


def attempts(cloud):
    return int((cloud.lines("attempts-0") or ["0"])[0])


def test_babysit_rents_again_after_preemptions_and_resumes_until_done(cloud):
    cloud.write("plan", "WAITING_FOR_RESOURCES\nACTIVE\n")
    babysit(cloud, "save 100; preempt; hang", "save 200; exit 75", "save 300; exit 0", FAILURES="1", SPOT="1")
    assert attempts(cloud) == 3
    assert cloud.count("create") == 2  # the second ended with 75 on slices that stayed
    assert cloud.count("delete") == 2 and not (cloud.folder / "state").exists()
    assert "attempt 3" in (cloud.clone / "runs" / "m3.log").read_text()


def test_babysit_goes_on_while_there_are_new_checkpoints(cloud):
    babysit(cloud, "exit 1", "save 100; exit 1", "exit 1", "save 200; kill -9 $PPID", "exit 0", FAILURES="2")
    assert attempts(cloud) == 5 and cloud.count("create") == 1


def test_babysit_stops_at_once_when_the_command_is_refused(cloud):
    assert "code 2" in babysit(cloud, "exit 2", code=2, KEEP="1")
    assert attempts(cloud) == 1 and cloud.count("delete") == 0


def test_babysit_backs_off_and_gives_up_without_progress(cloud):
    cloud.write("steps", "100\n")
    assert "gave up" in babysit(cloud, "exit 1", code=1, FAILURES="3", BACKOFF="1900")
    assert attempts(cloud) == 3
    assert [s for s in cloud.lines("sleeps") if int(s) > 7] == ["1900", "3600"]
    assert not (cloud.folder / "state").exists()  # idle slices cost as much as busy ones


@pytest.mark.parametrize("plan", ["FAILED\n", "ACTIVE\nSUSPENDED\n"])
def test_babysit_does_not_rent_for_ever(cloud, plan):
    cloud.write("plan", plan)
    babysit(cloud, "exit 0", code=1, FAILURES="2")
    assert cloud.count("create") == 2 and attempts(cloud) == 0


def test_babysit_stops_what_hangs(cloud):
    babysit(cloud, "hang", code=1, FAILURES="2", STALL="0")
    assert attempts(cloud) == 2 and cloud.count("create") == 1


def test_babysit_gives_up_when_the_cloud_does_not_answer(cloud):
    cloud.write("fail-describe", "1000\n")
    babysit(cloud, "exit 0", code=1, FAILURES="2")
    assert cloud.count("create") == attempts(cloud) == 0
    assert cloud.lines("sleeps") == ["10"]


def test_babysit_bears_with_slow_and_missing_answers(cloud):
    out = babysit(cloud, 'echo 2 > "$CLOUD/fail-ssh"; save 100; /bin/sleep 0.5; exit 0', FAILURES="1", SLOW="0.05")
    assert attempts(cloud) == 1 and cloud.count("create") == 1, out


def test_babysit_started_again_watches_what_runs(cloud):
    cloud.write("plot", 'until [ -e "$CLOUD/go" ]; do /bin/sleep 0.05; done; exit 0\n')
    for verb in (["create"], ["setup"], ["run", *TRAIN]):
        cloud.run("tpu_vm.sh", *verb)
    cloud.wait_for("attempts-1")
    process = cloud.start("babysit.sh", *TRAIN)
    cloud.wait_for("sleeps")
    cloud.write("go", "")
    assert process.communicate(timeout=60) and process.returncode == 0
    assert attempts(cloud) == 1 and cloud.count("create") == 1


def test_babysit_checks_and_dry_runs(cloud):
    assert "no --workdir gs://" in cloud.run("babysit.sh", *TRAIN[:-1], "/local", code=2)
    assert "FAILURES=many" in cloud.run("babysit.sh", *TRAIN, code=2, FAILURES="many")
    assert "ZONE: zone" in cloud.run("babysit.sh", *TRAIN, code=2, ZONE=None)
    out = cloud.run("babysit.sh", "--dry-run", *TRAIN, PATH="/usr/bin:/bin")
    words = [shlex.split(line) for line in out.splitlines()]
    assert [w[4] for w in words if w[:2] == ["gcloud", "compute"] and w[4] not in ("describe", "scp")] == [
        *("create", "ssh", "ssh", "ssh", "ssh", "ssh", "delete")
    ]
    assert ["gcloud", "storage", "ls", "gs://bucket/run/checkpoints/"] in words
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("topology", "count", "label", "grid", "hosts"),
    [
        ("v5e-16", "1", "tpu-v5-lite-podslice", "4x4", 4),
        ("v6e-256", "2", "tpu-v6e-slice", "16x16", 64),
        ("v5p-64", "4", "tpu-v5p-slice", "4x4x4", 16),
        ("tpu7x-128", "1", "tpu7x", "4x4x8", 32),
    ],
)
def test_jobsets_have_the_slices_and_restart_what_can_continue(cloud, topology, count, label, grid, hosts):
    command = [*TRAIN, "--config.note=$(HOME) ${HOME} \"x: #y\" \\ 'z'"]
    spot = {"SPOT": "1"} if count == "2" else {}
    cloud.run("gke.sh", "apply", *command, TOPOLOGY=topology, SLICES=count, WANDB_API_KEY="k3y", **spot)
    jobset = yaml.safe_load((cloud.folder / "jobset.yaml").read_text())
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "m3")
    (part,) = jobset["spec"]["replicatedJobs"]
    job, pod = part["template"]["spec"], part["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert part["replicas"] == int(count)
    assert job["parallelism"] == job["completions"] == hosts
    selector = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": grid}
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    assert pod["nodeSelector"] == selector
    assert [word.replace("$$(", "$(") for word in container["command"]] == command
    assert "$$(HOME)" in container["command"][-1]  # Kubernetes' way to say $(HOME)
    assert container["image"] == cloud.environment["IMAGE"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4

    # Code 2 alone fails its job by policy, which ends the JobSet; any other end restarts it.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    policy = jobset["spec"]["failurePolicy"]
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert policy["maxRestarts"] == 50

    assert container["envFrom"] == [{"secretRef": {"name": "m3-env"}}]
    of_hosts, *given = cloud.lines("secret")
    assert re.fullmatch("LMM_HOSTS_SECRET=[0-9a-f]{64}", of_hosts) and given == ["WANDB_API_KEY=k3y"]
    told = [*cloud.lines("calls"), *cloud.lines("jobset.yaml")]
    assert not any("k3y" in line or of_hosts.partition("=")[2] in line for line in told)


def without_temporary(calls):
    """Calls without the names of files that each run has of its own."""
    return [[word for word in words if "/tmp" not in word] for words in calls]


def test_gke_checks_and_dry_runs(cloud):
    for words, changes in [
        ("IMAGE: container image", {"IMAGE": None}),
        ("IMAGE=a b: not the name", {"IMAGE": "a b"}),
        ("TOPOLOGY=v5p-65: no such slice", {"TOPOLOGY": "v5p-65"}),
        ("RESTARTS=x: not a number", {"RESTARTS": "x"}),
        ("NAME=m_3: small letters", {"NAME": "m_3"}),
    ]:
        assert words in cloud.run("gke.sh", "apply", *TRAIN, code=2, **changes)
    path = f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin"
    printed = {v: cloud.run("gke.sh", v, "--dry-run", *TRAIN, PATH=path) for v in ("apply", "status", "delete")}
    printed["logs"] = cloud.run("gke.sh", "--dry-run", "logs", "3", SLICE="1", PATH=path)
    assert not cloud.calls()
    jobset = printed["apply"][printed["apply"].index("apiVersion") :]
    assert yaml.safe_load(jobset)["spec"]["replicatedJobs"][0]["replicas"] == 1
    for verb, text in printed.items():
        cloud.write("calls", "")
        words = {"apply": TRAIN, "logs": ["3"]}.get(verb, ())
        cloud.run("gke.sh", verb, *words, SLICE="1" if verb == "logs" else "0")
        commands = [line for line in text.splitlines() if line.startswith("kubectl ")]
        assert without_temporary(shlex.split(c)[1:] for c in commands) == without_temporary(
            w for _, w in cloud.calls()
        )
    assert "LMM_HOSTS_SECRET" not in printed["apply"]
    cloud.write("calls", "")
    cloud.write("no_jobset", "")
    assert "has no JobSet controller" in cloud.run("gke.sh", "apply", *TRAIN, code=1)
    assert len(cloud.calls()) == 1


def test_the_image_has_what_it_copies_and_does_not_run_as_root():
    lines = [line.split() for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    verbs = [line[0] for line in lines]
    for line in lines:
        if line[0] == "COPY":
            assert all((ROOT / source).exists() for source in line[1:-1]), line
        if line[0] == "FROM":
            assert "/" not in line[1]  # a plain name, from whatever registry docker is set to
    assert verbs.index("RUN") < verbs.index("USER") and lines[verbs.index("USER")][1] != "root"
    assert any(line[:2] == ["ARG", "EXTRAS=tpu,gcs"] for line in lines)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "babysit.sh", "gke.sh", "worker.sh"])
def test_help_is_the_head_of_the_script(cloud, script):
    out = cloud.run(script, "--help", NAME=None, ZONE=None, TOPOLOGY=None)
    assert out.startswith(f"launch/{script}") and len(out.splitlines()) >= 6
    assert "shellcheck" not in out and "set -euo" not in out
