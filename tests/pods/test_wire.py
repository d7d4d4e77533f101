"""What strangers on the network can do to the hosts of a run: nothing. Real wires, in this process, over loopback."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import secrets
import socket
import struct
import sys
import threading
import time

import pytest

from lmm_jax.pods import line, wire
from lmm_jax.pods.place import Place, with_port
from tests.ports import free_port

SECRET = b"what only the hosts of this test know"
WAIT = 30.0  # seconds in which what has to come comes, on a busy machine


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """Codes that wires ended their processes with, where only they end here; and shorter times."""
    codes, wires = [], []

    def end(code):
        for one in wires:
            if one._loop is asyncio.get_running_loop():  # and not what is left of an earlier test
                codes.append(code)
                stop(one)

    monkeypatch.setattr(wire, "end", end)
    monkeypatch.setattr(sys, "argv", ["lmm", "train", "--workdir", "gs://what-nobody-is-told"])
    for name, seconds in {"BEAT": 0.1, "RETRY": 0.05, "FAREWELL": 0.05, "PROOF": 5.0}.items():
        monkeypatch.setattr(wire, name, seconds)
    make = wire.Wire.__init__
    monkeypatch.setattr(wire.Wire, "__init__", lambda one, *args: wires.append(one) or make(one, *args))
    yield codes
    for one in wires:
        one._loop.call_soon_threadsafe(stop, one)


def stop(one):
    """Ends the thread of a wire, which calls this."""
    for server in one._servers:
        server.close()
    for other in one._lines.values():
        other.writer.transport.abort()
    for task in (*one._tasks, *one._asking):
        task.cancel()
    one._left = True
    one._loop.call_later(0.05, one._loop.stop)


class Pod:
    """Host 0 of some hosts, with others as far as they have come."""

    def __init__(self, count=2, secret=SECRET):
        self.port = free_port()
        self.count, self.wires = count, {}
        self.come(0, secret)

    def come(self, number, secret=SECRET):
        place = Place(f"localhost:{self.port}", self.count, number)
        self.wires[number] = wire.Wire(place, lambda: secret)
        return self.wires[number]

    def all_come(self):
        for number in {*range(self.count)} - {*self.wires}:
            self.come(number)
        for one in self.wires.values():
            one.meet(WAIT, str)
        return self

    def connect(self):
        end = time.monotonic() + WAIT
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", self.port + 1), WAIT)
            assert time.monotonic() < end
            time.sleep(0.01)

    def works(self, ended):
        """Asserts that the run goes on: the hosts still come together, and agree on a last step without delay."""
        begin = time.monotonic()
        self.all_come()
        for number, one in self.wires.items():
            assert one.is_last(10 + number) is False
        assert ended == []
        self.wires[1].ask_to_stop()
        last = 11 + max(self.wires)
        until(lambda: all(one._decided.is_set() for one in self.wires.values()))
        assert {one._last for one in self.wires.values()} == {last}
        assert not self.wires[0].is_last(last - 1) and self.wires[1].is_last(last)
        assert ended == [] and time.monotonic() - begin < WAIT


@pytest.fixture
def pod(ended):
    """Two hosts, the second of which comes after the strangers."""
    pod = Pod()
    yield pod
    pod.works(ended)


def until(holds):
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def heard(stream):
    """All that a connection says until it is closed."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while some := stream.recv(1 << 16):
            said += some
    return said


def told_nothing(said):
    """Asserts that nobody said more than the greeting, which says nothing of the run."""
    assert line.GREETING.fullmatch(said) or not said


