"""What a visitor gives the page is drawn and asked, or refused in a sentence."""

import pytest
from PIL import Image

from lmm_jax.demo.handlers import HINT, Handlers, stopped
from tests.demo.asked import Asked


@pytest.fixture
def handlers():
    return Handlers(Asked("configs/digits.py"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (60, 36)).save(path)
    return str(path)


def test_all_scales_that_can_be_asked_are_offered():
    assert Handlers(Asked("configs/digits.py")).scales == [1, 4, 9, 36]
    untrained = Handlers(Asked("configs/digits.py:recipe=full,scale=9"))
    assert untrained.scales == [1, 4, 9, 36] and untrained.model.scales == (9,)
    ticks = untrained.ticks(1)
    assert ticks.count("*</span>") == 3 and "* not trained" in ticks and 'class="on" title="not trained' in ticks
    assert "not trained" not in Handlers(Asked("configs/digits.py")).ticks(0)


def test_a_picture_is_drawn_at_the_chosen_scale(handlers, picture):
    assert HINT in handlers.show(None, 0)
    for place, scale in enumerate(handlers.scales):
        shown = handlers.show(picture, float(place))  # sliders may give floats
        assert f'data-tokens="{scale}"' in shown and "60 × 36 pixels" in shown


def test_stacks_have_their_layers_in_the_legend(picture):
    handlers = Handlers(Asked("configs/digits.py:recipe=deepstack"))
    shown = handlers.show(picture, 1)
    assert "sample 3 of the tiles → decoder layer 3" in shown
    assert "sample 3 of the tiles" in handlers.map()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"<svg/>"])
def test_a_broken_upload_is_refused_by_its_name(handlers, tmp_path, content):
    path = tmp_path / "<broken>.png"
    path.write_bytes(content)
    for shown in (handlers.show(str(path), 0), *handlers.ask(str(path), "read all", 0, [], None, 0, 0)):
        assert "refusal" in shown and "cannot read a picture from &lt;broken&gt;.png" in shown
        assert str(tmp_path) not in shown
    assert handlers.model.calls == []


def test_a_picture_too_large_to_decode_is_refused(handlers, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_001, 4_000)).save(path)
    assert "20001 x 4000 pixels, more than 64 megapixels" in handlers.show(str(path), 0)


def test_the_slider_and_the_boxes_are_asked_together(handlers, picture):
    *_, last = handlers.ask(picture, "read all", 2, [1, 36], 5.0, 0.5, 7)
    options = {"max_new_tokens": 5, "temperature": 0.5, "seed": 7}
    assert handlers.model.calls == [(scale, options) for scale in (1, 9, 36)]
    assert last.count("six and two") == 3


def test_stopping_leaves_what_was_said(handlers, picture):
    asked = handlers.ask(picture, "read all", 2, [1, 36], None, 0, 0)
    shown = [next(asked), next(asked)][1]
    asked.close()
    left = stopped(shown)
    assert "six " in left and "cursor" not in left and left.count("not asked") == 2 and "waits" not in left
