"""What `Model.generate` returns of a prompt where more than the text is asked for."""

import dataclasses

ENDED, STOPPED, FULL = REASONS = ("end", "stop", "length")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, with how likely the model thought it and why it ends.

    Attributes:
      text: what was said; a stop text is no part of it.
      ids: the ids that spell `text`, without those that end it. Where a stop text begins inside of an id, that id is
        the last.
      logprobs: for each id the natural logarithm of its probability, given all before it. It is the model's own: that
        before temperature, top-k, top-p and the repetition penalty.
      reason: of `REASONS`: "end" if the model ended the answer, "stop" if a stop text or a stop id did, "length" if
        `max_new_tokens` or the trained length left no room for more.
      prompt_positions: positions that the prompt took, pictures included.
      visual_tokens: how many of them were pictures'. Where a cascade chose the budget, of all that it tried.
      scale: visual tokens of a square view that it was given at.
      end: natural logarithm of the probability that it ends here; 0 where the model did not end it.

    Raises:
      ValueError: an unknown reason, or unlike numbers of ids and of logprobs.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str
    prompt_positions: int
    visual_tokens: int
    scale: int
    end: float = 0.0

    def __post_init__(self):
        if self.reason not in REASONS:
            raise ValueError(f"reason '{self.reason}' is none of {', '.join(REASONS)}")
        if len(self.ids) != len(self.logprobs):
            raise ValueError(f"{len(self.ids)} ids have {len(self.logprobs)} logprobs; each has one")
