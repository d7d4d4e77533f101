"""What the page does with what a visitor gives it: functions of values that return HTML, without Gradio."""

import html
import os

from lmm_jax.config import visual_layout
from lmm_jax.data.images import open_picture
from lmm_jax.demo.answers import answer, draw_columns, read_options
from lmm_jax.demo.drawing import draw
from lmm_jax.demo.layer_map import draw_map, find_stacks, stack_label
from lmm_jax.demo.regions import figures
from lmm_jax.generation.model import AUTO

HINT = "Choose a picture, and what each visual token stands for is drawn over it here."


class Handlers:
    """The handlers of a page, all of which take and return what gradio's components hold.

    Attributes:
      model: that `lmm.load` returned.
      scales: every number of visual tokens that its pictures can have, ascending; trained or not.
    """

    def __init__(self, model):
        self.model = model
        self._visual = visual_layout(model.program.config).with_marks(model.tokenizer)
        self.scales = [scale for scale in self._visual.valid_scales if self._can_ask(scale)]

    def map(self) -> str:
        """The map of the model's layers."""
        return draw_map(self._visual, self.model.program.model)

    @property
    def compared(self) -> list[tuple[str, int | str]]:
        """What can be answered side by side: `(label, scale)`; "auto" if the model can choose."""
        auto = [(AUTO, AUTO)] if self.model.auto is not None else []
        return [*((self.label(scale), scale) for scale in self.scales), *auto]

    def label(self, scale) -> str:
        """A scale, with an asterisk if the model was not trained at it."""
        return f"{scale:,}{'' if scale in self.model.scales else '*'}"

    def ticks(self, place) -> str:
        """The scales under the slider, of which number `place` is chosen."""
        spans = []
        for number, scale in enumerate(self.scales):
            trained = scale in self.model.scales
            style = ' class="on"' if number == place else ""
            title = "trained" if trained else "not trained, but possible"
            spans.append(f'<span{style} title="{title}">{self.label(scale)}</span>')
        star = "" if set(self.scales) <= set(self.model.scales) else '<p class="note">* not trained</p>'
        return f'<div class="ticks">{"".join(spans)}</div>{star}'

    def show(self, picture, place) -> str:
        """The drawings over a picture at scale number `place`, or a sentence why it cannot be read.

        Args:
          picture: path of the upload, or None.
          place: number among `scales`; an int or a float, as sliders give it.
        """
        if picture is None:
            return f'<p class="note">{HINT}</p>'
        scale, vision = self.scales[int(place)], self.model.program.model.vision
        stacks = find_stacks(self._visual, self.model.program.model)
        try:
            opened = self._open(picture)
            drawn = figures(self._visual.holding([opened.size]), opened.size, scale, vision.level_strides)
            tokens = self.model.visual_tokens([opened], scale)
        except (ValueError, OSError) as error:
            return refusal(error)
        names = [stack_label(number, stacks) for number in range(len(stacks))]
        said = "".join(draw(opened, figure, names) for figure in drawn)
        size = "{:,} × {:,} pixels".format(*opened.size)
        return (
            f'<div class="drawings">{said}</div><p class="note" data-tokens="{tokens}">A picture of {size} becomes '
            f"{tokens:,} positions of the sequence at scale {scale:,}.</p>"
        )

    def ask(self, picture, question, place, compared, max_new_tokens, temperature, seed):
        """Answers at scale number `place` and at the scales in `compared`, as they come.

        Yields:
          HTML that takes the place of what was yielded before.
        """
        scales = {self.scales[int(place)], *(one if one == AUTO else int(one) for one in compared)}
        try:
            if picture is not None:
                self._open(picture)  # found here, damage is told once and not in every column
            options = read_options(max_new_tokens, temperature, seed)
            for columns in answer(self.model, picture, question, scales, **options):
                yield draw_columns(columns)
        except (ValueError, OSError) as error:
            yield refusal(error)

    def _can_ask(self, scale):
        try:
            self.model.check_scale(scale)
        except ValueError:
            return False
        return True

    def _open(self, picture):
        """The upload as a picture; ValueError says what is wrong with it, by the name that its visitor knows."""
        try:
            return open_picture(picture)
        except ValueError as error:
            raise ValueError(str(error).replace(str(picture), os.path.basename(picture))) from error


def refusal(error) -> str:
    """What was wrong, as a box of HTML."""
    return f'<p class="refusal" role="alert">{html.escape(str(error))}</p>'


def stopped(shown) -> str:
    """The answers of a page, HTML of `ask`, where they stand when their visitor wants no more."""
    shown = shown.replace('<span class="cursor"></span>', "").replace("card writing", "card stopped")
    return shown.replace("waits for its turn", "not asked")
