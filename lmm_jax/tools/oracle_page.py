"""The page of the oracle: how many visual tokens a data set, a picture and a question need.

One HTML file that needs nothing else: no script, drawings as SVG, and pictures within it. It is for someone who has
not seen the project, so it says what its words mean. What it draws is computed in `lmm_jax.evaluation`: `oracle`,
`statistics` and `frontier`.
"""

import collections
import dataclasses
import html
import math
import pathlib

import numpy as np
from etils import epath
from PIL import Image

from lmm_jax import storage
from lmm_jax.data.images import open_picture
from lmm_jax.evaluation import oracle, statistics
from lmm_jax.tools import charts
from lmm_jax.tools.batch_page import counted, data_url, style, visible
from lmm_jax.tools.charts import Axis, Point, Series, chart, legend, percent

PICTURES = 5  # of each sort that are shown
QUESTIONS = 6  # of a picture that are shown
FALLEN = 8  # questions that fell that are shown
KINDS_DRAWN, KINDS_LISTED = 12, 100
SHOWN = 220  # pixels, the longer side of a picture on the page
MARKED = 16  # points of a curve that have marks; of more the line is drawn alone
CUT, CUT_ANSWER = 160, 90  # characters of a text, of an answer

FIXED = Series("fixed budget", (), charts.BLUE, "circle")
ORACLE = Series("oracle", (), charts.BLACK, "diamond", "5 4")
AUTO = Series('scale="auto"', (), charts.ORANGE, "star", "", 6)
# Ways of choosing a budget, as `auto` names them.
WAYS = {
    "cascade": Series("cascade", (), charts.ORANGE, "triangle"),
    "router": Series("router", (), charts.GREEN, "square"),
    "both": Series("router, then cascade", (), charts.PURPLE, "square", "2 3"),
}