FORGED = [
    {"host": 1, "count": 2, "arguments": []},  # what an earlier protocol began with
    {"failed": "x", "code": 0},
    {"failed": "x", "code": 2, "host": 1},
    {"bye": True},
    {"stop": True},
    {"last": 1},
    {"passed": 10**9},
    {"go": True},
    {"refused": "x"},
    {"nothing": True},
    *({"failed": "x", "code": code} for code in ("x", 256, -1, True, None, 1e400, [1])),
]
UNPROVEN = {
    "nothing at all, and a half-closed end": b"",
    "garbage": secrets.token_bytes(3000),
    "half a line": b"1 " + b"0" * 64,
    "an empty line": b"\n",
    "an endless line": b"1" * 1_000_000,
    "not UTF-8": b"\xff\xfe\x00\n",
    "deep nested JSON": b"[" * 50_000 + b"]" * 50_000 + b"\n",
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": bytes.fromhex("16030100f8010000f40303") + b"\n" * 40,
    "a proof of zeros": b"1 %s %s\n" % (b"0" * 64, b"0" * 64),
    "an empty proof": b"1 %s \n" % (b"0" * 64),
    "host 0 itself": b"0 %s %s\n" % (b"0" * 64, b"0" * 64),
    "a host out of range": b"999999 %s %s\n" % (b"0" * 64, b"0" * 64),
    "a host too long": b"%s %s %s\n" % (b"9" * 5000, b"0" * 64, b"0" * 64),
    "a negative host": b"-1 %s %s\n" % (b"0" * 64, b"0" * 64),
    "a host that is no number": "١ {0} {0}\n".format("0" * 64).encode(),
    **{f"without proof: {news}": json.dumps(news).encode() + b"\n" for news in FORGED},
    "many lines without proof": b"".join(json.dumps(news).encode() + b"\n" for news in FORGED) * 50,
}


@pytest.mark.parametrize("when", ["while hosts are missing", "when all are there"])
def test_what_is_said_without_a_proof_changes_nothing_and_learns_nothing(pod, ended, monkeypatch, capfd, when):
    monkeypatch.setattr(wire, "PROOF", WAIT)
    strangers = [(pod.connect(), words) for words in UNPROVEN.values()]
    if when == "when all are there":  # who came before they were
        pod.all_come()
    for stranger, words in strangers:
        with stranger:
            with contextlib.suppress(OSError):
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
            told_nothing(heard(stranger))
    out = capfd.readouterr()
    assert out.out.count("somebody connected who does not know this run's secret, and was turned away") == 1
    assert "Traceback" not in out.err and "exception" not in out.err


def test_nobody_is_let_in_when_all_are_there(pod):
    pod.all_come()
    until(lambda: not any(server.is_serving() for server in pod.wires[0]._servers))
    for _ in range(100):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", pod.port + 1), WAIT)
    assert not pod.wires[0]._asking and not pod.wires[0]._strangers


def test_a_reset_connection_changes_nothing(pod):
    for words in (b"", b"1 0000", UNPROVEN["a proof of zeros"]):
        stranger = pod.connect()
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.sendall(words)
        stranger.close()


def test_a_byte_now_and_then_is_closed_after_its_time(pod, monkeypatch):
    monkeypatch.setattr(wire, "PROOF", 0.5)
    begin, stranger = time.monotonic(), pod.connect()
    with stranger, contextlib.suppress(ConnectionError):
        for byte in UNPROVEN["a proof of zeros"]:
            stranger.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - begin < 5 * wire.PROOF


def test_idle_connections_do_not_keep_hosts_out(pod, monkeypatch):
    """Of many the oldest go at once, long before their time, so that descriptors last."""
    monkeypatch.setattr(wire, "ASKING", 20)
    monkeypatch.setattr(wire, "PROOF", 60.0)
    begin, strangers = time.monotonic(), [pod.connect() for _ in range(500)]
    for stranger in strangers[:-20]:
        told_nothing(heard(stranger))
    assert len(pod.wires[0]._asking) == 20
    pod.all_come()
    assert time.monotonic() - begin < 5
    for stranger in strangers:
        stranger.close()
    until(lambda: not pod.wires[0]._asking)


def test_a_stream_of_connections_from_one_address_drives_out_its_own(pod, monkeypatch):
    """A true host of another address, which has come and not spoken yet, stays."""
    monkeypatch.setattr(wire, "ASKING", 4)
    monkeypatch.setattr(wire, "PROOF", 60.0)
    first, address = pod.connect(), ("127.0.0.1", pod.port + 1)
    until(lambda: len(pod.wires[0]._asking) == 1)
    strangers = [socket.create_connection(address, WAIT, source_address=("127.0.0.2", 0)) for _ in range(50)]
    for stranger in strangers[:-3]:
        told_nothing(heard(stranger))
    assert sorted(pod.wires[0]._asking.values()) == ["127.0.0.1", *["127.0.0.2"] * 3]
    for stranger in (first, *strangers):
        stranger.close()
    until(lambda: not pod.wires[0]._asking)


