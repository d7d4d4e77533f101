"""The page of packs, read by a parser of HTML as a browser reads it."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

import lmm_jax as lmm
from lmm_jax.config import ConfigError
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import Prepared, as_turns
from lmm_jax.tools import batch_page
from tests.conftest import ROOT

DIGITS = f"{ROOT}/configs/digits.py"
VOID = {"meta", "br", "img"}
FORGED = '</div></details><script>alert(1)</script> & <b>bold</b> "quoted" it\'s'


class Element:
    """An element of a page, with the elements and texts in it."""

    def __init__(self, name, attributes):
        self.name, self.attributes, self.children = name, dict(attributes), []
        self.classes = (self.attributes.get("class") or "").split()

    def all(self, what):
        """All elements inside that have a name, or as ".name" a class; outermost first."""
        for child in self.children:
            if isinstance(child, Element):
                if what in (child.name, *(f".{c}" for c in child.classes)):
                    yield child
                yield from child.all(what)

    @property
    def text(self):
        return "".join(child.text if isinstance(child, Element) else child for child in self.children)


class Page(html.parser.HTMLParser):
    """A tree of the elements of a page; fails where an end tag does not match."""

    def __init__(self, text):
        super().__init__()
        self.open = [Element("page", {})]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"not closed: {[element.name for element in self.open[1:]]}"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs)
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().name == tag, f"</{tag}> at line {self.getpos()}"

    def handle_data(self, data):
        self.open[-1].children.append(data)


def page(config, path, count=1):
    assert batch_page.write_page(config, count, path) == str(path)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and not re.search(r"(src|href)=.http|url\((?!data:)|@import", text)
    return Page(text).open[0]


def texts(card, kind):
    """The blocks of a card: text "s" that is supervised, or "r" that is read; a ↵ is a sign of the page's own."""
    return [block.text.replace("↵", "") for block in card.all(".text") if kind in block.classes]


def test_a_page_of_digits_shows_rows_records_and_what_is_supervised(tiny, tmp_path, digits_folder):
    root, data = page(tiny(), tmp_path / "batch.html", 2), Prepared(digits_folder, "train")
    packs = list(root.all(".pack"))
    assert len(packs) == len(list(root.all(".row"))) == 2
    for pack in packs:
        cards = list(pack.all(".card"))
        assert cards and len(list(pack.all(".visual"))) == len(cards)  # digits have a picture a record
        for card in cards:
            record = int(re.search(r"record (\d+)", card.text)[1])
            turns = as_turns(data[record])
            asked, answered = ([t.text for t in turns if t.role == name] for name in ("user", "assistant"))
            assert data[record]["id"].decode() in card.text
            assert texts(card, "s") == [f" {answer}</s>" for answer in answered]
            assert [text.strip() for text in texts(card, "r")[1:]] == asked[1:]
            scale = int(re.search(r"loss of scale (\d+)", card.text)[1])
            (visual,) = card.all(".visual")
            assert f"{scale} token" in visual.text and len(list(visual.all(".thumb"))) == 1
    assert "64 records, 64 of them in the stream" in root.text


def test_every_picture_is_there_once_and_shown_where_it_is_used(tiny, tmp_path):
    root = page(tiny(), tmp_path / "batch.html", 2)
    (style,) = root.all("style")
    embedded = re.findall(r"\.(p\d+-\d+)\{background-image:url\(data:image/(?:png|jpeg);base64,", style.text)
    assert len(embedded) == len(set(embedded)) == len(list(root.all(".picture")))
    assert {thumb.classes[1] for thumb in root.all(".thumb")} == set(embedded)
    assert not list(root.all("img"))  # the whole picture is its only view


def test_text_wraps():
    style = batch_page.STYLE.read_text()
    assert "white-space: pre-wrap; overflow-wrap: anywhere" in style
    assert not re.search(r"white-space: (pre|nowrap)\b(?!-)", style)


def test_views_lie_on_the_page_as_in_the_picture(digits_folder, tmp_path):
    zoomed = ("data.sequence=grid", "data.stacks=zoom", "data.zoom=2", "data.views=50", "data.length=190")
    overrides = (*zoomed, "model.newline=True", "data.targets=100")
    root = page(lmm.load_config(f"{DIGITS}:recipe=deepstack,data={digits_folder}", *overrides), tmp_path / "b.html")
    first, second = root.all(".picture")
    assert [figure.text for figure in first.all("figure")] == [
        "whole pictureview 0",
        "2 × 2 tilesviews 1…4",
        "whole picture in 2 × 2views 5…8",
        "2 × 2 tiles, each in 2 × 2views 9…24",
    ]
    assert "24 × 24 pixels; grids 0…4" in first.text and "grids 5…9" in second.text and "view 25" in second.text
    assert "51 tokens6 newlines among themslots 0…44" in next(root.all(".visual")).text
    assert "4 stacks 'zoom', added before decoder layers 0, 1, 2, 3" in root.text


