"""The page of the oracle, read by a parser of HTML as a browser reads it."""

import dataclasses
import re
import types

import numpy as np
import pytest
from PIL import Image

from lmm_jax.evaluation import oracle, statistics
from lmm_jax.evaluation.tasks import Example
from lmm_jax.tools import oracle_page
from tests.evaluation.made import runs
from tests.tools.test_batch_page import FORGED, Page

SCALES = (1, 4, 9, 36)
AUTO = {
    "fixed": [{"scale": s, "tokens": s, "accuracy": a, "seconds": 0.1 * s} for s, a in ((1, 0.4), (9, 0.6))],
    "oracle": [{"tokens": 1.0, "accuracy": 0.4}, {"tokens": 3.0, "accuracy": 0.8}],
    "cascade": [{"tokens": 1.5, "accuracy": 0.5, "seconds": 0.2}, {"tokens": 7, "accuracy": 0.6, "seconds": 0.4}],
    "router": [{"tokens": 1.2, "accuracy": 0.5}],
    "chosen": {
        "cascade": {"tokens": 7, "accuracy": 0.6, "low": 0.55, "high": 0.65, "seconds": 0.4},
        "router": {
            "tokens": 1.2,
            "accuracy": 0.5,
            "kinds": {"<a>": {"tokens": 1.0, "accuracy": 0.4}, "b": {"tokens": 3.0, "accuracy": 0.7}},
        },
    },
    "tokens_at": {"cascade": {"9": 7.0}, "router": {"9": float("inf")}},
    "gap_closed": {"cascade": 0.512, "router": float("nan")},
    "calibration": {"cascade": 0.0213, "router": 0.034},
}


def made(scores, kinds=None, images=None, **other):
    scores = np.asarray(scores, float)
    images = images or [(Image.new("RGB", (24, 24)),) for _ in range(scores.shape[1])]
    examples = [Example(of, "?", ("yes",), "cell") for of in images]
    found = runs(scores, SCALES[: len(scores)], kinds, **other)
    pictures = statistics.of_one_picture(examples).tolist()
    found = {
        s: [dataclasses.replace(r, picture=p) for r, p in zip(of, pictures, strict=True)] for s, of in found.items()
    }
    return found, [types.SimpleNamespace(example=example) for example in examples]


def page(path, found, auto=None, title="digits, split test"):
    assert oracle_page.write(str(path), title, *found, auto) == str(path)
    text = path.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert "<script" not in text and not re.search(r"(src|href)=.http|url\(|@import", text)
    return Page(text).open[0]


def section(root, name):
    (found,) = (s for s in root.all("section") if s.attributes["id"] == name)
    return found


def rows(table):
    return [[cell.text for cell in (*row.all("th"), *row.all("td"))] for row in table.all("tr")]


def test_the_page_says_what_the_oracle_says(tmp_path):
    rng = np.random.default_rng(0)
    kinds = rng.choice(["a", "b"], 60).tolist()
    found = made(rng.random((4, 60)) < np.array([0.3, 0.5, 0.7, 0.8])[:, None], kinds)
    root, of = page(tmp_path / "page.html", found), oracle.find_oracle(found[0])
    ids = [s.attributes["id"] for s in root.all("section")]
    assert ids == ["budgets", "kinds", "needs", "falls", "pictures", "calibration"]
    assert [a.attributes["href"] for nav in root.all("nav") for a in nav.all("a")] == [f"#{name}" for name in ids]
    assert "60 questions about 60 pictures were each answered with 1, 4, 9 and 36 visual tokens" in root.text
    assert f"{of.accuracy:.1%}".replace("%", " %") in next(root.all(".tiles")).text
    table = rows(next(section(root, "budgets").all("table")))
    assert [row[0] for row in table] == ["budget", "1", "4", "9", "36"]
    scores = [record.score for record in found[0]["9"]]
    accuracy, low, high = (f"{100 * value:.1f} %" for value in statistics.mean_interval(scores))
    assert table[3][1:3] == [accuracy, f"{low} to {high}"] and table[4][4] == f"{of.tokens:.2f}"
    assert [figure.text[:1] for figure in section(root, "kinds").all("figure")] == ["a", "b"]
    shares = rows(next(section(root, "needs").all("table")))
    assert [row[1] for row in shares[1:5]] == [f"{100 * share:.1f} %" for share in of.share]
    words = [dt.text for dt in root.all("dt")]
    assert {"budget", "oracle", "fell", "interval", "visual tokens"} <= set(words)


def test_what_strangers_wrote_stays_text(tmp_path):
    other = {"question": FORGED, "answer": FORGED, "truths": (FORGED,), "reason": "length"}
    images = [("missing/<script>.png",)] * 3
    kinds = [FORGED + "\ud800", FORGED + "\u202e", "c"]
    root = page(tmp_path / "page.html", made(np.eye(4)[:, :3], kinds, images, **other), title=FORGED + "\ud800")
    assert next(root.all("h1")).text == "How many visual tokens do these questions need?"
    assert next(root.all("title")).text.startswith(FORGED) and FORGED in next(root.all(".of")).text
    cells = [cell.text for cell in section(root, "pictures").all("td")]
    assert FORGED in cells and any(FORGED in cell and "cut off" in cell for cell in cells)
    assert "U+202E" in section(root, "kinds").text and "\u202e" not in "".join(f.text for f in root.all("figure"))
    assert "not shown: " in section(root, "pictures").text