def write(path, title, runs, questions, auto=None) -> str:
    """Writes the page.

    Args:
      path: of the file.
      title: what was asked of whom, such as "digits, split test: runs/m3".
      runs: `{str(scale): [Record]}`, the same questions in the same order at each budget; answers at chosen budgets,
        if there are any, as "auto".
      questions: of these records, in their order; `example` of each is its `Example`, whose pictures are opened only
        if they are shown.
      auto: what ways of choosing a budget take and reach, if that is known, as `evaluation.auto.report` gives it;
        seconds and intervals may be missing. `fitted_here` in it says that they were chosen on these questions.

    Returns:
      the absolute path.

    Raises:
      ValueError: answers without scores or of different questions, see `oracle.score_table`; or another number of
        questions than of answers.
    """
    found = _Found.of(runs, questions)
    sections = {
        "budgets": ("Accuracy at each budget", _budgets(found)),
        "kinds": ("Kinds of question", _kinds(found)),
        "needs": ("How many tokens the questions need", _needs(found)),
        "auto": ("Choosing the budget for each question", _auto(auto) if auto else ""),
        "falls": ("What falls as tokens grow", _falls(found)),
        "pictures": ("Easy and hard pictures", _pictures(found)),
        "calibration": ("Does the model know when it is right?", _calibration(found)),
    }
    sections = {name: section for name, section in sections.items() if section[1]}
    page = PAGE.format(
        title=visible(title),
        plain_title=html.escape(title),
        style=style(STYLE),
        summary=_summary(found),
        words=_words(found),
        contents="".join(f'<a href="#{name}">{heading}</a>' for name, (heading, _) in sections.items()),
        sections="".join(
            f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
            for name, (heading, content) in sections.items()
        ),
    )
    epath.Path(path).write_bytes(page.encode(errors="replace"))
    return str(storage.absolute(path))


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the sections are made of.

    Attributes:
      runs, questions: see `write`.
      budgets: B fixed ones, ascending.
      scores: `[B, n]`.
      pictures: `[n]`, equal for questions about the same picture.
      kinds: `{kind: places}`.
      oracle, of_kinds: an `Oracle` of all questions, and of each kind.
      falls: `Falls`.
    """

    runs: dict
    questions: list
    budgets: list[int]
    scores: np.ndarray
    pictures: np.ndarray
    kinds: dict[str, np.ndarray]
    oracle: oracle.Oracle
    of_kinds: dict[str, oracle.Oracle]
    falls: oracle.Falls

    @staticmethod
    def of(runs, questions):
        scores = oracle.score_table(runs)
        if len(questions) != scores.shape[1]:
            raise ValueError(f"{len(questions):,} questions do not go with {scores.shape[1]:,} answers at a budget")
        budgets = oracle.budgets(runs)
        return _Found(
            runs=runs,
            questions=questions,
            budgets=budgets,
            scores=scores,
            pictures=statistics.of_records(runs[str(budgets[0])]),
            kinds=oracle.places_of_kinds(runs),
            oracle=oracle.find_oracle(runs),
            of_kinds=oracle.by_kind(runs),
            falls=oracle.falls(runs),
        )

    def interval(self, budget, of=slice(None)):
        """`(accuracy, low, high)` of questions at the budget of this number."""
        return statistics.mean_interval(self.scores[budget, of], self.pictures[of])

    def records(self, place):
        """The answers to a question, at each fixed budget."""
        return [self.runs[str(budget)][place] for budget in self.budgets]


# The head of the page.


def _summary(found):
    best = int(found.scores.mean(1).argmax())
    accuracy, low, high = found.interval(best)
    asked = len(found.questions)
    with_pictures = len({p for p, q in zip(found.pictures, found.questions, strict=True) if q.example.images})
    tiles = (
        (
            accuracy,
            f"accuracy of the best fixed budget, {_tokens(found.budgets[best])} a picture ({_range(low, high)})",
        ),
        (found.oracle.accuracy, f"accuracy of the oracle, with {found.oracle.tokens:,.1f} tokens on average"),
        (found.oracle.share[0], f"of the questions need no more than {_tokens(found.budgets[0])}"),
        (1 - sum(found.oracle.share), "of the questions are wrong at every budget"),
    )
    shown = "".join(f"<div><b>{percent(number)}</b><span>{text}</span></div>" for number, text in tiles)
    return (
        f"<p>{counted(asked, 'question')} about {counted(with_pictures, 'picture')} were each answered with "
        f"{_listed(found.budgets)} visual tokens a picture.</p>"
        f'<div class="tiles">{shown}</div>'
    )


def _words(found):
    words = {
        "visual tokens": "What a model reads of a picture: a list of vectors, beside the words of the question. More "
        "of them show finer detail, and take more time and memory.",
        "budget": f"How many visual tokens a picture may take, here {_listed(found.budgets, 'or')}. A <i>fixed</i> "
        "budget is the same for every question.",
        "accuracy": "The mean score of the answers. A right answer scores 1, a wrong one 0, and one that is right in "
        "part something between.",
        "interval": "How far an accuracy is uncertain because only these pictures were asked about: drawn as a line "
        "with two ends. Intervals made this way hold the true value 95 times in 100.",
        "smallest sufficient budget": "Of a question: the fewest visual tokens with which it is answered as well as "
        "with any.",
        "oracle": "Someone who knows the true answers and so asks each question at its smallest sufficient budget; "
        "one that is wrong at every budget is asked at the smallest. No system can do better, and none that does not "
        "know the truth gets there. Some of its lead is luck: a model that guesses has a guess at each budget.",
        "fell": "A question that was right with few tokens and wrong at all larger budgets; or a kind of question "
        "whose accuracy is lower with more tokens, by more than chance explains.",
    }
    return "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in words.items())


# Accuracy.


def _fixed(found, of=slice(None)):
    points = []
    for number, budget in enumerate(found.budgets):
        accuracy, low, high = found.interval(number, of)
        says = f"{_tokens(budget)}: {percent(accuracy)} ({_range(low, high)})"
        points.append(Point(budget, accuracy, low, high, says))
    return dataclasses.replace(FIXED, points=tuple(points))


def _oracle(of):
    points = [
        Point(tokens, accuracy, says=f"oracle with budgets up to {budget}: {tokens:.2f} tokens, {percent(accuracy)}")
        for budget, (tokens, accuracy) in zip(of.budgets, of.curve, strict=True)
    ]
    return dataclasses.replace(ORACLE, points=tuple(points))


def _chosen_by_model(found):
    """The answers at budgets that were chosen for each question, as a series; none if there are no such answers."""
    records = found.runs.get(oracle.AUTO)
    if not records or any(record.score is None for record in records):
        return []
    tokens = float(np.mean([record.visual_tokens for record in records]))
    accuracy, low, high = statistics.mean_interval([record.score for record in records], found.pictures)
    says = f"auto: {tokens:.2f} tokens, {percent(accuracy)} ({_range(low, high)})"
    return [dataclasses.replace(AUTO, points=(Point(tokens, accuracy, low, high, says),))] if tokens else []


def _shares(series):
    """All accuracies that series show, with their intervals."""
    return [v for of in series for p in of.points for v in (p.y, p.low, p.high) if v is not None]


def _budgets(found):
    series = [_oracle(found.oracle), _fixed(found), *_chosen_by_model(found)]
    x = charts.token_axis([p.x for of in series for p in of.points], ticks=found.budgets)
    drawn = chart(x, charts.share_axis(_shares(series)), series, "Accuracy at each budget, and of the oracle")
    rows = []
    for fixed, of in zip(series[1].points, series[0].points, strict=True):
        rows.append((f"{fixed.x:,}", percent(fixed.y), _range(fixed.low, fixed.high), percent(of.y), f"{of.x:.2f}"))
    table = _table(("budget", "accuracy", "95 % interval", "oracle up to here", "its mean tokens"), rows)
    several = ""
    if abs(found.oracle.visual_tokens - found.oracle.tokens) > 1e-9:
        several = (
            " Budgets are tokens of one picture, or of one grid of it; the oracle takes "
            f"{found.oracle.visual_tokens:.1f} positions in the sequence a question."
        )
    return (
        "<p>Each point of the fixed budgets is all questions at that budget. Each point of the oracle is what it "
        f"reaches if it may choose that budget or a smaller one.{several}</p>"
        f'{legend(series)}<div class="beside"><div class="grow">{drawn}</div><div>{table}</div></div>'
    )


def _kinds(found):
    if len(found.kinds) < 2:
        return ""
    most = sorted(found.kinds, key=lambda kind: (-len(found.kinds[kind]), kind))
    series = {k: [_oracle(found.of_kinds[k]), _fixed(found, found.kinds[k])] for k in most[:KINDS_DRAWN]}
    y = charts.share_axis([v for of in series.values() for v in _shares(of)])
    x = charts.token_axis(
        [p.x for of in series.values() for s in of for p in s.points], "visual tokens", found.budgets
    )
    drawn = [
        f"<figure><figcaption><b>{_text(kind)}</b> <small>{counted(len(found.kinds[kind]), 'question')}</small>"
        f"</figcaption>{chart(x, y, of, f'Accuracy of {_plain(kind)} at each budget', 300, 220)}</figure>"
        for kind, of in sorted(series.items())
    ]
    rows = []
    for kind in sorted(most[:KINDS_LISTED]):
        of, places = found.of_kinds[kind], found.kinds[kind]
        cells = [percent(found.scores[number, places].mean()) for number in range(len(found.budgets))]
        rows.append((_text(kind), f"{len(places):,}", *cells, percent(of.accuracy), f"{of.tokens:.2f}"))
    head = ("kind", "questions", *(f"at {budget:,}" for budget in found.budgets), "oracle", "its tokens")
    left = _not_shown(len(most) - KINDS_DRAWN, "kinds with fewer questions are not drawn")
    unlisted = _not_shown(len(most) - KINDS_LISTED, "kinds with fewer questions are not listed")
    return (
        f"<p>The same for each kind of question, on the same axes.{left}</p>{legend(series[most[0]])}"
        f'<div class="small">{"".join(drawn)}</div>'
        f'<details><summary>as a table</summary><div class="wide">{_table(head, rows)}</div>{unlisted}</details>'
    )


def _needs(found):
    budgets = [f"{budget:,}" for budget in found.budgets]
    swatches = [
        f'<span><i class="swatch" style="background:{charts.shade(n, len(budgets))}"></i>{_tokens(budget)}</span>'
        for n, budget in enumerate(found.budgets)
    ]
    swatches.append('<span><i class="swatch unsolved"></i>wrong at every budget</span>')

    def bar(name, of, count):
        rest = 1 - sum(of.share)
        says = [f"{percent(s)} need {_tokens(b)}" for s, b in zip(of.share, of.budgets, strict=True)]
        drawn = charts.share_bar(of.share, [*says, f"{percent(rest)} are wrong at every budget"])
        return f'<div class="name">{name} <small>{count:,}</small></div>{drawn}'

    bars = [bar("<b>all</b>", found.oracle, len(found.questions))]
    most = sorted(found.kinds, key=lambda kind: (-len(found.kinds[kind]), kind))[: KINDS_DRAWN * 2]
    if len(found.kinds) > 1:
        bars += [bar(_text(kind), found.of_kinds[kind], len(found.kinds[kind])) for kind in sorted(most)]
    rows = [
        (budget, percent(share), percent(sum(found.oracle.share[: n + 1])))
        for n, (budget, share) in enumerate(zip(budgets, found.oracle.share, strict=True))
    ]
    rows.append(("wrong at every budget", percent(1 - sum(found.oracle.share)), ""))
    head = ("smallest sufficient budget", "share of questions", "this or fewer")
    left = _not_shown(len(found.kinds) - 2 * KINDS_DRAWN, "kinds with fewer questions are not drawn")
    return (
        "<p>The share of questions by their smallest sufficient budget. Dark is expensive; where the light part is "
        f"long, most of a larger budget is spent for nothing.{left}</p>"
        f'<div class="legend">{"".join(swatches)}</div><div class="bars">{"".join(bars)}</div>'
        f"<details><summary>as a table</summary>{_table(head, rows)}</details>"
    )


# Budgets that are chosen.


ELSEWHERE = "on other questions, not on those that are shown"
HERE = "<b>on the very questions that are shown</b>, so that what it reaches here says nothing about others"


def _auto(auto):
    ways = [name for name in WAYS if auto.get(name)]

    def series(x):
        """What there is to draw against `x`, "tokens" or "seconds"."""
        names = {"oracle": ORACLE, "fixed": FIXED} | {name: WAYS[name] for name in ways}
        found = []
        for name, like in names.items():
            points = [p for p in auto.get(name, ()) if p.get(x)]
            if points:
                drawn = sorted((_point(like.name, p, x) for p in points), key=lambda p: (p.x, -p.y))
                drawn = _unbeaten(drawn) if x == "seconds" and name in ways else drawn
                # A line is enough where there is a point for each price.
                size = like.size if name == "fixed" else 3.2 if len(drawn) <= MARKED else 0
                found.append(dataclasses.replace(like, points=tuple(drawn), size=size, mixes=True))
        for name in ways:
            p = auto["chosen"].get(name, {})
            if p.get(x):
                point = _point(f"chosen, {WAYS[name].name}", p, x)
                label = f"{WAYS[name].name}, as it was chosen"
                found.append(Series(label, (point,), WAYS[name].color, "star", "", 7))
        return found

    panels, drawn = (
        {"tokens": "visual tokens of a question (mean, logarithmic)", "seconds": "seconds a question (logarithmic)"},
        [],
    )
    y = charts.share_axis([value for x in panels for value in _shares(series(x))])
    budgets = sorted(round(p["tokens"], 1) for p in auto["fixed"])
    for x, label in panels.items():
        found = series(x)
        values = [p.x for of in found for p in of.points]
        if values:
            axis = charts.token_axis(values, label, budgets if x == "tokens" else None)
            says = f"Accuracy against {x} of fixed budgets, ways of choosing one, and the oracle"
            drawn.append(f"<figure>{chart(axis, y, found, says, 560, 360)}</figure>")
    rows = []
    for p in auto["fixed"]:
        rows.append((f"fixed, {p['scale']:,}", *_numbers(p), "", ""))
    for name in ways:
        closed, error = auto["gap_closed"].get(name), auto["calibration"].get(name)
        numbers = _numbers(auto["chosen"].get(name, {}))
        rows.append((WAYS[name].name, *numbers, _share_or_dash(closed), _number(error, ".3f")))
    if auto.get("oracle"):
        most = max(auto["oracle"], key=lambda p: (p["accuracy"], -p["tokens"]))
        rows.append(("oracle", *_numbers(most), percent(1), ""))
    head = ("way", "tokens", "accuracy", "seconds", "gap closed", "calibration error")
    fitted_here = auto.get("fitted_here", False)
    return (
        "<p>A <b>cascade</b> answers with few tokens, and asks again with more where the model is unsure of its "
        "answer. A <b>router</b> looks at the picture and the question and chooses a budget before anything is "
        "answered. Each has a curve, as one can ask it to be more or less sparing; a star is the point that was "
        f"chosen {HERE if fitted_here else ELSEWHERE}. Better is further up and further to "
        "the left. Tokens are of all budgets that were tried for a question.</p>"
        f'{legend(series("tokens"))}<div class="panels">{"".join(drawn)}</div>'
        f'<div class="wide">{_table(head, rows)}</div>{_as_good(auto, ways)}{_kinds_of_ways(auto, ways)}'
        "<p><small>Gap closed: the share of the area between the fixed budgets and the oracle, over the logarithm of "
        "tokens, that lies below the curve of a way; 0 is no better than fixed budgets, 100 % is the oracle. Between "
        "two points a line is what one gets by asking some questions at one and the rest at the other. Calibration "
        "error: how far apart the expected and the true accuracy are, on average. Seconds are those of the budgets "
        "that are tried; of each way only points are drawn there that no faster one of it beats.</small></p>"
    )


def _as_good(auto, ways):
    """A table of the tokens at which each way is as accurate as each fixed budget."""
    told = {name: auto.get("tokens_at", {}).get(name, {}) for name in ways}
    fixed = [p for p in auto["fixed"] if any(str(p["scale"]) in of for of in told.values())]
    if not fixed:
        return ""
    rows = [
        (WAYS[name].name, *(_tokens_or_never(of.get(str(p["scale"]))) for p in fixed))
        for name, of in told.items()
        if of
    ]
    head = ("tokens to be as accurate as", *(f"fixed {p['scale']:,}" for p in fixed))
    return f'<div class="wide">{_table(head, rows)}</div>'


def _tokens_or_never(tokens):
    return "never" if tokens is not None and math.isinf(tokens) else _number(tokens, ",.2f")


def _kinds_of_ways(auto, ways):
    """A table of what each way, as it was chosen, spends on each kind of question."""
    told = {name: auto["chosen"].get(name, {}).get("kinds", {}) for name in ways}
    kinds = sorted({kind for of in told.values() for kind in of})
    if len(kinds) < 2:
        return ""
    head, rows = ["kind"], []
    for name in told:
        head += [f"{WAYS[name].name}: tokens", "accuracy"]
    for kind in kinds[:KINDS_LISTED]:
        numbers = [number for of in told.values() for number in _numbers(of.get(kind, {}))[:2]]
        rows.append((_text(kind), *numbers))
    left = _not_shown(len(kinds) - KINDS_LISTED, "kinds are not listed")
    table = f'<div class="wide">{_table(head, rows)}</div>{left}'
    return f"<details><summary>what is spent on each kind of question</summary>{table}</details>"


def _unbeaten(points):
    """Of points from left to right those that are higher than all before: a curve in tokens is none in seconds."""
    kept = []
    for point in points:
        if not kept or point.y > kept[-1].y:
            kept.append(point)
    return kept


def _point(name, point, x):
    return Point(point[x], point["accuracy"], point.get("low"), point.get("high"), _says(name, point))


def _says(name, point):
    seconds = f", {point['seconds']:.3g} s" if point.get("seconds") else ""
    scale = f" {point['scale']:,}" if "scale" in point else ""
    tokens = f"{point['tokens']:.2f} tokens, " if point.get("tokens") else ""
    return f"{name}{scale}: {tokens}{percent(point['accuracy'])}{seconds}"


def _numbers(point):
    return (
        _number(point.get("tokens"), ",.2f"),
        _share_or_dash(point.get("accuracy")),
        _number(point.get("seconds"), ".3g"),
    )


def _number(value, form):
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def _share_or_dash(value):
    return "–" if value is None or math.isnan(value) else percent(value)


# What falls.


def _falls(found):
    if len(found.budgets) < 2:
        return ""
    falls, asked = found.falls, len(found.questions)
    share = len(falls.samples) / asked
    said = (
        f"<p>{len(falls.samples):,} of {counted(asked, 'question')} ({percent(share)}) <b>fell</b>: right with few "
        f"tokens, wrong at all larger budgets. {falls.gains:,} ({percent(falls.gains / asked)}) did the opposite: "
        f"wrong at {_tokens(found.budgets[0])}, right at a larger budget. Where the two numbers are close, single "
        "falls are mostly chance.</p>"
    )
    if falls.kinds:
        rows = [
            (
                "all questions" if fall.kind is None else _text(fall.kind),
                f"{fall.questions:,}",
                f"{fall.few:,} → {fall.many:,}",
                f"{_points(fall.difference)}",
                f"{_points(fall.low)} to {_points(fall.high)}",
                html.escape(statistics.p_text(fall.p)),
            )
            for fall in falls.kinds
        ]
        head = ("falls", "questions", "from → to tokens", "change of accuracy", "95 % interval", "test")
        said += (
            '<p class="warn"><b>Accuracy falls with more tokens</b>, by more than chance explains:</p>'
            f'<div class="wide">{_table(head, rows)}</div>'
        )
    else:
        said += "<p>No kind of question falls by more than chance explains.</p>"
    said += (
        "<p><small>Tested in pairs, the same question at both budgets, and corrected for the number of pairs of "
        "budgets and kinds that are looked at (Holm). Of each kind the largest fall is listed.</small></p>"
    )
    if not falls.samples:
        return said
    order = sorted(falls.samples, key=lambda fall: _shows_little(found, fall))
    shown = "".join(_fallen(found, fall) for fall in order[:FALLEN])
    which = "Some of the questions that fell" if len(falls.samples) > FALLEN else "The questions that fell"
    return f'{said}<p>{which}:</p><div class="cards">{shown}</div>'


def _shows_little(found, fall):
    """For sorting: falls first that are examples of a kind's fall, then those that were right at the most budgets."""
    kind = found.records(fall.place)[0].kind
    example = any(k.kind == kind and k.few <= fall.right_at < k.many for k in found.falls.kinds)
    right = sum(record.score >= oracle.RIGHT for record in found.records(fall.place))
    return not example, -right, fall.place


