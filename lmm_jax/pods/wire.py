"""What the hosts of a run tell one another beside JAX: who is missing, what is wrong, when to stop.

Every host but the first has a `line` to host 0, over TCP, one port above JAX's own service. Dicts of JSON go over it:
`count`, `arguments` and `digest` from a host that comes, `waiting`, `refused` or `go` back; then `alive` every
second, `stop`, `passed`, `last` or `nothing` to agree on a last step, and `failed` or `bye` at the end.

Beside this stands what JAX offers, measured on 0.10 and 0.11: the table is in launch/README.md, "Several hosts". Its
service compares no commands, and ends a process by SIGABRT with a fatal log that never tells the reason, whatever
happened: a host that never came, was lost, or raised an error, which then waits in the barrier of the exit. Its
agreement on a last step hears SIGTERM alone and has no answer before the first step. Its barrier at a regular end and
all collectives are used as they are.
"""

import asyncio
import collections
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import socket
import sys
import threading
import time

from lmm_jax.exit_codes import PREEMPTED
from lmm_jax.pods import line as line_lib
from lmm_jax.pods.place import with_port

BEAT, SILENCE = 1.0, 25.0  # seconds between two signs of life, and without one
RETRY, SAY_EVERY, FAREWELL, TELLING = 0.5, 15.0, 1.0, 2.0  # seconds
PROOF, ASKING = 5.0, 128  # seconds, and the fewest connections at a time, that have not proven anything yet
AGREE = 120.0  # seconds until all have said how far they have come
BACKLOG = 256  # connections that wait to be taken
BIND_ADDRESS = re.compile(r"([^:\[\]]+|\[[^\[\]]+\]):[0-9]{1,5}")
GONE = "is gone: killed, or its machine is lost"
FROZEN = f"has given no sign of life for {SILENCE:.0f} s: it is frozen, or cannot be reached"


class MissingHost(RuntimeError):
    """Not all hosts came."""