def test_all_hosts_may_come_at_once(ended, monkeypatch):
    monkeypatch.setattr(wire, "ASKING", 4)
    monkeypatch.setattr(wire, "PROOF", 60.0)
    pod = Pod(8)
    strangers = [pod.connect() for _ in range(16)]
    until(lambda: len(pod.wires[0]._asking) == 16)
    assert not pod.wires[0]._strangers
    for stranger in strangers:
        stranger.close()
    until(lambda: not pod.wires[0]._asking)


def test_idle_connections_are_closed_after_their_time(pod, monkeypatch):
    monkeypatch.setattr(wire, "PROOF", 0.5)
    begin = time.monotonic()
    with pod.connect() as stranger:
        told_nothing(heard(stranger))
    assert wire.PROOF <= time.monotonic() - begin < 5 * wire.PROOF


async def enter(port, secret, host):
    """A connection that has proven itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port + 1)
    return reader, await line.enter(reader, writer, secret, host)


@pytest.mark.parametrize("host", [0, 1, 2, 999_999])
def test_another_secret_opens_nothing(pod, host):
    for secret in (b"", SECRET[:-1], SECRET + b"x", SECRET.upper()):
        with pytest.raises((line.Stranger, ConnectionError)):
            asyncio.run(asyncio.wait_for(enter(pod.port, secret, host), WAIT))


def test_a_host_does_not_talk_to_a_host_0_that_knows_nothing(ended):
    """Who took the port before host 0 came learns a number and a proof that fits no other connection."""
    port, said = free_port(), []

    answers = itertools.cycle([b"0" * 64 + b"\n", b'{"go": true}\n', b'{"refused": "x"}\n', b"0" * 200_000])

    def pretend():
        while not done.is_set():
            with contextlib.suppress(OSError):
                stream = server.accept()[0]
                stream.settimeout(WAIT)
                stream.sendall(b"lmm hosts " + b"a" * 64 + b"\n")
                said.append(stream.recv(4096))
                stream.sendall(next(answers))
                said.append(stream.recv(4096))
                stream.close()

    done = threading.Event()
    with socket.create_server(("127.0.0.1", port + 1)) as server:
        server.settimeout(0.1)
        thread = threading.Thread(target=pretend)
        thread.start()
        one = wire.Wire(Place(f"localhost:{port}", 2, 1), lambda: SECRET)
        try:
            with pytest.raises(wire.MissingHost, match="did not prove to know this run's secret in 1 s: host 0 is"):
                one.meet(1, str)
        finally:
            done.set()
            thread.join(WAIT)
    assert not thread.is_alive() and ended == [] and len(said) > 4
    for words in filter(None, said):
        assert line.ANSWER.fullmatch(words)
    assert b"nobody" not in b"".join(said)


def test_hosts_of_other_secrets_do_not_meet_and_are_told_what_is_wrong(ended, capfd):
    pod = Pod()
    met = {pod.wires[0]: r"not all hosts came \(who did not know this run's secret, \d+ times, "}
    met[pod.come(1, SECRET + b"x")] = "did not prove to know this run's secret in 1 s: host 0 is missing; "
    met[pod.come(1, None)] = "host 0 left no secret in the run's folder as this host sees it in 1 s"
    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = [threads.submit(one.meet, 1, str) for one in met]
    for words, result in zip(met.values(), found, strict=True):
        with pytest.raises(wire.MissingHost, match=words):
            result.result()
    assert capfd.readouterr().out.count("somebody connected who does not know this run's secret") == 1
    pod.come(1).meet(WAIT, str)
    assert ended == []


class Tap:
    """Between a host and host 0; keeps what goes through, by direction."""

    def __init__(self, port, to):
        self.kept, self.to, self.streams = {"up": b"", "down": b""}, to, []
        self.server = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self):
        with contextlib.suppress(OSError):
            while True:
                one, other = self.server.accept()[0], socket.create_connection(("127.0.0.1", self.to), WAIT)
                self.streams += [one, other]
                for name, source, sink in (("up", one, other), ("down", other, one)):
                    threading.Thread(target=self._pass, args=(name, source, sink), daemon=True).start()

    def _pass(self, name, source, sink):
        with contextlib.suppress(OSError):
            while some := source.recv(4096):
                self.kept[name] += some
                sink.sendall(some)


def test_what_was_recorded_of_a_run_is_of_no_use(ended):
    """Neither the handshake of a host nor any of its later lines, in whatever order."""
    pod, port = Pod(), free_port()
    tap = Tap(port + 1, pod.port + 1)
    pod.wires[1] = wire.Wire(Place(f"localhost:{port}", 2, 1), lambda: SECRET)
    strangers = [pod.connect() for _ in range(7)]  # from before all are there: later nobody is let in
    pod.all_come()
    time.sleep(2.2 * wire.BEAT)  # signs of life, in both directions
    up, down = (tap.kept[name].splitlines(keepends=True) for name in ("up", "down"))
    assert len(up) > 3 and line.ANSWER.fullmatch(up[0]) and line.WELCOME.fullmatch(down[1])
    said = (b"".join(up), up[0], b"".join(up[1:]), up[2], b"".join(up[:2]) * 2, b"".join(down), down[-1] * 3)
    for stranger, words in zip(strangers, said, strict=True):
        with stranger:
            with contextlib.suppress(OSError):
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
            told_nothing(heard(stranger))
    pod.works(ended)


@pytest.mark.parametrize("what", ["replayed", "reordered", "changed", "of the other direction"])
def test_a_line_that_was_touched_on_its_way_is_the_loss_of_its_host(ended, capfd, what):
    """It steers nothing: all hosts end with 1, as if the connection had been cut."""
    pod, port = Pod(), free_port()
    tap = Tap(port + 1, pod.port + 1)
    pod.wires[1] = wire.Wire(Place(f"localhost:{port}", 2, 1), lambda: SECRET)
    pod.all_come()
    time.sleep(2.2 * wire.BEAT)
    up, down = (tap.kept[name].splitlines(keepends=True) for name in ("up", "down"))
    words = {
        "replayed": up[-1],
        "reordered": up[-2],
        "changed": up[-1].replace(b'{"alive": true}', b'{"failed": "x", "code": 3}'),
        "of the other direction": down[-1],
    }[what]
    tap.streams[1].sendall(words)
    until(lambda: len(ended) == 2)
    assert set(ended) == {1}
    assert "host 1: cannot be understood any more: a line that was changed on its way" in capfd.readouterr().out


def proven(pod, host, act):
    """Runs `act(reader, line)` as a true host; returns what it returns."""

    async def run():
        pod.connect().close()  # host 0 listens by now
        reader, entered = await enter(pod.port, SECRET, host)
        return await act(reader, entered)

    return asyncio.run(asyncio.wait_for(run(), WAIT))


@pytest.mark.parametrize(("host", "words"), [(1, "there is a host 1 of 3 already"), (3, "there is no host 3 of 3")])
def test_a_host_too_many_is_told_so_and_the_others_go_on(ended, host, words):
    pod = Pod(3)
    pod.come(1)
    until(lambda: pod.wires[0]._missing == [2])

    async def come(reader, entered):
        entered.send(count=3, arguments="", digest="")
        return await entered.read()

    assert proven(pod, host, come) == {"refused": words}
    pod.works(ended)


UNREADABLE = {  # what it is called, for each line; `True` where it begins with the proof that it should begin with
    "of more than 65536 bytes": (b"x" * 100_000, False),
    "of more than 65536 bytes ": (b"x" * 300_000, False),
    "changed on its way": (b"0" * 64 + b" {}", False),
    "changed on its way ": (b"", False),
    " changed on its way": (b"\xff\xfe", False),
    "nested too deep": (b"[" * 30_000, True),
    "no dict": (b"[1]", True),
    "Expecting property name": (b"{", True),
    "invalid start byte": (b"\xff", True),
}


@pytest.mark.parametrize("when", ["while hosts are missing", "while all are there"])
def test_what_cannot_be_read_of_a_true_host_is_its_loss(ended, capfd, when):
    """While hosts are missing it may come again, afterwards all end with it; the listener goes on."""
    for reason, (words, true) in UNREADABLE.items():
        pod = Pod(3)

        async def speak(reader, entered, words=words, true=true):
            entered.send(count=3, arguments="", digest=wire._digest())
            while when == "while all are there" and (await entered.read()).get("go") is None:
                pass
            entered.writer.write(entered._sending.of_next(words) * true + b" " * true + words + b"\n")
            with contextlib.suppress(ConnectionError, ValueError):
                while await entered.read():
                    pass

        if when == "while hosts are missing":
            proven(pod, 1, speak)
            pod.works(ended)
            continue
        pod.come(2)
        proven(pod, 1, speak)
        until(lambda: len(ended) == 2)
        out = capfd.readouterr().out
        assert ended == [1, 1] and reason.strip() in out
        for number in (0, 2):  # which host 0 told
            assert f"host {number} of 3: host 1: cannot be understood any more" in out
        ended.clear()


NO_NEWS = [
    {},
    {"what": "no version has"},
    {"failed": 3, "code": 2},
    {"failed": None},
    {"bye": 1},
    {"bye": "yes"},
    {"stop": 1},
    {"stop": "true"},
    {"passed": "3"},
    {"passed": True},
    {"passed": -1},
    {"passed": 1.5},
    {"last": 3},  # this and what follows host 0 alone says
    {"go": True},
    {"refused": "x"},
    {"nothing": True},
    {"waiting": "x"},
    {"unsaid": 3},
    {"alive": {"a": [1]}},
]


def test_what_a_true_host_says_in_another_type_changes_nothing(ended):
    pod = Pod(3)

    async def speak(reader, entered):
        entered.send(count=3, arguments="", digest=wire._digest())
        for news in NO_NEWS:
            entered.send(**news)
        await asyncio.sleep(0.2)
        assert not pod.wires[0]._go.is_set() and not pod.wires[0]._all_passed
        pod.come(2)
        while (await entered.read()).get("go") is None:
            pass
        for news in NO_NEWS:
            entered.send(**news)
        entered.send(stop=True)
        entered.send(passed=7)
        while True:
            news = await entered.read()
            if "last" in news:
                return news
            assert news.keys() <= {"alive", "stop", "unsaid"}

    assert proven(pod, 1, speak) == {"last": 8} and ended == []


@pytest.mark.parametrize(
    ("code", "expected"), [(2, 2), (255, 255), (75, 75), *((c, 1) for c in ("x", 0, 256, -1, True, None, 2.0, [2]))]
)
def test_a_code_is_a_number_from_1_to_255_or_counts_as_1(ended, code, expected):
    pod = Pod()

    async def speak(reader, entered):
        entered.send(count=2, arguments="", digest=wire._digest())
        while (await entered.read()).get("go") is None:
            pass
        entered.send(failed="words", code=code)
        return await entered.read()

    proven(pod, 1, speak)
    until(lambda: ended)
    assert ended == [expected] and type(ended[0]) is int


def test_a_host_speaks_for_itself_alone(ended, capfd):
    """Only what host 0 passes on names another one."""
    pod = Pod(3)
    pod.come(2)

    async def speak(reader, entered):
        entered.send(count=3, arguments="", digest=wire._digest())
        while (await entered.read()).get("go") is None:
            pass
        entered.send(failed="words", code=3, host=2)
        await entered.read()

    proven(pod, 1, speak)
    until(lambda: len(ended) == 2)
    out = capfd.readouterr().out
    assert ended == [3, 3] and "host 0 of 3: host 1: words" in out and "host 2 of 3: host 1: words" in out


@pytest.mark.parametrize("character", ["x", "\x00", "é", "𝔘", "\udcff", "\n"])
def test_a_message_of_a_megabyte_is_heard_cut(ended, capfd, character):
    pod = Pod().all_come()
    begin = time.monotonic()
    told = []
    pod.wires[0].when_another_ends = told.append
    pod.wires[1].say_last(failed=character * 1_000_000, code=9)
    until(lambda: ended)
    assert time.monotonic() - begin < 3 and ended == [9] and told[0].startswith("host 1: ") and len(told) == 1
    out = capfd.readouterr().out
    assert "host 0 of 2: host 1: " in out and " bytes)" in out and len(out) < 20_000


def test_a_frozen_host_is_noticed_and_a_busy_one_is_not(ended, monkeypatch, capfd):
    """Silence is counted in beats of one's own: who was frozen oneself blames nobody."""
    monkeypatch.setattr(wire, "SILENCE", 0.7)
    pod = Pod(3).all_come()
    for one in pod.wires.values():  # a machine that sleeps, or a library that lets no thread of Python run
        one._loop.call_soon_threadsafe(time.sleep, 0.9)
    time.sleep(1.2)
    assert ended == []
    release = threading.Event()
    begin = time.monotonic()
    pod.wires[2]._loop.call_soon_threadsafe(release.wait, WAIT)
    until(lambda: len(ended) == 2)
    assert 0.4 < time.monotonic() - begin < 4 and ended == [1, 1]
    out = capfd.readouterr().out
    assert "host 0 of 3: host 2: has given no sign of life" in out
    assert "host 1 of 3: host 2: has given no sign of life" in out
    release.set()
    assert wire.FROZEN.startswith("has given no sign of life for 25 s")


