"""One question at several numbers of visual tokens: the answers as they come, with what each took."""

import dataclasses
import html
import time

from lmm_jax.generation.model import AUTO, NEW_TOKENS

PAUSE = 0.05  # seconds between two looks at an answer that is being written
MOST_NEW_TOKENS = f"{NEW_TOKENS}, or as many as the model's length leaves"  # where nothing else is asked for


@dataclasses.dataclass
class Column:
    """The answer at one number of visual tokens.

    Attributes:
      scale: visual tokens of a square view, or "auto", where the model chooses.
      trained: whether the model was trained at it.
      tokens: visual tokens of the picture in the sequence; 0 without one. Of "auto" those of all scales that were
        tried, None until the answer is there.
      text: what has been said so far; or, if it was refused, why.
      first, seconds: until its first piece came and until it ended, counted from its own start; None until then.
      state: "waiting", "writing", "done" or "refused".
      chosen: the scale that "auto" ended at; None until then, and of other scales.
    """

    scale: int | str
    trained: bool
    tokens: int | None
    text: str = ""
    first: float | None = None
    seconds: float | None = None
    state: str = "waiting"
    chosen: int | None = None


def answer(model, picture, question, scales, max_new_tokens=None, temperature=0.0, seed=0):
    """Asks a question at several numbers of visual tokens, one after the other, so that none slows another down.

    Args:
      model: that `lmm.load` returned.
      picture: its path, or None.
      question: str.
      scales: of a square view, each asked once, ascending; "auto" comes last.
      max_new_tokens, temperature, seed: see `Model.generate`.

    Yields:
      the list of `Column`s, the same each time, whenever one of them has changed.

    Raises:
      ValueError, OSError: what is wrong with the picture or the question at every scale. What is wrong at one of
        them, such as that the prompt is too long, stands in its column.
    """
    images = [] if picture is None else [picture]
    columns = [
        Column(scale, scale in model.scales, model.visual_tokens(images, scale) if images else 0)
        for scale in sorted(set(scales) - {AUTO})
    ]
    columns += [Column(AUTO, True, None)] if AUTO in scales else []
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for column in columns:
        begin = shown = time.monotonic()
        column.state = "writing"
        yield columns
        try:
            pieces = model.stream(images, question, scale=column.scale, **options)
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    if column.scale == AUTO:
                        column.tokens, column.chosen = end.value.visual_tokens, end.value.scale
                    break
                now = time.monotonic()
                column.text += piece
                if column.first is None:
                    column.first = now - begin
                elif now - shown < PAUSE:
                    continue
                shown = now
                yield columns
            column.state = "done"
        except (ValueError, OSError) as error:
            column.state, column.text = "refused", str(error)
        column.seconds = time.monotonic() - begin
        yield columns


def read_options(max_new_tokens, temperature, seed) -> dict:
    """The options of `answer` from fields of a page, where a number is a float and an empty one None or 0."""
    return {
        "max_new_tokens": int(max_new_tokens) if max_new_tokens else None,
        "temperature": float(temperature or 0),
        "seed": int(seed or 0),
    }


def draw_columns(columns) -> str:
    """`Column`s side by side, as HTML."""
    return f'<div class="columns">{"".join(map(_card, columns))}</div>'


def _card(column):
    title, told = "auto", []
    if column.tokens is not None:
        title = html.escape(f"{column.tokens:,} visual token{'' if column.tokens == 1 else 's'}")
    if column.chosen is not None:
        told = [f"auto, ends at {column.chosen:,}"]
    elif column.scale != AUTO and column.tokens != column.scale:
        told = [f"scale {column.scale:,}"]
    told += [] if column.trained else ["not trained"]
    cursor = '<span class="cursor"></span>' if column.state == "writing" else ""
    words = {"waiting": "waits for its turn", "writing": "", "done": "(it said nothing)", "refused": ""}
    said = html.escape(column.text) or f'<span class="quiet">{words[column.state]}</span>'
    first = "–" if column.first is None else f"{column.first:.2f} s"
    seconds = "–" if column.seconds is None or column.state == "refused" else f"{column.seconds:.2f} s"
    return (
        f'<section class="card {column.state}" data-scale="{column.scale}"><h3>{title}'
        f"<small>{', '.join(told)}</small></h3>"
        f'<p class="said">{said}{cursor}</p>'
        f"<dl><dt>first piece</dt><dd>{first}</dd><dt>in all</dt><dd>{seconds}</dd></dl></section>"
    )
