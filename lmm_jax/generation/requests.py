"""A prompt on its way to an answer: what it holds at each position, and what has come of it so far."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lmm_jax.generation.arguments import Sampling
from lmm_jax.generation.pictures import Picture
from lmm_jax.generation.text import TextStream

MOST = 2**21  # numbers of pictures, scales and tokens of a picture stay below it, so that keys are different


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation laid out at one budget.

    Attributes:
      name: what to call it in a message.
      id: `[n]` int32 token ids, 0 under visual tokens.
      slot: `[n]` int32, -1 for text; see `PackLayout.slots`, of a pack that holds this prompt alone at this scale
        alone. Of pictures with a canvas of their own those slots alone are counted that show them.
      position: `[n]` or `[n, 3]` int, see `segments.positions`.
      newline: slot of the newline.
      pictures: in order.
      tokens: slots that each picture has, of those that are counted.
      scale: visual tokens of a square view.
      blend: of a layout that shrinks, as `Segment.blend`; else None.
    """

    name: str
    id: np.ndarray
    slot: np.ndarray
    position: np.ndarray
    newline: int
    pictures: tuple[Picture, ...]
    tokens: tuple[int, ...]
    scale: int
    blend: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self):
        return len(self.id)

    @property
    def following(self) -> int:
        """Number of the position behind it."""
        return int(self.position.max()) + 1

    @property
    def visual(self) -> int:
        """Positions that its pictures take."""
        return int((self.slot >= 0).sum())

    def key(self, number) -> np.ndarray:
        """`[n]` int64, equal where two prompts hold the same text or the same part of the same picture.

        Args:
          number: what numbers `Picture`s so that equal ones share a number.
        """
        key = self.id.astype(np.int64)
        at = self.slot >= 0
        if at.any():
            ends = np.cumsum(self.tokens)
            which = np.searchsorted(ends, self.slot[at], side="right")
            cell = self.slot[at] - (ends - self.tokens)[np.minimum(which, len(ends) - 1)]
            of = np.array([number(picture) for picture in self.pictures], np.int64)[np.minimum(which, len(ends) - 1)]
            visual = -2 - ((of * MOST + self.scale) * MOST + cell)
            key[at] = np.where(self.slot[at] == self.newline, -1, visual)
        return key


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt that waits for its answer, or is being answered.

    Attributes:
      prompt: `Prompt`.
      limit: tokens that the answer may have.
      sampling: `Sampling`.
      text: `TextStream` of the answer.
      eager: whether somebody reads the answer as it comes.
      asked_again: whether other questions about the same are to be expected, so that what was read is kept.
      ids, logprobs: of the answer so far.
      end: log-probability of its end, once the model has ended it.
      piece: text of the answer that nobody has taken yet.
      news: whether something came of it that nobody was told yet.
      reason: why the answer ended, see `Answer`; "" until then.
      error: what ended it instead.
      climb: what is asked next, at more visual tokens, if the answer is not good enough: a function of this request
        that gives a `Request`, or None if the answer will do; None where nothing else would be asked.
      then: what `climb` gave, whose answer counts instead.
    """

    prompt: Prompt
    limit: int
    sampling: Sampling
    text: TextStream
    eager: bool = False
    asked_again: bool = False
    ids: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    piece: str = ""
    news: bool = False
    reason: str = ""
    error: Exception | None = None
    end: float = 0.0
    climb: Callable[["Request"], "Request | None"] | None = None
    then: "Request | None" = None

    @property
    def positions(self) -> int:
        """Positions that prompt and answer may take."""
        return len(self.prompt) + self.limit

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.reason) or self.error is not None

    def take(self, ids, logprobs, end):
        """Takes new ids of the answer, of which the last may be `end`, and their log-probabilities; lists."""
        self.news = True
        if ids and ids[-1] == end:
            self.reason = "end"
            self.end = float(logprobs[-1])
            ids = ids[:-1]
        stop = next((n for n, i in enumerate(ids) if i in self.sampling.stop_ids), None)
        if stop is not None:
            self.reason, self.end = "stop", 0.0
            ids = ids[:stop]
        self.ids += ids
        self.logprobs += logprobs[: len(ids)]
        self.piece += self.text.add(ids)
        if not self.reason and len(self.ids) >= self.limit:
            self.reason = "length"
        if self.reason:
            self.piece += self.text.finish()
        if self.text.ended:
            self.reason, self.end = "stop", 0.0
            del self.ids[self.text.count :], self.logprobs[self.text.count :]

    def fail(self, error):
        """Ends it with an error, which whoever asked is told."""
        self.error, self.news = error, True