def test_all_hosts_name_those_that_do_not_say_how_far_they_are(ended):
    pod = Pod(4)
    for number in (1, 2):
        pod.come(number)
    silent = threading.Event()

    async def speak(reader, entered):  # alive, and deaf to what it is asked
        entered.send(count=4, arguments="", digest=wire._digest())
        while not silent.is_set():
            entered.send(alive=True)
            await asyncio.sleep(0.05)

    thread = threading.Thread(target=proven, args=(pod, 3, speak))
    thread.start()
    for one in pod.wires.values():
        one.meet(WAIT, str)
        assert not one.is_last(1)
    pod.wires[1].ask_to_stop()
    until(lambda: all(one._stopping for one in pod.wires.values()))
    until(lambda: all(one._unsaid for one in pod.wires.values()))
    begin = time.monotonic()
    for one in pod.wires.values():
        with pytest.raises(TimeoutError, match="asked to stop, but in 0 s no word came from host 3 of how far"):
            one.is_last(2, limit=0.01)
    assert time.monotonic() - begin < 2
    silent.set()
    thread.join()


def test_a_stop_before_the_first_step_ends_all_at_once(ended, capfd):
    pod = Pod(3).all_come()
    begin = time.monotonic()
    pod.wires[2].ask_to_stop()
    until(lambda: len(ended) == 3)
    assert ended == [75, 75, 75] and time.monotonic() - begin < 3
    out = capfd.readouterr().out
    for i in range(3):
        assert f"host {i} of 3: asked to stop before the first step: nothing was lost" in out


