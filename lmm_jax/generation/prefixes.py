"""Keys and values of prompts that were read, for those that begin alike: another question, or a chat's next turn."""

import numpy as np

REUSED = 128  # positions: a shorter beginning is read again, which takes no longer than to look it up and copy it


class Prefixes:
    """The beginnings that are kept on the device, least lately used first.

    Attributes:
      most_bytes: what they may take.
    """

    def __init__(self, most_bytes):
        self.most_bytes = most_bytes
        self._kept = []  # (key [n] int64, (k, v) [L, 1, N, size, d])

    def find(self, key):
        """The longest kept beginning of a prompt.

        Args:
          key: `[n]` int64, equal where positions of two prompts hold the same.

        Returns:
          Positions that it covers, always fewer than n as the last one is to be read, and its keys and values; 0 and
          None if there is none of `REUSED` positions or more.
        """
        lengths = [_alike(key[:-1], other) for other, _ in self._kept]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if best is None or lengths[best] < REUSED:
            return 0, None
        self._kept.append(self._kept.pop(best))
        return lengths[best], self._kept[-1][1]

    def keep(self, key, keys_values):
        """Keeps a prompt's `[L, 1, N, size, d]`; beginnings of it that were kept before go, as it holds them too."""
        if len(key) < REUSED:
            return
        self._kept = [kept for kept in self._kept if _alike(key, kept[0]) < len(kept[0])]
        self._kept.append((key, keys_values))
        while len(self._kept) > 1 and sum(_bytes(of) for _, of in self._kept) > self.most_bytes:
            self._kept.pop(0)
        if _bytes(keys_values) > self.most_bytes:
            self._kept.clear()


def begin(key) -> bytes | None:
    """What prompts with a beginning in common share that is worth keeping; None for one that is too short."""
    return key[:REUSED].tobytes() if len(key) > REUSED else None


def _alike(a, b) -> int:
    """Positions at the start of two prompts that hold the same."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _bytes(keys_values):
    return sum(x.nbytes for x in keys_values)