def _fallen(found, fall):
    answers = "".join(
        f"<tr><th>{budget:,}</th>{_answer(record)}</tr>"
        for budget, record in zip(found.budgets, found.records(fall.place), strict=True)
    )
    record = found.records(fall.place)[0]
    return (
        f'<div class="card">{_thumbnails(found, fall.place)}<div><p class="question">{_text(record.question)}</p>'
        f"<p><small>true answer</small> {_truths(record)}</p>"
        f'<table class="answers"><tr><th>tokens</th><th>answer</th></tr>{answers}</table></div></div>'
    )


def _points(difference):
    return f"{100 * difference:+.1f} points"


# Pictures.


def _pictures(found):
    places = collections.defaultdict(list)
    for place, picture in enumerate(found.pictures.tolist()):
        if found.questions[place].example.images:
            places[picture].append(place)
    if not places:
        return ""
    best, smallest = found.scores.max(0), found.oracle.smallest
    solved = best >= oracle.RIGHT
    sure = np.array([_confidence(record) for record in found.runs[str(found.budgets[0])]])

    def easy(of):
        return -solved[of].mean(), smallest[of].mean(), -best[of].mean(), -len(of), -sure[of].mean()

    def costly(of):
        return -smallest[of][solved[of]].mean(), -solved[of].mean(), -len(of)

    def hard(of):
        return solved[of].mean(), best[of].mean(), -len(of)

    lists = (
        ("Easiest", "Their questions are answered, with the fewest tokens.", easy, lambda of: solved[of].all()),
        (
            "Need many tokens",
            "The answers that are right take the largest budgets.",
            costly,
            lambda of: solved[of].any() and smallest[of][solved[of]].mean() > found.budgets[0],
        ),
        (
            "Hardest",
            "They have the most questions that are wrong at every budget.",
            hard,
            lambda of: not solved[of].all(),
        ),
    )
    out, used = [], set()
    for heading, text, order, admits in lists:
        candidates = [p for p, of in places.items() if p not in used and admits(np.array(of))]
        shown = sorted(candidates, key=lambda p: (*order(np.array(places[p])), p))[:PICTURES]
        used.update(shown)
        cards = "".join(_picture(found, places[p]) for p in shown) or "<p>There are none.</p>"
        out.append(f"<h3>{heading}</h3> <small>{text}</small>{cards}")
    return (
        "<p>Pictures by what their questions need, and what was answered at each budget: "
        '<span class="mark yes">✓ right</span> <span class="mark part">0.50 in part</span> '
        '<span class="mark no">✗ wrong</span></p>' + "".join(out)
    )


