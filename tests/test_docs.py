"""What people read: links lead somewhere, files exist, commands are real, and drawings show what the code does."""

import functools
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from lmm_jax.config import load_config, visual_layout
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.packing import Capacity
from lmm_jax.data.prepared import Prepared

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("configs", "launch", "lmm_jax")
PAGES = sorted([*ROOT.glob("*.md"), *(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))])
PAGES += [page for page in (ROOT / "tests/README.md",) if page.exists()]
of_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page):
    """Lines of code that begin with a command of ours, without comments."""
    lines = re.findall(
        r"^ *((?:lmm|launch/|python -m lmm_jax|[A-Z]+=\S+ .*launch/).*)$", page.read_text(), re.MULTILINE
    )
    return [shlex.split(line, comments=True) for line in lines]


@functools.cache
def usage(verb):
    done = subprocess.run([sys.executable, "-m", "lmm_jax", verb, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"lmm {verb}: {done.stderr}"
    return done.stdout


def anchors(page):
    """What a link may name behind `#`, as GitHub derives it from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_room_has_a_page_or_a_line_in_the_map():
    text = (ROOT / "lmm_jax/README.md").read_text()
    for path in (ROOT / "lmm_jax").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"| `{path.name}/` |" in text, path.name
        elif path.suffix == ".py" and not path.name.startswith("__"):
            assert f"| `{path.name}` |" in text, path.name


@of_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            found = found / "README.md" if found.is_dir() else found
            assert anchor in anchors(found), target


@of_page
def test_files_that_are_named_exist(page):
    for name in re.findall(r"(?<![\w/.])[\w][\w/]*\.(?:py|sh|ipynb)\b", page.read_text()):
        places = (ROOT, page.parent, ROOT / "lmm_jax", ROOT / "configs")
        assert any((place / name).exists() for place in places), name


@of_page
def test_commands_name_real_verbs_flags_and_configs(page, digits_folder):
    for words in commands(page):
        if "lmm" in words:
            _, verb, *words = words[words.index("lmm") :]
            for flag in (w for w in words if w.startswith("--") and not w.startswith("--config.")):
                assert flag.split("=")[0] in usage(verb), (verb, flag)
        if "--config" in words:
            overrides = [w.removeprefix("--config.") for w in words if w.startswith("--config.")]
            named = words[words.index("--config") + 1]
            if "own.py" in named:  # which reads the folder that it is given; the model's is not here
                named = re.sub(r"data=[^,]+", f"data={digits_folder}", re.sub(r",model=[^,]+", "", named))
            load_config(ROOT / named, *overrides)
        if words[:2] == ["python", "-m"]:
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists(), words


@of_page
def test_blocks_of_python_are_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")


def test_environment_variables_are_explained():
    text = (ROOT / "launch/README.md").read_text()
    for path in (ROOT / "lmm_jax").rglob("*.py"):
        for name in re.findall(r'"(LMM_\w+)"', path.read_text()):
            assert f"| `{name}` |" in text, name


def test_the_drawn_pack_is_what_the_code_gives(digits_folder):
    text = (ROOT / "lmm_jax/README.md").read_text()
    config = load_config(ROOT / "configs/digits.py", f"data.path={digits_folder}")
    layout = PackLayout.from_config(config, visual_layout(config), Capacity(rows=1, length=120, views=1, targets=40))
    (picture,) = layout.place([(24, 24)])
    slots = {scale: layout.slots(picture, scale) for scale in layout.scales}
    assert layout.newline == 50 and "P = 50 slots" in text
    for scale, (first, last) in {1: (0, 0), 4: (1, 4), 9: (5, 13), 36: (14, 49)}.items():
        np.testing.assert_array_equal(slots[scale], np.arange(first, last + 1))
        assert re.search(rf"slots? +{first}{f' … {last}' if last > first else ''} +scale {scale}\n", text)

    tokenizer = Prepared(digits_folder, "train").tokenizer
    turns = [("user", "<image>\nread all"), ("assistant", "3 8 2 0 6 4 9 5 8")]
    small, large = layout.training_segments(turns, [(24, 24)], tokenizer, (1, 9))
    pack = layout.assemble([large, small], [((24, 24), None)], [0, 0])
    segment, slot, position = (pack[name][0] for name in ("segment", "slot", "position"))
    assert [(segment == n).nonzero()[0][[0, -1]].tolist() for n in (1, 2, 0)] == [[0, 21], [22, 35], [36, 119]]
    assert slot[:24].tolist() == [-1, *range(5, 14), *[-1] * 13, 0] and (slot[24:] == -1).all()
    assert position[[0, 21, 22, 35]].tolist() == [0, 21, 0, 13]
    used = pack["group"] > 0
    assert pack["target_at"][used].tolist() == [*range(11, 21), *range(25, 35)]
    assert pack["group"][used].tolist() == [4] * 10 + [1] * 10
    assert [tokenizer.piece(i) for i in pack["target"][:10].tolist()] == [*(f"▁{n}" for n in "382064958"), "</s>"]


def test_the_drawn_stacks_are_what_the_code_gives():
    text = (ROOT / "lmm_jax/README.md").read_text()
    config = load_config(ROOT / "configs/digits.py:recipe=deepstack")
    visual = visual_layout(config)
    gather = visual.gather(visual.tiling(24, 24))
    assert gather.shape == (5, 1, 3, 3) and tuple(config.model.decoder.inject_layers) == (0, 1, 2, 3)
    begin = text.index("bank          stack 0")
    drawn = [list(map(int, line.split())) for line in text[begin:].splitlines()[1:4]]
    np.testing.assert_array_equal(gather[:, 0].swapaxes(0, 1).reshape(3, 15), drawn)
