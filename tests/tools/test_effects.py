"""The board of effects: rows from the runs that are there, every seed of them, and its picture."""

import json
import pathlib
import re

import numpy as np
import pytest

from lmm_jax.tools import effects, plots

ROOT = pathlib.Path(__file__).parents[2]
BOARD = ROOT / "configs/README.md"


def make_run(folder, scores, commit=None, seconds=None):
    """A run's folder: `{scale: {metric: value}}` of the digits, and 1,000 steps of so many seconds each."""
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"digits": scores}))
    if commit is not None:
        (folder / "commit").write_text(f"{commit}\n")
    if seconds is not None:
        logged = [{"step": step, "loss": 1.0, "seconds_per_step": seconds} for step in (500, 1000)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in logged))


def test_a_row_shows_every_seed_mean_spread_minutes_and_commit_of_the_runs_that_are_there(tmp_path):
    reads = (0.9, 0.94, 0.93, 0.95, 0.91)
    for seed, read in enumerate(reads):
        make_run(tmp_path / f"deepstack-{seed}", {"9": {"read": read}}, "abc1234", 0.1 * (seed + 1))
    found = effects.collect(tmp_path)
    assert [(row.run, [run.right for run in runs]) for row, runs in found] == [("deepstack", list(reads))]
    table = effects.table(effects.rows_of(found, "unused"))
    # 1,000 steps of 0.5 s, the slowest
    assert "| 9 | 0.926 | 0.900–0.950 | 0.900 0.940 0.930 0.950 0.910 | 5 | 8.3 | abc1234 | " in table
    assert effects.read_board(table) == [
        effects.Result("DeepStack", "DeepStack-L: its stacks added", 9, 0.926, 0.9, 0.95, reads)
    ]


def test_seeds_stand_in_their_order_and_another_run_s_name_is_not_taken(tmp_path):
    for seed in (10, 2, 1):
        make_run(tmp_path / f"m3-{seed}", {"1": {"read": seed / 100}})
    make_run(tmp_path / "m3_zip-1", {"1": {"read": 0.5}})
    by_run = {row.run: runs for row, runs in effects.collect(tmp_path)}
    assert [run.right for run in by_run["m3"]] == [0.01, 0.02, 0.1] and len(by_run["m3_zip"]) == 1


def test_seeds_that_disagree_and_rows_of_few_seeds_say_so(tmp_path):
    for seed, read in enumerate((0.59, 0.58, 0.44)):
        make_run(tmp_path / f"low-{seed}", {"9": {"read": read}}, "a1" if seed else "b2")
    (line,) = effects.rows_of(effects.collect(tmp_path), "unused").values()
    assert "| 0.440–0.590 (disagree) | 0.590 0.580 0.440 | 3 of 5 | – | b2, a1 |" in line
    (result,) = effects.read_board(effects.table({("DeepStack", "low resolution"): line}))
    assert result.disagree and not effects.Result("", "", 9, 0.5, 0.5, 0.55).disagree


def test_what_the_model_chose_lies_at_the_tokens_that_were_counted_with_the_score_of_all_questions(tmp_path):
    for seed, tokens in enumerate((4.0, 5.5)):
        of_kinds = {"read": 0.98, "n_read": 100, "count": 0.5, "n_count": 300, "tokens": tokens}
        make_run(tmp_path / f"cascade-{seed}", {"auto": of_kinds})
    found = effects.collect(tmp_path)
    (result,) = effects.results(found)
    assert (result.effect, result.label, result.tokens) == (effects.CHOSEN, "a cascade: goes up when unsure", 4.75)
    assert "| a cascade: goes up when unsure | 4.75 | 0.620 |" in effects.table(effects.rows_of(found, "abc1234"))


def test_rows_that_were_measured_again_take_the_place_of_the_old_ones_and_others_stay(tmp_path):
    make_run(tmp_path / "low-0", {"9": {"read": 0.25}})
    text = BOARD.read_text()
    new = effects.updated(text, effects.rows_of(effects.collect(tmp_path), "abc1234"))
    changed = set(new.splitlines()) - set(text.splitlines())
    assert len(changed) == 1 and "| low resolution | 9 | 0.250 |" in changed.pop()
    assert len(new.splitlines()) == len(text.splitlines())
    assert effects.updated(text, {}) == text  # and the board stands in the order of ROWS


def test_a_run_without_metrics_has_no_minutes(tmp_path):
    make_run(tmp_path / "low-0", {"9": {"read": 0.5}})
    (line,) = effects.rows_of(effects.collect(tmp_path), "abc1234").values()
    assert "| 1 of 5 | – | abc1234 |" in line