def _picture(found, places):
    """A picture with its questions and their answers at each budget."""
    smallest = found.oracle.smallest[places]
    solved = found.scores[:, places].max(0) >= oracle.RIGHT
    need = f", with {smallest[solved].mean():,.1f} tokens on average" if solved.any() else ""
    what = f"{int(solved.sum())} of {counted(len(places), 'question')} right at some budget{need}"
    rows = []
    for place in places[:QUESTIONS]:
        records = found.records(place)
        answers = "".join(map(_answer, records))
        rows.append(f"<tr><td>{_text(records[0].question)}</td><td>{_truths(records[0])}</td>{answers}</tr>")
    more = _not_shown(len(places) - QUESTIONS, "questions about it are not shown")
    head = "".join(f"<th>at {budget:,}</th>" for budget in found.budgets)
    return (
        f'<div class="card whole">{_thumbnails(found, places[0])}<div class="wide">'
        f'<p><small>{what}.{more}</small></p><table class="answers">'
        f"<tr><th>question</th><th>true answer</th>{head}</tr>{''.join(rows)}</table>"
        "</div></div>"
    )


def _answer(record):
    """A cell with an answer, and whether it is right."""
    mark, kind = (f"{record.score:.2f}", "part")
    if record.score >= 0.995:
        mark, kind = "✓", "yes"
    elif record.score < 0.005:
        mark, kind = "✗", "no"
    said = _text(record.answer, CUT_ANSWER) or "<small>nothing</small>"
    cut = " <small>(cut off)</small>" if record.reason == "length" else ""
    return f'<td class="{kind}"><b>{mark}</b> {said}{cut}</td>'


