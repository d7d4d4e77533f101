"""A line between two hosts, each of which has proven to the other that it knows the run's secret.

Host 0 speaks first, and says a nonce. The other answers with its number, a nonce of its own, and a proof: an HMAC
over number and nonces, with the secret as the key. Host 0 answers with a proof of its own. From secret, number and
nonces both derive a key for each direction, and every later line begins with an HMAC, by that key, over its number
and its words. What somebody recorded is therefore of no use on another connection, nor at another place of the same
one. The words are not hidden from who can listen on the hosts' network. What comes in before the proof is compared
with one pattern, and not parsed.
"""

import hashlib
import hmac
import json
import re
import secrets

LIMIT = 1 << 16  # bytes of a line
WORDS = 8000  # bytes of a text in it, each of which may take six

GREETING = re.compile(rb"lmm hosts (?P<nonce>[0-9a-f]{64})\n")
ANSWER = re.compile(rb"(?P<host>[0-9]{1,6}) (?P<nonce>[0-9a-f]{64}) (?P<proof>[0-9a-f]{64})\n")
WELCOME = re.compile(rb"(?P<proof>[0-9a-f]{64})\n")


class Stranger(Exception):
    """The other end does not know the secret, or speaks another language."""


class Line:
    """One end of it.

    Attributes:
      writer: the stream it writes to.
    """

    def __init__(self, reader, writer, sending, reading):
        """`sending`, `reading`: keys of the two directions."""
        self._reader, self.writer = reader, writer
        self._sending, self._reading = _Proofs(sending), _Proofs(reading)

    def send(self, **news):
        """Sends a dict of JSON; long texts in it are cut."""
        if not self.writer.is_closing():
            news = {name: cut(value) if isinstance(value, str) else value for name, value in news.items()}
            words = json.dumps(news, ensure_ascii=False).encode()
            self.writer.write(self._sending.of_next(words) + b" " + words + b"\n")

    async def read(self) -> dict | None:
        """The next dict from the other end; None when that has ended.

        Raises:
          ValueError: a line that is too long, not from the other end, or no dict.
          OSError: the connection is broken.
        """
        try:
            line = await self._reader.readline()
        except ValueError as e:
            raise ValueError(f"a line of more than {LIMIT} bytes") from e
        if not line.endswith(b"\n"):
            return None
        proof, _, words = line[:-1].partition(b" ")
        if not hmac.compare_digest(proof, self._reading.of_next(words)):
            raise ValueError("a line that was changed on its way")
        try:
            news = json.loads(words)
        except RecursionError as e:
            raise ValueError("a line that is nested too deep") from e
        if not isinstance(news, dict):
            raise ValueError("a line that is no dict")
        return news


class _Proofs:
    """What the lines of a direction have to begin with."""

    def __init__(self, key):
        self._key, self._next = key, 0

    def of_next(self, words):
        self._next += 1
        return _hmac(self._key, self._next.to_bytes(8, "big") + words)


async def admit(reader, writer, secret) -> tuple[int, Line]:
    """Host 0's part: the number that the other end says it has, and the line to it.

    Raises:
      Stranger: it does not know the secret.
      ValueError, OSError: it said too much, or broke off.
    """
    nonce = _nonce()
    writer.write(b"lmm hosts " + nonce + b"\n")
    answer = await _expect(ANSWER, reader)
    host, proofs = int(answer["host"]), _Handshake(secret, int(answer["host"]), nonce, answer["nonce"])
    _check(answer["proof"], proofs.of("host"))
    writer.write(proofs.of("host 0") + b"\n")
    return host, Line(reader, writer, proofs.of("from host 0"), proofs.of("to host 0"))


async def enter(reader, writer, secret, host) -> Line:
    """The part of every other host, number `host`; raises as `admit` does."""
    greeting, nonce = await _expect(GREETING, reader), _nonce()
    proofs = _Handshake(secret, host, greeting["nonce"], nonce)
    writer.write(b"%d %s %s\n" % (host, nonce, proofs.of("host")))
    _check((await _expect(WELCOME, reader))["proof"], proofs.of("host 0"))
    return Line(reader, writer, proofs.of("to host 0"), proofs.of("from host 0"))


class _Handshake:
    def __init__(self, secret, host, *nonces):
        self._secret, self._what = secret, b"%d %s %s" % (host, *nonces)

    def of(self, purpose):
        """Proof or key, another one for each purpose."""
        return _hmac(self._secret, f"lmm hosts: {purpose}: ".encode() + self._what)


async def _expect(pattern, reader):
    found = pattern.fullmatch(await reader.readline())
    if not found:
        raise Stranger
    return found


def _check(proof, expected):
    if not hmac.compare_digest(proof, expected):
        raise Stranger


def _hmac(key, what):
    return hmac.new(key, what, hashlib.sha256).hexdigest().encode()


def _nonce():
    return secrets.token_hex(32).encode()


def cut(text) -> str:
    """A text of at most `WORDS` bytes: of a longer one the beginning, and how much it was."""
    whole = text.encode(errors="replace")
    if len(whole) <= WORDS:
        return whole.decode()
    return f"{whole[: WORDS - 40].decode(errors='ignore')} … ({len(whole):,} bytes)"