@pytest.mark.parametrize(("asked", "come"), [(0, []), (1, []), (2, [1, 2])])
def test_a_stop_while_hosts_are_missing_ends_those_that_are_there(ended, capfd, asked, come):
    if asked == 1:  # where not even host 0 is
        one = wire.Wire(Place(f"localhost:{free_port()}", 2, 1), lambda: SECRET)
    else:
        pod = Pod(4)
        for number in come:
            pod.come(number)
        one = pod.wires[asked]
        until(lambda: len(pod.wires[0]._lines) == len(come))
    one.ask_to_stop()
    until(lambda: len(ended) == 1 + len(come))
    assert set(ended) == {75}
    assert capfd.readouterr().out.count("asked to stop before the first step") == 1 + len(come)


def test_a_stop_that_crosses_the_last_host_s_coming_is_heard(ended):
    """Host 1 asks before it knows that all are there, which host 0 knows already and has taken a step."""
    pod = Pod()

    async def speak(reader, entered):
        entered.send(count=2, arguments="", digest=wire._digest())
        while (await entered.read()).get("go") is None:
            pass
        assert not pod.wires[0].is_last(1)
        entered.send(stop=True)
        entered.send(stop=True)
        entered.send(passed=0)
        while "last" not in (news := await entered.read()):
            pass
        return news

    assert proven(pod, 1, speak) == {"last": 2} and ended == [] and pod.wires[0].is_last(2)