def test_the_board_holds_every_row_and_a_picture_is_drawn_of_it(tmp_path):
    results = effects.read_board(BOARD.read_text())
    there = {(r.effect, r.label) for r in results}
    assert there <= {(row.effect, row.label) for row in effects.ROWS}
    missing = {(row.effect, row.label) for row in effects.ROWS} - there
    assert all(label in BOARD.read_text() for _, label in missing)  # what was not measured yet is named
    assert all(r.low <= r.mean <= r.high for r in results)
    (tmp_path / "README.md").write_text(BOARD.read_text())
    effects.main(tmp_path / "README.md")
    assert (tmp_path / "effects.png").stat().st_size > 10_000


def test_the_picture_has_a_dot_for_every_seed_and_hollow_means_where_they_disagree(tmp_path, monkeypatch):
    figures, save = [], plots._save
    monkeypatch.setattr(
        plots, "_save", lambda figure, *args, **options: figures.append(figure) or save(figure, *args)
    )
    results = [
        effects.Result("A", "one", 4, 0.5, 0.4, 0.6, (0.4, 0.5, 0.6)),
        effects.Result("A", "one", 9, 0.8, 0.79, 0.81, (0.79, 0.81)),
        effects.Result("B", "two", 5.5, 0.7, 0.69, 0.71),
    ]
    plots.draw_effects(results, tmp_path, {"B": ("A", "one")})
    first, second = figures[0].axes

    def dots(ax, size):
        of_size = [line for line in ax.get_lines() if line.get_marker() == "o" and line.get_markersize() == size]
        return [(x, y) for line in of_size for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]

    assert [y for _, y in dots(first, 3)] == [0.4, 0.5, 0.6, 0.79, 0.81]
    assert [round(x) for x, _ in dots(first, 3)] == [4, 4, 4, 10, 10]  # a little beside 4 and 9
    assert dots(first, 7) == [(4, 0.5), (9, 0.8)]
    hollow = [line.get_markerfacecolor() == "white" for line in first.get_lines() if line.get_markersize() == 7]
    assert hollow == [True, False]
    assert dots(second, 7) == [(4, 0.5), (9, 0.8), (5.5, 0.7)]  # what it is compared with stands there too
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["A: one", "two"]
    assert np.isfinite(second.get_ylim()).all()


def test_a_board_that_cannot_be_read_is_refused_by_its_row():
    with pytest.raises(ValueError, match="no table with the columns effect, trained"):
        effects.read_board("nothing")
    (line,) = [line for line in BOARD.read_text().splitlines() if "| low resolution |" in line]
    cells = line.split(" | ")
    for n, wrong, message in (
        (4, "about half", "cannot be read.*low resolution"),
        (4, "0.100–0.900", "do not|seeds that differ by more than 0.05 say 'disagree'"),
        (2, "9 · 36", "cannot be read.*low resolution"),
    ):
        with pytest.raises(ValueError, match=message):
            effects.read_board(BOARD.read_text().replace(line, " | ".join([*cells[:n], wrong, *cells[n + 1 :]])))


def test_the_range_of_a_row_is_that_of_its_seeds():
    cells = (
        "DeepStack",
        "low resolution",
        "9",
        "0.550",
        "0.500–0.600 (disagree)",
        "0.500 0.610",
        "2 of 5",
        "–",
        "a",
        "b",
    )
    with pytest.raises(ValueError, match="is not the range of 0.500 0.610"):
        effects.read_board(effects.table({("DeepStack", "low resolution"): effects._line(cells)}))


def test_every_row_has_a_run_of_the_script_at_its_scale():
    script = (ROOT / "launch/effects.sh").read_text()
    found = re.findall(r"^ +(\w+) +(?:digits|pages) +(\S+) +([\w,]+)(?: +--.*)?$", script, re.M)
    runs = {name: scales for name, _, scales in found}
    # what others start from, or choose by
    assert {row.run for row in effects.ROWS} == runs.keys() - {"pages", "m3_fit", "router"}
    for row in effects.ROWS:
        assert runs[row.run] == "all" or str(row.scale) in runs[row.run].split(",")
    names = [name for name, *_ in found]
    for name, recipe, _ in found:  # what is evaluated in another way was trained before
        of = re.match(r"of=(\w+)", recipe)
        assert of is None or names.index(of[1]) < names.index(name)
