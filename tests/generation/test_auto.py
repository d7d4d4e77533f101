"""The file that says how a model chooses, and what it chooses by it; without a model."""

import dataclasses
import json

import pytest

from lmm_jax.generation.auto import BOTH, CASCADE, ROUTER, Auto, Way, load_auto

# An answer whose log-probabilities sum to x promises expit(x + 2), and one token more expit(2): it is right then.
SURE = (2.0, 1.0, 0.0, 0.0)
RIGHT = (2.0, 0.0, 0.0, 0.0)


@pytest.fixture
def auto():
    of_answer = {(1, 1): SURE, (1, 4): RIGHT, (1, 9): RIGHT, (4, 4): SURE, (4, 9): RIGHT, (9, 9): SURE}
    of_router = {1: (0.0, 1.0, 0.0, 0.0), 4: (0.0, 0.0, 1.0, 0.0), 9: (0.0, 0.0, 0.0, 1.0)}
    of_both = {
        pair: (*weights, 0.0, 0.0, 0.1) for pair, weights in of_answer.items()
    }  # the router adds a little at 9
    ways = {
        CASCADE: Way(1, True, 0.01),
        ROUTER: Way(None, False, 0.01),
        BOTH: Way(None, True, 0.01),
    }
    curves = {CASCADE: (Way(1, True, 0.5), Way(4, True, 0.0))}
    return Auto((1, 4, 9), of_answer, of_router, of_both, ways, ROUTER, curves, {"task": "digits"}, 7)


def test_what_is_written_is_read_again(auto, tmp_path):
    assert load_auto(tmp_path) is None
    auto.save(tmp_path)
    assert load_auto(tmp_path) == auto and load_auto(tmp_path).way == Way(None, False, 0.01)
    without = dataclasses.replace(
        auto, of_router={}, of_both={}, ways={CASCADE: auto.ways[CASCADE]}, use=CASCADE, step=None
    )
    without.save(tmp_path)
    assert load_auto(tmp_path) == without


def test_two_that_choose_alike_have_one_identity(auto):
    same = dataclasses.replace(auto, about={}, step=9, curves={})
    assert same.identity == auto.identity
    other = [
        {"of_answer": auto.of_answer | {(9, 9): RIGHT}},
        {"of_router": auto.of_router | {4: (0.5,) * 4}},
        {"use": CASCADE},
        {"ways": auto.ways | {ROUTER: Way(None, False, 0.02)}},
    ]
    assert len({auto.identity, *(dataclasses.replace(auto, **change).identity for change in other)}) == 5


def test_a_cascade_goes_up_where_a_larger_budget_promises_more_than_it_costs(auto):
    cascade = auto.ways[CASCADE]
    assert auto.first(cascade) == 1
    assert auto.next(cascade, 1, [-0.01], -0.01) is None  # sure enough
    assert auto.next(cascade, 1, [-3.0, -1.0], 0.0) == 4  # 4 promises as much as 9 and costs less
    assert auto.next(cascade, 9, [-3.0, -1.0], 0.0) is None  # there is none larger
    spent = dataclasses.replace(cascade, price=0.02)  # 9 tokens promise .88 - .18, less than the answer's .75
    assert auto.next(spent, 4, [-0.9], 0.0) is None  # whose own 4 tokens are spent already, and cost nothing more
    dear = dataclasses.replace(cascade, price=0.3)
    assert auto.next(dear, 1, [-3.0, -1.0], 0.0) is None


def test_a_router_begins_where_it_expects_most_for_the_price(auto):
    router = auto.ways[ROUTER]
    assert auto.first(router, [0.1, 0.2, 0.9]) == 9
    assert auto.first(router, [0.86, 0.88, 0.9]) == 1
    assert auto.first(router, [0.0, 1.0, 1.0]) == 4
    assert auto.next(router, 1, [-30.0], 0.0) is None
    assert auto.next(auto.ways[BOTH], 1, [-30.0], 0.0, [0.5, 0.5, 0.5]) == 4
    assert auto.next(auto.ways[BOTH], 1, [0.0], 0.0, [0.5, 0.5, 0.5]) is None


BAD = {
    "no JSON": lambda text: text[:-10],
    "a list": lambda text: "[1]",
    "format": lambda text: text.replace('"format": 1', '"format": 2'),
    "no use": lambda text: text.replace('"use"', '"used"'),
    "unknown use": lambda text: text.replace('"use": "router"', '"use": "coin"'),
    "scales": lambda text: json.dumps(json.loads(text) | {"scales": [9, 4, 1]}),
    "no scales": lambda text: json.dumps(json.loads(text) | {"scales": []}),
    "weights": lambda text: json.dumps(json.loads(text) | {"of_answer": json.loads(text)["of_answer"][:-1]}),
    "three weights": lambda text: json.dumps(json.loads(text) | {"of_router": [[1, [0.0]], [4, [0.0]], [9, [0.0]]]}),
    "not a number": lambda text: text.replace("0.01", "NaN"),
    "a start that is none": lambda text: text.replace('"start": 1', '"start": 2'),
    "a router that is not there": lambda text: json.dumps(json.loads(text) | {"of_router": []}),
    "text for truth": lambda text: text.replace('"climbs": true', '"climbs": "yes"'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused_with_what_to_do(auto, tmp_path, name):
    auto.save(tmp_path)
    file = tmp_path / "auto.json"
    file.write_text(BAD[name](file.read_text()))
    with pytest.raises(ValueError, match=r"auto\.json is not what `lmm evaluate --fit-auto` writes .*; fit it again"):
        load_auto(tmp_path)
