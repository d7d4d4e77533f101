"""Eight simulated devices, tiny digits, steps that are compiled once, and a limit of time for the whole run."""

import atexit
import collections
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from etils import epath

ROOT = pathlib.Path(__file__).parent.parent

# Tests spend their time compiling small programs, which run fast enough unoptimised.
flags = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # the emitters that 0.11 always takes need half as long again to compile
    flags.append("--xla_cpu_use_fusion_emitters=false")
    flags.append("--xla_cpu_parallel_codegen_split_count=1")  # parts for other threads, which other tests have, cost
if "PYTEST_XDIST_WORKER" not in os.environ:  # what commands keep on disk is that of these tests alone
    os.environ["LMM_CACHE"] = tempfile.mkdtemp(prefix="lmm_tests_")
    atexit.register(shutil.rmtree, os.environ["LMM_CACHE"], ignore_errors=True)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
# Compiled programs are shared between tests, processes and runs.
COMPILED = ROOT / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Minutes of wall clock that the default tests should take at most by several processes (`-n 2`, as launch/test.sh and
# CI run them) on two quiet cores. A run says when it is over; it fails at twice as many, as a slow day doubles it.
LIMIT = 12

# Overrides that shrink configs/digits.py and the compositions for tests: the encoder of each, and the rest.
VIT = ("model.vision.width=16", "model.vision.heads=2", "model.vision.mlp_dim=32")
ENCODERS = {
    "digits": (*VIT, "model.vision.depth=1"),
    "qwen3vl_style": (
        *VIT,
        "model.vision.depth=3",
        "model.vision.stack_levels=(1,2)",
        "model.decoder.inject_layers=(1,2)",
    ),
    "hybrid": ("model.vision.depths=(1,1)", "model.vision.widths=(8,16)"),
}
TINY = (
    "model.decoder.width=32",
    "model.decoder.heads=4",
    "model.decoder.kv_heads=2",
    "model.decoder.mlp_dim=64",
    "train.batch_size=8",
    "train.eval_every=0",
    "train.steps=40",
    "optimizer.warmup=0.2",
)


def pytest_addoption(parser):
    parser.addoption("--golden", type=pathlib.Path, default=ROOT / "tests/golden", help="folder of golden numbers")
    parser.addoption("--long", action="store_true", help="also run the tests that are marked long")
    parser.addoption("--faults", action="store_true", help="all trials of tests/faults, not a few")
    parser.addoption("--trial", type=int, help="only this trial of each test of tests/faults")
    parser.addoption("--notebooks", action="store_true", help="also run the notebooks, up to 5 minutes each")
    parser.addoption(
        "--demo", action="store_true", help="also run the page in a browser: gradio, playwright, Chromium"
    )
    parser.addoption("--eval", action="store_true", help="also let lmms-eval ask a model: the extra eval is needed")


# Files that take longest, first of all: one that is begun late has no other beside it in the end.
LONGEST = (
    "training/test_hosts.py",
    "faults/test_damage.py",
    "test_doors.py",
    "parity/test_next.py",
    "parity/test_m3.py",
    "release/test_verify.py",
    "training/test_loop.py",
    "faults/test_kill.py",
    "faults/test_signals.py",
    "training/test_step.py",
    "models/test_compositions.py",
    "parity/test_deepstack.py",
    "release/test_export.py",
    "models/test_router.py",
    "generation/test_engine.py",
    "parity/test_convllava.py",
    "aot/test_compile.py",
    "training/test_checkpoint.py",
    "test_cli.py",
    "training/test_context.py",
    "pods/test_hosts.py",
    "release/test_card.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # by the number of tests in a file, which says nothing of their time


def pytest_collection_modifyitems(config, items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {str(ROOT / "tests" / name): place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(str(item.path), len(order)))
    if not config.getoption("--long"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    if not config.getoption("--notebooks"):
        items[:] = [item for item in items if item.path.name != "test_notebooks.py"]
    if not config.getoption("--demo"):
        items[:] = [item for item in items if item.path != ROOT / "tests/demo/test_page.py"]
    if not config.getoption("--eval"):
        items[:] = [item for item in items if item.path != ROOT / "tests/integrations/test_lmms_eval.py"]


BEGIN = time.monotonic()
SPENT = collections.Counter()  # seconds of tests by folder


def pytest_runtest_logreport(report):
    path = pathlib.Path(report.nodeid.split("::")[0])
    SPENT[str(path.parent.relative_to("tests"))] += report.duration


def pytest_terminal_summary(terminalreporter, config):
    folders = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in SPENT.most_common() if seconds >= 1)
    terminalreporter.write_line(f"tests of each folder, longest first: {folders or 'less than a second'}")
    minutes = (time.monotonic() - BEGIN) / 60
    limit = f" of {LIMIT}, and at most {2 * LIMIT}" if _limited(config) else ""
    slow = ": longer than it should take; see `--durations=50`" if _limited(config) and minutes > LIMIT else ""
    over = ": TOO LONG, so the run fails; see `--durations=50`" if _over(config) else slow
    terminalreporter.write_line(f"{minutes:.1f} minutes{limit}{over}")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and _over(session.config):
        session.exitstatus = 1


def _limited(config):
    """Whether this is the main process of a run that has a limit."""
    more = any(map(config.getoption, ("--long", "--notebooks", "--demo", "--eval")))
    return not more and bool(config.getoption("numprocesses", None))


def _over(config):
    return _limited(config) and time.monotonic() - BEGIN > 2 * LIMIT * 60


@pytest.fixture(autouse=True)
def signals_as_before():
    """A test that leaves a signal ignored would leave it so for all later tests, and for every process they start."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    left = {number.name: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == {number.name: handler for number, handler in before.items()}


@pytest.fixture(scope="session")
def golden(pytestconfig):
    """Folder of the golden numbers: deepstack, convllava, m3 and metrics lie in it."""
    return pytestconfig.getoption("--golden")


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """A prepared folder of 64 training, 32 validation and 16 test mosaics."""
    return _prepared("digits", tmp_path_factory, {"train": 64, "validation": 32, "test": 16})


@pytest.fixture(scope="session")
def pages_folder(tmp_path_factory):
    """A prepared folder of 32 training, 16 validation and 16 test pages."""
    return _prepared("pages", tmp_path_factory, {"train": 32, "validation": 16, "test": 16})


def _prepared(name, tmp_path_factory, rows):
    from lmm_jax.data.prepare import folder as prepare

    folder = tmp_path_factory.mktemp(name) / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.DATASETS[name], "ROWS", rows)
        prepare.prepare_dataset(name, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(digits_folder):
    """`tiny(*overrides, recipe="m3")`: a recipe of the digits config, or another config of ENCODERS, at test size."""
    import lmm_jax as lmm

    def make(*overrides, recipe="m3"):
        name, arg = (recipe, "") if recipe in ENCODERS else ("digits", f"recipe={recipe},")
        file = f"{ROOT}/configs/{name}.py:{arg}data={digits_folder}"
        return lmm.load_config(file, *ENCODERS[name], *TINY, *overrides)

    return make


@pytest.fixture(scope="session")
def setup(tiny):
    """`setup(devices, *overrides, recipe)`: program, a jitted step that keeps its state argument, host batches."""
    from lmm_jax import sharding
    from lmm_jax.training.state import make_program
    from lmm_jax.training.step import train_step
    from tests.opened import open_packs

    @functools.cache
    def make(devices, *overrides, recipe="m3"):
        config = tiny(*overrides, recipe=recipe)
        program = make_program(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
        step = jax.jit(
            functools.partial(train_step, program.model, program.tx, program.rates),
            out_shardings=(program.shardings, None),
        )
        return Setup(program, step, open_packs(config, "train", config.train.batch_size, shuffle=True))

    return make


class Setup:
    """A compiled step with its data."""

    def __init__(self, program, step=None, packs=None):
        self.program, self.step, self.packs = program, step, packs

    @functools.cached_property
    def state(self):
        """The first state, of the values that one device draws; training/test_state.py holds that all draw the same.

        To draw them is a program for each mesh, which takes as long to compile as a step; this one most tests share.
        Ask for it outside of `program.use()`.
        """
        from lmm_jax import sharding
        from lmm_jax.training.state import init_state, make_program

        if self.program.mesh.size == 1:
            return init_state(self.program)
        alone = make_program(self.program.config, sharding.make_mesh({}, jax.devices()[:1]))
        return jax.device_put(init_state(alone), self.program.shardings)

    def host_batch(self, number):
        """Global batch `number` as numpy, `[packs, …]`, what goes to the devices."""
        from lmm_jax.data.pipeline import HOST_ONLY

        per_step = self.packs.per_step
        packs = [self.packs[p] for p in range(number * per_step, (number + 1) * per_step)]
        return {name: np.stack([p[name] for p in packs]) for name in packs[0] if name not in HOST_ONLY}

    def place(self, batch):
        """A host batch as global arrays `[micro-batches, packs, …]`."""
        from lmm_jax import sharding

        train = self.program.config.train
        shape = (train.micro_batches, train.batch_size // train.micro_batches)
        rules = self.program.config.rules
        local = sharding.local_packs(self.program.mesh, rules, shape)
        return sharding.to_global(batch, local, self.program.mesh, rules, shape)

    def run(self, state, batch):
        """One step on a host batch: `(state, metrics)`."""
        with self.program.use():
            return self.step(state, self.place(batch))


@pytest.fixture(scope="session")
def lmm_process():
    """`lmm_process(*args)`: starts `python -m lmm_jax …` on one device, in a process group of its own."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def start(*args):
        command = [sys.executable, "-m", "lmm_jax", *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)

    return start


@pytest.fixture(scope="session")
def tiny_args(digits_folder):
    """Arguments of `lmm train` for the tiny digits config."""
    small = (*ENCODERS["digits"], *TINY)
    return ["--config", f"{ROOT}/configs/digits.py:data={digits_folder}", *(f"--config.{o}" for o in small)]


@pytest.fixture(scope="session")
def transformers(tmp_path_factory):
    """transformers, offline, with a folder of ours for the code that it copies and runs.

    It is one folder for all tests of a process. transformers keeps the modules that it has run from there, and runs
    them anew, into the same module, once it finds them in another place: their classes are then no longer those that
    it has registered and that earlier models are made of.
    """
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'lmm_jax[hf]'")
    import torch
    import transformers
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of many that wait for one another
        yield transformers
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """An empty bucket, which gcsfs, TensorStore and Google's library take for the real one."""
    from gcp_storage_emulator.server import create_server

    from lmm_jax import storage
    from tests.ports import free_port

    port = free_port()
    address = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks a service that the emulator has not
        patch.setenv(storage.CACHE, str(tmp_path_factory.mktemp("cache")))
        with create_server("localhost", port, in_memory=True, default_bucket="bucket"):
            yield epath.Path("gs://bucket")
