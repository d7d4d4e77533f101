"""What tests of faults share: trials, cheap processes, and a small run to damage."""

import pytest

from tests.faults import table
from tests.faults import trials as trials_lib
from tests.faults.processes import Server
from tests.faults.restarts import Restarts, SmallRun
from tests.faults.runs import Run
from tests.faults.trials import Trials


def pytest_itemcollected(item):
    """So that `-k row_03` chooses the tests of a row."""
    if mark := item.get_closest_marker("row"):
        item.extra_keyword_matches.add(f"row_{mark.kwargs['number']:02}")


def pytest_collection_modifyitems(config, items):
    """Leaves out by default what has no trials then, as it would take too long."""
    if not config.getoption("--faults") and config.getoption("--trial") is None:
        marks = {item: item.get_closest_marker("row") for item in items}
        items[:] = [item for item in items if not marks[item] or marks[item].kwargs["few"]]


def pytest_collection_finish(session):
    """Writes down what a run with `--faults` is to do, which its table tells beside what it did."""
    if session.config.getoption("--faults"):
        for item in session.items:
            if mark := item.get_closest_marker("row"):
                about = {"row": mark.kwargs["number"], "test": item.nodeid}
                about |= {name: mark.kwargs[name] for name in ("full", "cases")}
                trials_lib.write(**about, digest=trials_lib.digest(item.nodeid.split("::")[0]))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--faults"):
        terminalreporter.write_line(table.table())


@pytest.fixture
def trials(request):
    """The `Trials` of the row that a test proves."""
    about, config = request.node.get_closest_marker("row").kwargs, request.config
    full, one = config.getoption("--faults"), config.getoption("--trial")
    numbers = range(about["full" if full else "few"]) if one is None else range(one, one + 1)
    return Trials(about["number"], request.node.nodeid, numbers, full)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts commands that need not wait for their imports, see `processes.Server`; one device each."""
    with Server(tmp_path_factory.mktemp("server"), devices=1) as server:
        yield server


@pytest.fixture(scope="session")
def small_run(server, tiny_args, tiny, tmp_path_factory):
    """A run of 6 steps of a process of its own, that kept steps 2, 4 and 6."""
    few = ("train.steps=6", "train.save_every=2", "train.keep=3", "train.log_every=1", "mesh.data=1")
    folder = tmp_path_factory.mktemp("small_run")
    command = ("train", *tiny_args, *(f"--config.{o}" for o in few), "--workdir", folder / "run")
    with Run(server, folder / "notes", command) as run:
        assert run.process.wait() == 0, run.process.said()
    return SmallRun(folder / "run", Restarts(tiny(*few[1:], "train.steps=100")), run.noted())
