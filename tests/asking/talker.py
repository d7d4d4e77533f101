"""A model that says what it is asked and shown, a word at a time."""

import time

from lmm_jax.generation.arguments import read_flag, read_number
from lmm_jax.generation.chat import Chat


class Talker:
    """What `Terminal` asks of a `Model`. A question that ends in "fail" is refused, "bug" is a fault."""

    scales = (1, 9)

    def __init__(self, pause=0.0, auto=None):
        self.pause, self.auto = pause, auto  # seconds, after each word; whether it chooses a scale

    def check_budget(self, scale):
        if scale == "auto" and self.auto:
            return scale
        return 9 if scale in (None, 9) else read_number("scale", scale, "valid scales are [1, 9]", 1, 1)

    def visual_tokens(self, images, scale):
        return len(images) * scale

    def chat(self, system, **options):
        return Chat(self, system, **options)

    def stream(self, images, prompt, scale):
        *_, question = prompt[-1]["content"].split()
        if question == "fail":
            read_flag("this", question)
        if question == "bug":
            raise RuntimeError("a fault")
        for word in (f"{len(prompt)} turns, {len(images)} pictures at {scale}:", *question.split("-")):
            yield f"{word} "
            time.sleep(self.pause)