def test_a_host_that_asked_before_it_knew_that_all_are_there_says_how_far_it_is(ended):
    port = free_port()
    one = wire.Wire(Place(f"localhost:{port}", 2, 1), lambda: SECRET)
    said = []

    async def host_0(reader, writer):
        _, entered = await line.admit(reader, writer, SECRET)
        await entered.read()
        one.ask_to_stop()
        while "stop" not in await entered.read():
            pass
        entered.send(go=True)
        entered.send(stop=True)
        while "passed" not in (news := await entered.read()):
            pass
        said.append(news)
        entered.send(last=5)

    async def serve():
        async with await asyncio.start_server(host_0, "127.0.0.1", port + 1):
            end = time.monotonic() + WAIT
            while not one._decided.is_set():
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            one._left = True  # host 0 goes

    asyncio.run(serve())
    assert said == [{"passed": 0}] and not one.is_last(4) and one.is_last(5) and ended == []


def test_a_step_on_any_host_is_worth_saving(ended):
    pod = Pod(3).all_come()
    assert not pod.wires[1].is_last(1)
    pod.wires[2].ask_to_stop()
    until(lambda: all(one._decided.is_set() for one in pod.wires.values()))
    assert ended == [] and all(one.is_last(2) for one in pod.wires.values())


def listens(port):
    """Which addresses of this machine answer."""
    answers = set()
    for address in ("127.0.0.1", "127.0.0.2", *own_addresses()):
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
            answers.add(address)
    return answers