class Wire:
    """This host's end, or on host 0 all ends, served by a thread of its own.

    When another host fails or is lost, that thread prints it and ends this process, whatever it is waiting for.
    Whoever connects and does not know the secret is told nothing, and changes nothing.

    Attributes:
      listens_at: on host 0 the address or name that it listens at, None where it is all that the machine has.
      when_another_ends: called with a sentence about the host because of which this process ends, before it does.
    """

    def __init__(self, place, secret):
        """Begins to listen, or to call host 0.

        Args:
          place: a `Place`.
          secret: gives the bytes that all hosts know, None while this one does not.

        Raises:
          ValueError: JAX_COORDINATOR_BIND_ADDRESS is no address with a port.
        """
        self._place, self._secret = place, secret
        self._address = None if place.number else _bind_address(place)
        self._missing = sorted({*range(place.count)} - {place.number})  # on host 0
        self._waiting_for = listed(self._missing)
        self._lines, self._silent = {}, {}  # by host: on host 0 to all others, elsewhere to host 0
        self._asking = {}  # addresses by tasks, in the order in which these began
        self._strangers = 0  # how many were turned away
        self._obstacle = None  # why this host does not come to host 0, if it is known
        self._go, self._fault, self._left = threading.Event(), None, False
        self._passed, self._all_passed, self._lock = 0, {}, threading.Lock()
        self._stopping, self._last, self._decided = False, None, threading.Event()
        self._unsaid = ""  # which hosts have not said how far they have come
        self.when_another_ends = lambda words: None
        self._servers, self.listens_at, self._loop = [], None, asyncio.new_event_loop()
        threading.Thread(target=self._run, name="hosts", daemon=True).start()

    def meet(self, limit, remedy):
        """Returns when all hosts are there.

        Args:
          limit: seconds until a missing host is an error.
          remedy: of the numbers of missing hosts, what to do about it.

        Raises:
          MissingHost: naming them.
          ValueError: a host runs something else.
        """
        left, begin = float(limit), time.monotonic()
        while not self._go.wait(min(SAY_EVERY, left) if left > 0 else SAY_EVERY):
            left = limit - (time.monotonic() - begin)
            if left <= 0 and not (self._place.number and self._lines):  # else it is for host 0 to give up
                raise MissingHost(self._who_is_missing(limit, remedy))
            turned_away = f"; turned away, as they did not know the run's secret: {self._strangers}"
            self._place.say(f"waiting for {self._waiting_for}{turned_away * bool(self._strangers)}")
        if self._fault:
            raise ValueError(self._fault)

    def _who_is_missing(self, limit, remedy):
        here = self._place.number == 0
        missing = list(self._missing) if here else [0]
        what = "not all hosts came" if here else f"nobody answers at {self._place.address}:{self._place.port + 1}"
        if here and not self._servers:
            what = f"port {self._place.port + 1} is taken by something else, so that no host came"
        elif here and self._strangers:
            what += f" (who did not know this run's secret, {self._strangers} times, was turned away)"
        elif self._obstacle:
            what = self._obstacle
        verb = "is" if len(missing) == 1 else "are"
        return f"{what} in {limit} s: {listed(missing)} {verb} missing; {remedy(missing)}"

    def ask_to_stop(self):
        """Asks all hosts to agree on a last step; returns at once. Any thread and any signal handler may call it.

        Where no host has taken a step yet, or some are still missing, there is nothing to save, and all end at once.
        """
        self._loop.call_soon_threadsafe(self._heard_stop)

    def is_last(self, step, limit=AGREE) -> bool:
        """Whether a stop was asked for, and all hosts agree that `step`, which is done, is the last.

        Raises:
          TimeoutError: some did not say within `limit` seconds how far they have come; it names them.
        """
        with self._lock:
            if not self._stopping:
                self._passed = step
                return False
        if not self._decided.wait(limit):
            who = self._unsaid or listed([0])
            raise TimeoutError(f"asked to stop, but in {limit:.0f} s no word came from {who} of how far it has come")
        return step >= self._last

    def say_last(self, **news):
        """Sends `news` to every host that is connected, before this process ends; what comes in counts no more."""
        self._left = True
        with contextlib.suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._farewell(news), self._loop).result(2 * FAREWELL)

    async def _farewell(self, news):
        self._tell(**news)
        with contextlib.suppress(OSError):
            await asyncio.gather(*(line.writer.drain() for line in self._lines.values()))
        await asyncio.sleep(FAREWELL if self._lines and "failed" in news else 0)

    def _run(self):
        asyncio.set_event_loop(self._loop)
        self._tasks = [  # kept: the loop itself holds them weakly
            self._loop.create_task(self._beat()),
            self._loop.create_task(self._call() if self._place.number else self._serve()),
        ]
        self._loop.run_forever()

    async def _beat(self):
        """Gives signs of life, and looks for those of the others.

        It counts its own beats and reads no clock: where this process was frozen itself, no other host is to blame.
        """
        while True:
            await asyncio.sleep(BEAT)
            self._tell(alive=True, **({"unsaid": self._unsaid} if self._unsaid and not self._place.number else {}))
            for host, line in list(self._lines.items()):
                self._silent[host] += 1
                if self._silent[host] * BEAT > SILENCE:
                    if self._go.is_set():
                        await self._stop(host, FROZEN, 1)
                    line.writer.transport.abort()  # it may come once more

    async def _serve(self):
        while True:
            with contextlib.suppress(OSError):  # the port is taken, maybe by a run that is about to end
                sockets = self._open()
                self._servers = [
                    await asyncio.start_server(self._welcome, sock=one, limit=line_lib.LIMIT, backlog=BACKLOG)
                    for one in sockets
                ]
                return
            await asyncio.sleep(RETRY)

    def _open(self):
        """Sockets at the address by which the others know this host, or where it has another one, at all it has."""
        address, port = self._address, self._place.port + 1
        sockets = _listening(address, port)
        if sockets:
            self.listens_at = address
            return sockets
        self._say(f"{address} is no address of this machine: listening at all that it has")
        return _listening(None, port)

    async def _welcome(self, reader, writer):
        """Hears who connects. It has `PROOF` seconds; of too many at a time one has to go, see `_send_away`."""
        task, (address, *_) = asyncio.current_task(), writer.get_extra_info("peername") or (None,)
        self._asking[task] = address
        if len(self._asking) > max(ASKING, 2 * self._place.count):  # as all true hosts may come at once
            self._send_away()
        try:
            async with asyncio.timeout(PROOF):
                host, line = await line_lib.admit(reader, writer, self._secret())
                hello = await line.read()
        except (line_lib.Stranger, ValueError, OSError, asyncio.CancelledError):
            self._strangers += 1
            writer.transport.abort()
            if self._strangers == 1:
                self._say("somebody connected who does not know this run's secret, and was turned away")
            return
        finally:
            self._asking.pop(task, None)
        if hello is not None:
            await self._admitted(host, line, hello)
        writer.close()

    def _send_away(self):
        """Closes the oldest connection of the address that most come from: a stranger's stream drives out its own."""
        (most, _), *_ = collections.Counter(self._asking.values()).most_common(1)
        oldest = next(task for task, address in self._asking.items() if address == most)
        del self._asking[oldest]
        oldest.cancel()

    async def _admitted(self, host, line, hello):
        if host not in self._missing:
            there = "a" if host < self._place.count else "no"
            line.send(refused=f"there is {there} host {host} of {self._place.count}{' already' * (there == 'a')}")
            return
        fault = self._wrong(hello)
        if fault:
            self._fault = f"host {host} is refused: {fault}"
            line.send(refused=self._fault)
            self._go.set()
            return
        self._missing.remove(host)
        self._lines[host], self._silent[host] = line, 0
        self._waiting_for = listed(self._missing)
        self._tell(waiting=self._waiting_for)
        if not self._missing:
            self._tell(go=True)
            self._begin()
        await self._listen(host, line)

    def _wrong(self, hello):
        count, words = hello.get("count"), hello.get("arguments")
        if count != self._place.count:
            return f"it is one of {count} hosts, host 0 of {self._place.count}"
        if hello.get("digest") != _digest():
            return f"it runs `{words}`, host 0 `{line_lib.cut(shlex.join(sys.argv[1:]))}`"
        return None

    async def _call(self):
        while not self._go.is_set():
            await self._come()
            await asyncio.sleep(RETRY)

    async def _come(self):
        secret = await asyncio.to_thread(self._secret)
        if secret is None:
            self._obstacle = "host 0 left no secret in the run's folder as this host sees it"
            return
        writer = None
        address, port = self._place.address, self._place.port + 1
        try:
            async with asyncio.timeout(PROOF):
                reader, writer = await asyncio.open_connection(address, port, limit=line_lib.LIMIT)
                line = await line_lib.enter(reader, writer, secret, self._place.number)
        except (line_lib.Stranger, ValueError, OSError):
            self._obstacle = None
            if writer:
                writer.transport.abort()
                self._obstacle = f"who answers at {address}:{port} did not prove to know this run's secret"
            return
        self._obstacle = None
        line.send(count=self._place.count, arguments=shlex.join(sys.argv[1:]), digest=_digest())
        self._lines, self._silent = {0: line}, {0: 0}
        await self._listen(0, line)
        writer.close()

    def _begin(self):
        """All are here, and nobody else is let in: a host that is lost from now on ends the run."""
        for server in self._servers:
            server.close()
        self._go.set()
        if self._stopping:  # which this host asked for as the last ones came
            self._announce_stop()

    async def _listen(self, host, line):
        """Acts on what `host` says, until it ends."""
        while True:
            try:
                news = await line.read()
            except ValueError as e:
                words, news = f"cannot be understood any more: {e}", None
            except OSError:
                words, news = GONE, None
            else:
                words = GONE
            if news is None:
                await self._lost(host, words)
                return
            self._silent[host] = 0
            if await self._heard(host, news):
                return

    async def _lost(self, host, words):
        if self._go.is_set():
            await self._stop(host, words, 1)
        self._lines.pop(host, None)
        if self._place.number == 0:
            self._missing = sorted({*self._missing, host})
            self._waiting_for = listed(self._missing)
            self._tell(waiting=self._waiting_for)

    async def _heard(self, host, news):
        """Acts on a dict; returns whether it was the last. What is unknown or of another type changes nothing."""
        match news:
            case {"failed": str(words)}:
                of = news.get("host")
                known = host == 0 and _is_whole(of, 0, self._place.count - 1)
                await self._stop(of if known else host, words, exit_code(news.get("code")))
                return True
            case {"bye": True}:
                self._lines.pop(host, None)
                return True
            case {"stop": True}:
                self._heard_stop()
            case {"passed": step} if self._place.number == 0 and _is_whole(step, 0):
                self._heard_passed(host, step)
            case {"last": step} if host == 0 and _is_whole(step, 1):
                self._last = step
                self._decided.set()
            case {"nothing": True} if host == 0:
                await self._end_with_nothing()
                return True
            case {"unsaid": str(who)} if host == 0:
                self._unsaid = who
            case {"waiting": str(who)} if host == 0:
                self._waiting_for = who
            case {"go": True} if host == 0:
                self._begin()
            case {"refused": str(fault)} if host == 0 and not self._go.is_set():
                self._fault, self._left = fault, True
                self._go.set()
                return True
        return False

    def _heard_stop(self):
        """Somebody asks to stop: through host 0 all learn it, and each tells host 0 how far it has come."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        if self._go.is_set():
            self._announce_stop()
        elif self._place.number and self._lines:
            self._tell(stop=True)  # host 0 knows whether all are there meanwhile
        else:
            self._ending = self._loop.create_task(self._end_with_nothing())

    def _announce_stop(self):
        self._tell(stop=True)
        if self._place.number:
            self._tell(passed=self._passed)
        else:
            self._heard_passed(0, self._passed)

    def _heard_passed(self, host, step):
        self._all_passed[host] = step
        unsaid = [other for other in range(self._place.count) if other not in self._all_passed]
        self._unsaid = listed(unsaid) if unsaid else ""
        if unsaid or self._decided.is_set() or self._left:
            return
        if not any(self._all_passed.values()):
            self._ending = self._loop.create_task(self._end_with_nothing())
            return
        self._last = max(self._all_passed.values()) + 1
        self._tell(last=self._last)
        self._decided.set()

    async def _end_with_nothing(self):
        """All were asked to stop, and none has taken a step since it started, maybe as all compile for minutes."""
        if self._left:
            return
        self._left = True
        self._say("asked to stop before the first step: nothing was lost, the same command on all hosts continues")
        if self._place.number == 0:
            self._tell(nothing=True)
        await self._leave_last()
        end(PREEMPTED)

    async def _stop(self, host, words, code):
        if self._left:
            return
        self._left = True
        self._say(f"host {host}: {words}\n  this host stops too; the same command on all hosts continues")
        if self._place.number == 0:
            self._tell(host=host, failed=words, code=code)
        within(TELLING, self.when_another_ends, f"host {host}: {words}")  # a disk may be gone, too
        await self._leave_last()
        end(code)

    async def _leave_last(self):
        """JAX's service, on host 0, ends the others as it ends, but without a word: they shall go before."""
        await asyncio.sleep(FAREWELL if self._place.number == 0 else 0)

    def _tell(self, **news):
        for line in self._lines.values():
            line.send(**news)

    def _say(self, text):
        """Prints a line of this host, unless who reads its output has stopped to: the thread must go on."""
        within(FAREWELL / 2, self._place.say, text)


