"""The text of an answer while its ids come: whole characters, up to the first stop text."""

UNFINISHED = "\ufffd"  # what decoding shows of bytes that are no character, or not one yet

STEP = 32  # ids that are decoded at a time
WINDOW = 48  # ids that are decoded again each time, before the oldest of them are let go
CONTEXT = 16  # ids that are kept of them; their text says how the next one goes on


class TextStream:
    """Turns the ids of one answer into pieces of its text, as soon as each can be known.

    Joined, the pieces are `tokenizer.decode` of all ids, cut where the earliest stop text begins, however the ids
    were divided among calls of `add`. Two ends of the text wait for what comes next:

    - bytes that may become a character. A tokenizer decodes them as U+FFFD until they do;
    - characters that may become a stop text. Where one stop text lies inside of another that began earlier ("b" in
      "abc"), it waits too, since the other would end the text sooner.

    What is asked of a tokenizer: the text of some ids is the beginning of the text of these and more, except for
    U+FFFDs at its end; and behind some text, what an id adds does not depend on ids far before it.

    Attributes:
      ended: whether a stop text was found. All further ids are ignored.
    """

    def __init__(self, tokenizer, stop_texts=()):
        """`stop_texts`: a sequence of str, none of them empty."""
        self._decode, self._stops = tokenizer.decode, tuple(stop_texts)
        self._longest = max(map(len, self._stops), default=0)
        self._dropped = 0  # ids that are no longer decoded, as their text was shown
        self._ids = []  # those behind them
        self._shown = 0  # characters of their text that were shown
        self.ended = False

    @property
    def count(self) -> int:
        """How many of the ids belong to the text: all so far, or the fewest that spell it once it has `ended`.

        The last of the fewest may also spell the beginning of the stop text; no later one spells a part of the text.
        """
        return self._dropped + len(self._ids)

    def add(self, ids) -> str:
        """Takes the next ids, and returns the text that can now be shown, possibly ""."""
        ids, pieces = list(ids), []
        for first in range(0, len(ids), STEP):
            if not self.ended:
                self._ids += ids[first : first + STEP]
                pieces.append(self._next_piece(last=False))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, when no more ids come: what was held back, up to a stop text in it."""
        return "" if self.ended else self._next_piece(last=True)

    def _next_piece(self, last):
        text = self._decode(self._ids)
        known = text if last else text.rstrip(UNFINISHED)
        stop, begun = self._find_stop(known), len(known) if last else self._find_begun(known)
        self.ended = stop is not None and stop <= begun
        end = stop if self.ended else begun
        piece = known[self._shown : end]
        self._shown = max(self._shown, end)
        if self.ended:
            self._drop_all_behind(text[:end])
        elif self._shown == len(text) and len(self._ids) > WINDOW:
            self._drop_oldest()
        return piece

    def _find_stop(self, known):
        """Where the earliest stop text begins, None without one."""
        found = [at for at in (known.find(stop, self._shown) for stop in self._stops) if at >= 0]
        return min(found, default=None)

    def _find_begun(self, known):
        """Where the earliest stop text begins that `known` ends inside of; its length without one."""
        first = max(self._shown, len(known) - self._longest + 1)
        ends = (at for at in range(first, len(known)) if any(s.startswith(known[at:]) for s in self._stops))
        return next(ends, len(known))

    def _drop_all_behind(self, text):
        """Keeps the fewest ids that spell `text`."""
        count = next(n for n in range(len(self._ids) + 1) if self._decode(self._ids[:n]).startswith(text))
        self._ids = self._ids[:count]

    def _drop_oldest(self):
        """Keeps the newest ids alone, unless they spell nothing.

        Tokenizers leave out spaces at the beginning of a text, which these are not. A character that the cut divides
        does no harm: its end is decoded as U+FFFDs, which are as little shown again as what stands behind them.
        """
        newest = self._decode(self._ids[-CONTEXT:])
        if newest:
            self._dropped += len(self._ids) - CONTEXT
            self._ids, self._shown = self._ids[-CONTEXT:], len(newest)