def test_long_texts_are_cut_and_many_kinds_and_questions_are_counted(tmp_path):
    kinds = [f"kind {n:03}" for n in range(150)]
    picture = (Image.new("RGB", (9, 9)),)
    found = made(np.ones((2, 150)), kinds, [picture] * 150, answer="long " * 1000)
    root = page(tmp_path / "page.html", found)
    assert "(5,000 characters)" in root.text and (tmp_path / "page.html").stat().st_size < 300_000
    assert "138 kinds with fewer questions are not drawn" in section(root, "kinds").text
    assert "50 kinds with fewer questions are not listed" in section(root, "kinds").text
    assert "144 questions about it are not shown" in section(root, "pictures").text
    assert "150 questions about 1 picture " in root.text


def test_pictures_are_sorted_by_what_their_questions_need_and_only_those_shown_are_opened(tmp_path, monkeypatch):
    # Pictures 0 … 9 of right answers at 1 token, 10 … 19 only at 36, 20 … 29 never.
    scores = np.zeros((4, 30))
    scores[:, :10], scores[3, 10:20] = 1, 1
    opened = []
    monkeypatch.setattr(
        oracle_page, "open_picture", lambda image: opened.append(image) or Image.new("RGB", (500, 250))
    )
    root = page(tmp_path / "page.html", made(scores, images=[(f"{n}.png",) for n in range(30)]))
    numbers = [int(name.split(".")[0]) for name in opened]
    assert [number // 10 for number in numbers] == [0] * 5 + [1] * 5 + [2] * 5 and len(set(numbers)) == 15
    cards = list(section(root, "pictures").all(".card"))
    marks = [[td.text[0] for td in card.all("td")][2:] for card in cards[::5]]
    assert marks == [["✓"] * 4, ["✗", "✗", "✗", "✓"], ["✗"] * 4]
    assert "1 of 1 question right at some budget, with 36.0 tokens on average" in cards[5].text


def test_what_falls_is_marked_with_samples(tmp_path):
    scores = np.ones((4, 200))
    scores[3, :60] = 0
    scores[0, 60:90] = 0
    falls = section(page(tmp_path / "page.html", made(scores, ["a"] * 100 + ["b"] * 100)), "falls")
    assert "60 of 200 questions (30.0 %) fell" in falls.text and "30 (15.0 %) did the opposite" in falls.text
    table = rows(next(falls.all(".numbers")))
    assert [row[:3] for row in table[1:]] == [["all questions", "200", "4 → 36"], ["a", "100", "4 → 36"]]
    assert table[1][5] == "p < 0.001"
    cards = list(falls.all(".card"))
    assert len(cards) == oracle_page.FALLEN
    assert [td.text[0] for td in cards[0].all("td")] == ["✓", "✓", "✓", "✗"]
    level = section(page(tmp_path / "page.html", made(np.ones((4, 9)))), "falls")
    assert "No kind of question falls" in level.text and not list(level.all(".card"))


def test_ways_of_choosing_a_budget_are_drawn_in_tokens_and_in_seconds(tmp_path):
    auto = section(page(tmp_path / "page.html", made(np.ones((2, 9))), AUTO), "auto")
    tokens, seconds = auto.all("figure")
    titles = [[title.text for title in panel.all("title")] for panel in (tokens, seconds)]
    assert "cascade: 7.00 tokens, 60.0 %, 0.4 s" in titles[0] and "router: 1.20 tokens, 50.0 %" in titles[0]
    assert "fixed budget 9: 9.00 tokens, 60.0 %, 0.9 s" in titles[1]
    assert not any("router" in title or "oracle" in title for title in titles[1])  # no seconds are known of them
    assert sum("chosen, " in title for title in titles[0]) == 2
    first, as_good, kinds = auto.all("table")
    assert rows(as_good) == [["tokens to be as accurate as", "fixed 9"], ["cascade", "7.00"], ["router", "never"]]
    assert rows(kinds)[1:] == [["<a>", "–", "–", "1.00", "40.0 %"], ["b", "–", "–", "3.00", "70.0 %"]]
    table = {row[0]: row[1:] for row in rows(first)}
    assert table["cascade"] == ["7.00", "60.0 %", "0.4", "51.2 %", "0.021"]
    assert table["router"] == ["1.20", "50.0 %", "–", "–", "0.034"]
    assert table["oracle"][:2] == ["3.00", "80.0 %"]


def test_answers_at_chosen_budgets_are_a_point_of_their_own(tmp_path):
    found, questions = made([[0, 1], [1, 1]])
    found["auto"] = [dataclasses.replace(record, visual_tokens=5) for record in found["4"]]
    budgets = section(page(tmp_path / "page.html", (found, questions)), "budgets")
    assert any("auto: 5.00 tokens, 100.0 %" in title.text for title in budgets.all("title"))


def test_a_single_budget_questions_without_pictures_and_scores_in_part_have_their_page(tmp_path):
    root = page(tmp_path / "page.html", made([[0.5]], images=[()]))
    assert [s.attributes["id"] for s in root.all("section")] == ["budgets", "needs", "calibration"]
    root = page(tmp_path / "page.html", made([[0.25], [0.5]]))
    assert "0.25" in [b.text for b in section(root, "pictures").all("b")]
    assert "Some answers score in part" in section(root, "calibration").text


def test_what_is_no_set_of_runs_is_refused_before_anything_is_written(tmp_path):
    found, questions = made(np.ones((2, 3)))
    with pytest.raises(ValueError, match="2 questions do not go with 3 answers"):
        oracle_page.write(tmp_path / "page.html", "", found, questions[:2])
    unscored = {scale: [dataclasses.replace(r, score=None) for r in of] for scale, of in found.items()}
    with pytest.raises(ValueError, match="no score of their own"):
        oracle_page.write(tmp_path / "page.html", "", unscored, questions)
    assert not (tmp_path / "page.html").exists()