def _listening(address, port):
    """Sockets at those of the addresses of a name (all addresses if None) that this machine has; may be none."""
    sockets = []
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror:
        return []
    for family, _, _, _, where in dict.fromkeys(found):
        try:
            sockets.append(socket.create_server(where[:2], family=family, backlog=BACKLOG))
        except OSError as e:
            if e.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for one in sockets:
                    one.close()
                raise
    return sockets


def _bind_address(place) -> str | None:
    """Where host 0 listens: as JAX_COORDINATOR_BIND_ADDRESS says, else at its own address; None for all it has."""
    given = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if given and not BIND_ADDRESS.fullmatch(given):
        raise ValueError(
            f"JAX_COORDINATOR_BIND_ADDRESS={given}: expected ADDRESS:PORT, with an IPv6 address in brackets, such as "
            f"{with_port(place.address, place.port)}"
        )
    address = given.rpartition(":")[0].strip("[]") if given else place.address
    return None if address in ("", "::", "0.0.0.0") else address


def _digest():
    return hashlib.sha256(json.dumps(sys.argv[1:]).encode(errors="surrogateescape")).hexdigest()


def _is_whole(value, low, high=float("inf")):
    return type(value) is int and low <= value <= high


def exit_code(value) -> int:
    """The code that a host ends with, by what another one said: 1 for what is none."""
    return value if _is_whole(value, 1, 255) else 1


def listed(hosts) -> str:
    """Numbers of hosts in words."""
    more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(map(str, hosts[:8]))}{more}"


def within(seconds, act, *args):
    """Calls `act`, and leaves it behind if it takes longer."""
    thread = threading.Thread(target=act, args=args, daemon=True)
    thread.start()
    thread.join(seconds)


def end(code):
    """Ends this process at once, and the data workers that it has, which would stay."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
            child.kill()
    within(FAREWELL / 2, _flush)  # output that nobody reads any more would hold it for ever
    os._exit(code)


def _flush():
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
