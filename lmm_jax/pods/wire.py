"""A line between host 0 and each other host of a run, from start-up to the end.

Lines of JSON over TCP, one port above JAX's own service: hello (`host`, `count`, `arguments`), `missing`, `go`, then
`alive` now and then, `stop`, `passed` and `last` to agree on a last step, and `failed` or `bye` at the end.
"""

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shlex
import sys
import threading
import time

BEAT, SILENCE = 5.0, 60.0  # seconds between two signs of life, and without one
RETRY, SAY_EVERY, FAREWELL = 0.5, 15.0, 1.0  # seconds
GONE = "is gone: killed, or its machine is lost"


class MissingHost(RuntimeError):
    """Not all hosts came."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Which host of how many this process is.

    Attributes:
      coordinator: `"address:port"` of JAX's service, on host 0.
      count, number: hosts, and which of them this is, from 0.
      names: addresses of all hosts, empty where the environment does not tell.
    """

    coordinator: str
    count: int
    number: int
    names: tuple[str, ...] = ()

    def say(self, text):
        """Prints a line of this host."""
        print(f"host {self.number} of {self.count}: {text}", flush=True)


class Wire:
    """This host's end, or on host 0 all ends, served by a thread of its own.

    When another host fails or is lost, that thread prints it and ends this process, whatever it is waiting for.
    """

    def __init__(self, place):
        self._place = place
        address, _, port = place.coordinator.rpartition(":")
        self._address, self._port = address.strip("[]"), int(port) + 1
        self._missing = sorted({*range(place.count)} - {place.number})
        self._writers = {}  # by host: on host 0 of all others, elsewhere of host 0
        self._go, self._fault, self._left = threading.Event(), None, False
        self._passed, self._all_passed, self._lock = 0, {}, threading.Lock()
        self._stopping, self._last, self._decided = False, None, threading.Event()
        self._server, self._loop = None, asyncio.new_event_loop()
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
            if left <= 0 and not (self._place.number and self._writers):  # else it is for host 0 to give up
                here = self._place.number == 0
                missing = self._missing if here else [0]
                what = "not all hosts came" if here else f"nobody answers at {self._address}:{self._port}"
                if here and self._server is None:
                    what = f"port {self._port} is taken by something else, so that no host came"
                verb = "is" if len(missing) == 1 else "are"
                raise MissingHost(f"{what} in {limit} s: {listed(missing)} {verb} missing; {remedy(missing)}")
            self._place.say(f"waiting for {listed(self._missing)}")
        if self._fault:
            raise ValueError(self._fault)

    def ask_to_stop(self):
        """Asks all hosts to agree on a last step; returns at once, signal handlers may call it."""
        self._loop.call_soon_threadsafe(self._heard_stop)

    def is_last(self, step) -> bool:
        """Whether a stop was asked for, and all hosts agree that `step`, which is done, is the last."""
        with self._lock:
            if not self._stopping:
                self._passed = step
                return False
        self._decided.wait()
        return step >= self._last

    def say_last(self, **news):
        """Sends `news` to every host that is connected, before this process ends; what comes in counts no more."""
        self._left = True
        with contextlib.suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._farewell(news), self._loop).result(2 * FAREWELL)

    async def _farewell(self, news):
        self._tell(host=self._place.number, **news)
        with contextlib.suppress(OSError):
            await asyncio.gather(*(writer.drain() for writer in self._writers.values()))
        await asyncio.sleep(FAREWELL if self._writers and "failed" in news else 0)

    def _run(self):
        asyncio.set_event_loop(self._loop)
        self._tasks = [  # kept: the loop itself holds them weakly
            self._loop.create_task(self._beat()),
            self._loop.create_task(self._call() if self._place.number else self._serve()),
        ]
        self._loop.run_forever()

    async def _beat(self):
        while True:
            await asyncio.sleep(BEAT)
            self._tell(alive=True)

    async def _serve(self):
        while True:
            try:
                self._server = await asyncio.start_server(self._welcome, port=self._port)
                return
            except OSError:  # the port is taken, maybe by a run that is about to end
                await asyncio.sleep(RETRY)

    async def _welcome(self, reader, writer):
        hello = {}
        with contextlib.suppress(ValueError, TimeoutError, OSError):  # of somebody who is no host
            hello = json.loads(await asyncio.wait_for(reader.readline(), BEAT))
        host = hello.get("host") if isinstance(hello, dict) else None
        if host in self._missing:
            fault = self._wrong(hello)
            if fault:
                self._fault = f"host {host} is refused: {fault}"
                writer.write(_line(refused=self._fault))
                self._go.set()
            else:
                self._missing.remove(host)
                self._writers[host] = writer
                self._tell(missing=self._missing)
                if not self._missing:
                    self._tell(go=True)
                    self._go.set()
                await self._listen(host, reader)
        elif host is not None:
            writer.write(_line(refused=f"there is a host {host} of {self._place.count} already"))
        writer.close()

    def _wrong(self, hello):
        if hello.get("count") != self._place.count:
            return f"it is one of {hello['count']} hosts, host 0 of {self._place.count}"
        if hello.get("arguments") != sys.argv[1:]:
            return f"it runs `{shlex.join(hello['arguments'])}`, host 0 `{shlex.join(sys.argv[1:])}`"
        return None

    async def _call(self):
        hello = _line(host=self._place.number, count=self._place.count, arguments=sys.argv[1:])
        while not self._go.is_set():
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(self._address, self._port)
                writer.write(hello)
                self._writers = {0: writer}
                await self._listen(0, reader)
            await asyncio.sleep(RETRY)

    async def _listen(self, host, reader):
        """Acts on what `host` says, until it ends."""
        while True:
            news = await _read(reader)
            self._missing = news.get("missing", self._missing)
            if "go" in news:
                self._go.set()
            elif "stop" in news:
                self._heard_stop()
            elif "passed" in news:
                self._heard_passed(host, news["passed"])
            elif "last" in news:
                self._last = news["last"]
                self._decided.set()
            elif "refused" in news:
                self._fault, self._left = news["refused"], True
                self._go.set()
                return
            elif "bye" in news:
                self._writers.pop(host, None)
                return
            elif "gone" in news and not self._go.is_set():
                self._writers.pop(host, None)
                self._missing = sorted({*self._missing, host})
                self._tell(missing=self._missing)
                return
            elif "failed" in news:
                await self._stop(news.get("host", host), news["failed"], news["code"])
                return

    def _heard_stop(self):
        """Somebody asks to stop: through host 0 all learn it, and each tells host 0 how far it has come."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._tell(stop=True)
        self._heard_passed(self._place.number, self._passed)

    def _heard_passed(self, host, step):
        if self._place.number:
            self._tell(passed=step)
            return
        self._all_passed[host] = step
        if len(self._all_passed) == self._place.count:
            self._last = max(self._all_passed.values()) + 1
            self._tell(last=self._last)
            self._decided.set()

    async def _stop(self, host, words, code):
        if self._left:
            return
        self._left = True
        self._place.say(f"host {host}: {words}\n  this host stops too; the same command on all hosts continues")
        if self._place.number == 0:
            self._tell(host=host, failed=words, code=code)
            await asyncio.sleep(FAREWELL)  # JAX's service, here, ends the others too, but without a word
        end(code)

    def _tell(self, **news):
        for writer in self._writers.values():
            if not writer.is_closing():
                writer.write(_line(**news))


async def _read(reader):
    try:
        line = await asyncio.wait_for(reader.readline(), SILENCE)
    except TimeoutError:
        return {"failed": f"has given no sign of life for {SILENCE:.0f} s", "code": 1, "gone": True}
    except OSError:
        line = b""
    return json.loads(line) if line else {"failed": GONE, "code": 1, "gone": True}


def _line(**news):
    return json.dumps(news).encode() + b"\n"


def listed(hosts) -> str:
    """Numbers of hosts in words."""
    more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(map(str, hosts[:8]))}{more}"


def end(code):
    """Ends this process at once, and the data workers that it has, which would stay."""
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