def test_a_mosaic_puts_views_where_they_lie():
    grey = np.arange(16, dtype=np.uint8) * 16
    views = np.broadcast_to(grey[:, None, None, None], (16, 50, 50, 3))  # 2 × 2 tiles in 2 × 2 each
    picture = np.asarray(batch_page._mosaic(views, (2, 2), 2))[:, :, 0]
    assert picture.shape == (200 + 2 + 2 + 6, 200 + 2 + 2 + 6)
    centres = [25, 77, 133, 185]
    tiles = np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    np.testing.assert_array_equal(picture[np.ix_(centres, centres)], tiles * 16)
    assert picture[25, 51] == picture[25, 104] == 255
    assert batch_page._mosaic(np.zeros((1, 900, 300, 3), np.uint8)).size == (66, 200)
    assert batch_page._mosaic(np.zeros((4, 6, 6, 3), np.uint8), (2, 2)).size == (98, 98)


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """Five rows: markup, many scripts, one that is cut, one too long even for that; one is refused."""
    folder = tmp_path_factory.mktemp("odd")
    Image.new("RGB", (24, 12), "red").save(folder / "red.png")

    def row(name, *turns, **more):
        said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"id": name, "conversations": said} | more

    rows = [
        row(FORGED, f"<image>\n{FORGED}?", f"{FORGED}!", image="red.png"),
        row("scripts", "漢字 ✓ 👩\u200d🚀?", "안녕 \u202eevil\u202c zero\u200bwidth\n\ttab"),
        row("cut", "one", "eins", "two", "zwei " * 400),
        row("too long", "one", "eins " * 400),
        row("missing", "<image>what?", "that", image="missing.png"),
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    prepare_rows(folder / "rows.json", folder, folder / "out", template="qa", workers=0, max_refused=1)
    return folder / "out"


@pytest.fixture
def odd(tiny, odd_folder):
    return tiny(
        f"data.path={odd_folder}",
        "data.length=400",
        "data.targets=800",
        "data.views=2",
        "data.rows=2",
        "data.too_long=cut",
    )


def cards_of(root, name):
    return [card for card in root.all(".card") if next(card.all(".id")).text == name]


def test_markup_in_a_record_is_only_text(odd, tmp_path):
    large, small = cards_of(page(odd, tmp_path / "batch.html"), FORGED)
    for card in (large, small):
        (read,), (said,) = texts(card, "r"), texts(card, "s")
        assert read.endswith(f"{FORGED}?") and said == f" {FORGED}!</s>"


def test_text_that_an_earlier_copy_has_shown_is_folded(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_page, "FOLDED", 1)
    large, small = cards_of(page(odd, tmp_path / "batch.html"), FORGED)
    assert not list(large.all("details"))
    (folded,) = small.all("details")
    scale = re.search(r"loss of (scale \d+)", large.text)[1]
    assert next(folded.all("summary")).text == f"the same text as in the copy of {scale}"
    assert texts(folded, "s") == texts(large, "s") and not list(folded.all(".visual"))
    assert "open" not in folded.attributes and list(small.all(".visual"))


def test_characters_of_several_tokens_are_whole_and_hidden_ones_are_named(odd, tmp_path):
    root = page(odd, tmp_path / "batch.html")
    (card,) = cards_of(root, "scripts")
    assert "漢字 ✓ 👩\u200d🚀?" in texts(card, "r")[0] and "text alone" in card.text
    assert texts(card, "s") == [" 안녕 U+202EevilU+202C zeroU+200Bwidth\n→\ttab</s>"]
    assert "<0x" not in card.text and "\N{REPLACEMENT CHARACTER}" not in card.text


def test_what_is_cut_or_left_out_is_said(odd, tmp_path):
    root = page(odd, tmp_path / "batch.html")
    (card,) = cards_of(root, "cut")
    assert [note.text for note in card.all(".note")] == ["cut to fit data.length=400: 1 of 2 answers kept"]
    assert texts(card, "s") == [" eins</s>"]
    (warned,) = [dd for dd in root.all("dd") if "left out" in dd.text]
    assert "1 of 4 records left out of the stream: longer than data.length=400 positions (record 3)" in warned.text
    assert "lmm train refuses to begin if more than data.max_left_out=0.05 is left out" in warned.text
    assert "1 row refused by lmm prepare: missing picture" in warned.text and "1 record cut" in root.text


def test_a_record_that_cannot_be_read_is_marked(odd, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("cannot read <it>")

    monkeypatch.setattr("lmm_jax.data.pipeline.open_picture", broken)
    root = page(odd, tmp_path / "batch.html")
    bad = [card for card in root.all(".card") if list(card.all(".bad"))]
    assert bad and all("replaced by padding: ValueError: cannot read <it>" in card.text for card in bad)
    assert not any(list(card.all(".text")) for card in bad) and "1 record replaced by padding" in root.text


def test_a_page_without_data_or_packs_is_refused(tiny, tmp_path):
    config = lmm.load_config(f"{ROOT}/configs/m3.py")
    with config.unlocked():
        config.data.path, config.data.mixture = None, ()
    with pytest.raises(ConfigError, match="'data.path' is not set"):
        batch_page.write_page(config, 1, tmp_path / "batch.html")
    with pytest.raises(ConfigError, match="got --packs 0"):
        batch_page.write_page(tiny(), 0, tmp_path / "batch.html")
    assert not list(tmp_path.iterdir())
