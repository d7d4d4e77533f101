"""One writer a folder: a second one is refused, one that has ended without a word is taken over from."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from lmm_jax import errors, lock


@pytest.fixture
def quick(monkeypatch):
    """Beats and patience of a test's length."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.6)
    monkeypatch.setattr(lock, "LOOK", 0.05)


def leave_mark(folder, **changes):
    """The mark of a holder that is not this process."""
    folder.mkdir(exist_ok=True)
    mark = lock._mark("lmm train") | {"token": "another", **changes}
    (folder / lock.NAME).write_text(json.dumps(mark))
    return mark


def test_a_second_writer_is_told_who_holds_the_folder_since_when_and_changes_nothing(tmp_path, quick):
    folder = tmp_path / "run"
    with lock.hold(folder, "lmm train"):
        before = {path.name for path in folder.iterdir()}
        words = rf"`lmm train`, process {os.getpid()} on .*, since 20\d\d-"
        with pytest.raises(lock.Held, match=words) as raised, lock.hold(folder, "lmm train"):
            raise AssertionError
        assert errors.may_pass(raised.value)  # a command that waits and tries again will do
        assert {path.name for path in folder.iterdir()} == before == {lock.NAME}
    assert not folder.exists()  # it was made for the mark alone


def test_the_mark_goes_and_what_was_written_stays(tmp_path, quick):
    with lock.hold(tmp_path / "run", "lmm train"):
        (tmp_path / "run" / "file").write_text("x")
        time.sleep(0.2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_killed_process_of_this_machine_is_taken_over_from_at_once(tmp_path, capsys):
    code = (
        "import sys, time\nfrom lmm_jax import lock\n"
        "with lock.hold(sys.argv[1], 'lmm prepare'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    words = f"`lmm prepare`, process {process.pid} "
    with pytest.raises(lock.Held, match=words), lock.hold(tmp_path, "lmm train"):
        raise AssertionError
    process.kill()  # and not waited for: what is left of it is no process any more
    begin = time.monotonic()
    while lock._started(process.pid):
        time.sleep(0.01)
    with lock.hold(tmp_path, "lmm train"):
        assert "`lmm prepare`, process" in capsys.readouterr().out
    assert time.monotonic() - begin < lock.PATIENCE / 2
    process.wait()
    process.stdout.close()


def test_a_number_that_another_process_has_now_is_not_its_holder(tmp_path, quick):
    leave_mark(tmp_path, process=os.getpid(), started="1")
    with lock.hold(tmp_path, "lmm train", note=lambda _: None):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"what": 3}'])
def test_a_mark_that_cannot_be_read_is_waited_for_and_then_taken_over(tmp_path, quick, content):
    (tmp_path / lock.NAME).write_text(content)
    notes = []
    with lock.hold(tmp_path, "lmm train", notes.append):
        pass
    assert "left no name may still write there" in notes[0] and "taking over" in notes[-1]


def test_another_machine_is_refused_at_its_next_beat_and_replaced_when_there_is_none(tmp_path, quick):
    mark = leave_mark(tmp_path, host="elsewhere")
    notes = []
    beats = threading.Timer(0.2, lambda: (tmp_path / lock.NAME).write_text(json.dumps(mark | {"beat": 1})))
    beats.start()
    with pytest.raises(lock.Held, match="on elsewhere, since"), lock.hold(tmp_path, "lmm train", notes.append):
        raise AssertionError
    beats.join()
    with lock.hold(tmp_path, "lmm train", notes.append):
        assert "elsewhere" in notes[-1] and "taking over" in notes[-1]


def test_who_was_taken_over_from_learns_it_and_leaves_the_other_s_mark(tmp_path, quick):
    with lock.hold(tmp_path, "lmm train") as held:
        held.check()
        leave_mark(tmp_path, host="elsewhere")
        time.sleep(0.2)
        with pytest.raises(lock.Held, match="taken over by `lmm train`, process .* on elsewhere"):
            held.check()
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "elsewhere"


def test_a_bucket_has_one_writer_too(bucket, quick):
    folder = bucket / "locked"
    with lock.hold(folder, "lmm train"):
        time.sleep(0.2)
        with pytest.raises(lock.Held, match=f"process {os.getpid()} "), lock.hold(folder, "lmm train"):
            raise AssertionError
    assert not (folder / lock.NAME).exists()
    with lock.hold(folder, "lmm train"):
        pass