def own_addresses():
    """Other addresses of this machine than loopback's; may be none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, contextlib.suppress(OSError):
        one.connect(("192.0.2.1", 9))  # sends nothing
        return {one.getsockname()[0]} - {"127.0.0.1"}
    return set()


@pytest.mark.parametrize(
    ("address", "expected", "line_of_it"),
    [
        ("127.0.0.1", "127.0.0.1", ""),
        ("127.0.0.2", "127.0.0.2", ""),
        ("192.0.2.1", None, "192.0.2.1 is no address of this machine: listening at all that it has"),
        ("no.such.name.invalid", None, "no.such.name.invalid is no address of this machine"),
    ],
)
def test_host_0_listens_where_the_others_look_for_it(capfd, monkeypatch, address, expected, line_of_it):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    port = free_port()
    one = wire.Wire(Place(f"{address}:{port}", 2, 0), lambda: SECRET)
    until(lambda: one._servers)
    assert one.listens_at == expected
    assert listens(port + 1) == ({expected} if expected else {"127.0.0.1", "127.0.0.2", *own_addresses()})
    assert line_of_it in capfd.readouterr().out


def test_where_host_0_listens_can_be_said(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.3:1")
    port = free_port()
    one = wire.Wire(Place(f"192.0.2.1:{port}", 2, 0), lambda: SECRET)
    until(lambda: one._servers)
    assert one.listens_at == "127.0.0.3" and not listens(port + 1)


@pytest.mark.parametrize("given", ["127.0.0.3", ":8482", "::1", "::1:8482", "[::1]", "a:b", "a:8482x"])
def test_an_address_to_listen_at_that_is_none_is_named(monkeypatch, given):
    """Rather than listening at all addresses."""
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", given)
    with pytest.raises(ValueError, match="JAX_COORDINATOR_BIND_ADDRESS=.*: expected ADDRESS:PORT, .* 192.0.2.1:8000"):
        wire._bind_address(Place("192.0.2.1:8000", 2, 0))


@pytest.mark.parametrize(
    ("given", "address"), [("[::1]:1", "::1"), ("[::]:1", None), ("0.0.0.0:1", None), ("a.b:99", "a.b"), ("", "::2")]
)
def test_where_host_0_listens_is_read_with_its_brackets(monkeypatch, given, address):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", given)
    assert wire._bind_address(Place("[::2]:8482", 2, 0)) == address


def test_an_address_is_put_together_with_its_port():
    assert with_port("::1", 8482) == "[::1]:8482" and with_port("localhost", 1) == "localhost:1"
