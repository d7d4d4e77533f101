"""Several canvases in one run: pictures of like shape share a step, and each canvas is compiled once."""

import io
import shutil
import types

import numpy as np
import pytest
from PIL import Image

import lmm_jax as lmm
from lmm_jax.config import ConfigError
from lmm_jax.data.prepare import datasets, folder
from lmm_jax.training.plan import make_plan
from tests.opened import open_packs

CANVASES = "data.canvases=((24,24),(24,48),(48,24))"
SHAPES = ((24, 24), (48, 24), (30, 60), (40, 24))  # width, height
RECORDS = 42


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory):
    """Squares, wide and tall pictures of one colour, and one record in seven without a picture."""

    def records(source, split, rows):
        for n in range(rows):
            colour, picture = ("red", "green", "blue")[n % 3], io.BytesIO()
            Image.new("RGB", SHAPES[n % len(SHAPES)], colour).save(picture, "png")
            shows = n % 7 > 0
            asked = {"role": "user", "text": "<image>\ncolour" if shows else "say blue", "kind": ""}
            said = {"role": "assistant", "text": colour if shows else "blue", "kind": ""}
            yield {"id": f"{split}-{n}", "images": [picture.getvalue()] if shows else [], "turns": [asked, said]}

    shapes = types.SimpleNamespace(ROWS={"train": RECORDS, "test": 4}, check=lambda source: [], records=records)
    out = tmp_path_factory.mktemp("shapes") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets.DATASETS, "shapes", shapes)
        folder.prepare_dataset("shapes", out)
    return out


@pytest.fixture
def config(tiny, shapes_folder):
    """`config(*overrides)`: the hybrid over these pictures at their own aspect ratios."""

    def make(*overrides):
        small = ("data.aspect=own", CANVASES, f"data.path={shapes_folder}", "train.batch_size=8", "data.rows=1")
        return tiny(*small, *overrides, recipe="hybrid")

    return make


def test_the_packs_of_a_step_have_one_canvas_and_no_record_is_lost_or_read_twice(config):
    packs = open_packs(config(), "train", 8, shuffle=True)
    end = packs.stream._end(0)
    assert end % 8 == 0
    seen, canvases = [], set()
    for step in range(end // 8):
        of_step = [packs[step * 8 + n] for n in range(8)]
        shapes = {pack["pixels"].shape for pack in of_step if "pixels" in pack}
        assert len(shapes) <= 1
        canvases |= {shape[1:3] for shape in shapes}
        seen += [int(number) for pack in of_step for number in pack["record_index"]]
    assert canvases == {(24, 24), (24, 48), (48, 24)} and sorted(seen) == list(range(RECORDS))
    for position in range(end):  # and each picture stands on a canvas that shows all of it
        for dataset, record in packs.members(position):
            layout = packs.layout_at(position).visual
            for size in packs.sizes(dataset, record):
                assert min(layout.extents([size])[0]) == 24, size


def test_records_without_pictures_go_where_most_are(config):
    (dataset,) = open_packs(config(), "train", 8, shuffle=True).datasets
    counts = dataset.counts
    with_pictures = counts.bucket[counts.pictures > 0]
    assert set(counts.bucket[counts.pictures == 0]) == {np.bincount(with_pictures).argmax()}
    assert (counts.views[counts.pictures == 0] == 0).all()


SETTINGS = ("train.save_every=4", "train.log_every=1", "data.max_left_out=1.0")


@pytest.fixture(scope="module")
def trained(tiny, shapes_folder, tmp_path_factory):
    """A workdir of four steps over three canvases."""
    workdir = tmp_path_factory.mktemp("canvases") / "run"
    small = ("data.aspect=own", CANVASES, f"data.path={shapes_folder}", "train.batch_size=8", "data.rows=1")
    lmm.train(tiny(*small, *SETTINGS, "train.steps=4", recipe="hybrid"), workdir)
    return workdir


@pytest.mark.long
def test_a_run_over_several_canvases_goes_on(config, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    longer = config("train.steps=6", *SETTINGS)
    assert make_plan(longer, tmp_path / "run").step == 4  # the stream is the one that was saved
    assert lmm.train(longer, tmp_path / "run")["step"] == 6


def test_a_model_of_several_canvases_answers_on_each(trained):
    model = lmm.load(trained)
    alone = [Image.new("RGB", size, "red") for size in SHAPES]
    answers = model.generate([[picture] for picture in alone], ["colour"] * len(alone), max_new_tokens=4)
    assert answers == [model.generate([picture], "colour", max_new_tokens=4) for picture in alone]
    assert model.visual_tokens(alone[:1]) < model.visual_tokens(alone[1:2])  # a wide one has more of them
    together = model.visual_tokens(alone[:2])
    assert together == model.visual_tokens(alone[:1]) + model.visual_tokens(alone[1:2])
    # Two of one prompt share a canvas, on which the square is what it is alone.
    (query,) = [model.batch(alone[:2], "<image> and <image>")]
    assert query["pixels"].shape[-3:-1] == (24, 48)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.canvas=(24,24)",), "set one of both"),
        (("data.canvases=((24,24),(24,30))",), "multiples of"),
        (("data.canvases=((24,24),(8,24))",), "not below model.vision.image_size"),
        (("data.aspect=pad",), "go with data.aspect='own'"),
    ],
)
def test_canvases_that_cannot_be_are_refused(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)