def _truths(record):
    return _text(" / ".join(dict.fromkeys(record.truths)))


def _thumbnails(found, place):
    images = found.questions[place].example.images
    shown = "".join(map(_thumbnail, images[:4]))
    return f'<div class="thumbs">{shown}{_not_shown(len(images) - 4, "pictures are not shown")}</div>'


def _thumbnail(image):
    try:
        picture = open_picture(image)
    except (ValueError, OSError) as error:
        return f'<p class="missing"><small>not shown: {_text(error)}</small></p>'
    kind = ' class="fine"' if max(picture.size) < SHOWN / 2 else ""
    if max(picture.size) > SHOWN:
        factor = SHOWN / max(picture.size)
        size = [max(1, round(side * factor)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return f'<img{kind} alt="" src="{data_url(picture)}">'


# Calibration.


def _confidence(record):
    """How likely the model found the answer that it gave, and that it ends there."""
    return min(1.0, math.exp(sum(record.logprobs) + record.end))


def _calibration(found):
    y = Axis("accuracy", 0, 1, tuple((n / 5, percent(n / 5, 0)) for n in range(6)))
    x = dataclasses.replace(y, label="probability of the answer")
    drawn = []
    for number, budget in enumerate(found.budgets):
        confidence = [_confidence(record) for record in found.runs[str(budget)]]
        bins = statistics.reliability(confidence, found.scores[number], groups=found.pictures)
        error = statistics.calibration_error(confidence, found.scores[number])
        points = tuple(
            Point(
                b.confidence,
                b.score,
                b.low,
                b.high,
                f"{counted(b.count, 'answer')} of probability {percent(b.confidence)}: {percent(b.score)} right",
            )
            for b in bins
        )
        series = [Series("answers", points, charts.BLUE, "circle", "", 3.5)]
        says = f"Accuracy against the probability of an answer, at {_tokens(budget)}"
        drawn.append(
            f"<figure><figcaption><b>{_tokens(budget)}</b> <small>calibration error {error:.3f}</small></figcaption>"
            f"{chart(x, y, series, says, 300, 280, diagonal=True)}</figure>"
        )
    graded = ""
    if np.logical_and(found.scores > 0.005, found.scores < 0.995).any():
        graded = (
            " Some answers score in part here: they may score well although it is unlikely that every word of them "
            "is right, and so lie above the line."
        )
    return (
        "<p>The probability that the model gives to its own answer, against how often such answers are right. Each "
        "point stands for about the same number of answers. On the dashed line the model knows how sure it may be: "
        "of the answers of which it is 70 % certain, 70 % are right. Below the line it is too sure of itself. The "
        f"calibration error is the mean distance from the line.{graded}</p>"
        f'<div class="small">{"".join(drawn)}</div>'
    )


# Words and tables.


def _table(head, rows):
    """HTML of a table; its cells are HTML."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="numbers"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'


def _text(words, most=CUT):
    """HTML of a text that may come from anyone, cut where it is long."""
    words = str(words)
    if len(words) <= most:
        return visible(words)
    return f"{visible(words[:most])}… <small>({len(words):,} characters)</small>"


def _plain(words):
    """A text for an attribute, which whoever puts it there escapes."""
    return str(words)[:CUT]


def _not_shown(count, what):
    return f" <small>{count:,} {what}.</small>" if count > 0 else ""


def _tokens(budget):
    return counted(budget, "token")


def _range(low, high):
    return f"{percent(low)} to {percent(high)}"


def _listed(budgets, last="and"):
    """ "1, 4, 9 and 36"."""
    names = [f"{budget:,}" for budget in budgets]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


STYLE = pathlib.Path(__file__).with_suffix(".css")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{plain_title}</title><style>{style}</style></head><body>
<h1>How many visual tokens do these questions need?</h1>
<p class="of">{title}</p>
{summary}
<details class="words" open><summary>What the words mean</summary><dl>{words}</dl></details>
<nav>{contents}</nav>
{sections}
</body></html>
"""
