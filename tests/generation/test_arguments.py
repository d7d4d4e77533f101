"""Options of a call: one for all prompts or one for each, and the sentence for everything else."""

import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from lmm_jax.generation import arguments
from lmm_jax.generation.arguments import (
    SEEDS,
    Sampling,
    read_flag,
    read_number,
    read_numbers,
    read_real,
    read_sampling,
)

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "stop": (), "seed": 0}
VOCABULARY = 100


def read(count=1, many=False, **options):
    return read_sampling(count, many, VOCABULARY, **options)


def shown(value):
    """A name for a value that is the same in every process, without its address."""
    return re.sub(r"(\.\.\.| at 0x).*", "", arguments.shown(value))


def test_without_options_an_answer_is_greedy():
    assert read() == [Sampling()]
    assert read(3, True) == [Sampling(seed=n) for n in range(3)]
    assert read(0, True) == []


def test_an_option_is_one_for_all_or_one_for_each():
    values = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 7}
    assert read(2, True, **values) == [Sampling(0.5, 3, 0.9, 1.2, 7), Sampling(0.5, 3, 0.9, 1.2, 8)]
    lists = {name: [value, GREEDY[name]] for name, value in values.items()}
    assert read(2, True, **lists) == [Sampling(0.5, 3, 0.9, 1.2, 7), Sampling()]
    assert read(2, True, **{name: tuple(pair) for name, pair in lists.items()}) == read(2, True, **lists)
    assert read(2, True, temperature=[0, 2], top_k=5)[1] == Sampling(2.0, 5, seed=1)
    assert read(1, True, temperature=[2])[0] == Sampling(2.0)


@pytest.mark.parametrize("make", [np.float16, np.float32, np.float64, np.array, Fraction])
def test_numbers_of_numpy_are_numbers(make):
    (found,) = read(temperature=make(0.5), top_p=make(0.25), repetition_penalty=make(2.0))
    assert found == Sampling(0.5, 0, 0.25, 2.0)
    assert {type(value) for value in (found.temperature, found.top_p, found.repetition_penalty)} == {float}


@pytest.mark.parametrize("make", [int, np.int8, np.uint32, np.int64, np.array])
def test_whole_numbers_of_numpy_are_whole_numbers(make):
    (found,) = read(temperature=make(1), top_k=make(4), seed=make(6), stop=make(9))
    assert found == Sampling(1.0, 4, seed=6, stop_ids=(9,))
    assert {type(value) for value in (found.top_k, found.seed, *found.stop_ids)} == {int}


NO_NUMBERS = [True, False, np.True_, None, "1", "", b"1", 1j, (), {}, {1}, [[1]], [None], object(), Decimal(1)]
NO_REALS = [*NO_NUMBERS, np.nan, float("inf"), -float("inf"), -1, -1e-9, np.float32(-1), 10**400, np.ones(2)]
NO_WHOLES = [*NO_NUMBERS, 0.5, 2.0, np.nan, np.inf, -1, np.int64(-1), np.float32(3), np.ones(2, int)]
BAD = {
    "temperature": (*NO_REALS, 100.5, 1e9),
    "top_k": NO_WHOLES,
    "top_p": (*NO_REALS, 0, 0.0, 1.001, 2),
    "repetition_penalty": (*NO_REALS, 0, 0.0, 1e-9, 101),
    "seed": (*NO_WHOLES, SEEDS, 10**5000),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=lambda x: x if isinstance(x, str) else shown(x),
)
def test_what_an_option_may_not_be_is_named_with_what_it_may_be(name, value):
    valid = r".*: a (whole )?number .* valid"
    with pytest.raises(ValueError, match=rf"(?s)^{name}={valid}"):
        read(**{name: value})
    with pytest.raises(ValueError, match=rf"(?s)^{name}\[1\]={valid}"):
        read(2, True, **{name: [GREEDY[name], value]})
    if not isinstance(value, list | tuple):
        with pytest.raises(ValueError, match=rf"(?s)^{name}={valid}"):
            read(0, True, **{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "repetition_penalty", "seed"])
def test_a_list_has_as_many_entries_as_there_are_prompts_and_belongs_to_a_list(name):
    for values in ([1], [1, 1, 1], []):
        with pytest.raises(
            ValueError, match=rf"^{name} has {len(values)} entries for 2 prompts; give one number, or"
        ):
            read(2, True, **{name: values})
    with pytest.raises(ValueError, match=rf"^{name}=\[1\] \(a list\): a "):
        read(**{name: [1]})


def test_numbers_that_a_device_could_not_hold_are_read_as_what_they_mean():
    assert read(temperature=1e-300, top_k=10**400, top_p=1e-300) == [Sampling(0.0, (1 << 31) - 1, 1e-6)]
    assert read(temperature=1e-5, top_p=1) == [Sampling(1e-5)]
    assert all(np.float32(value) > 0 for value in (1e-5, 1e-6))


def test_each_prompt_of_a_list_has_a_seed_of_its_own():
    seeds = [one.seed for one in read(4, True, seed=SEEDS - 2)]
    assert seeds == [SEEDS - 2, SEEDS - 1, 0, 1]
    assert [one.seed for one in read(2, True, seed=[5, 5])] == [5, 5]
    assert read(seed=SEEDS - 1)[0].seed == SEEDS - 1


def stops(count=1, many=False, stop=()):
    return [(one.stop_texts, one.stop_ids) for one in read(count, many, stop=stop)]


def test_a_stop_is_a_text_or_an_id_or_a_list_of_them():
    for stop in (None, (), []):
        assert stops(stop=stop) == [((), ())]
    assert stops(stop="\n") == [(("\n",), ())] and stops(stop=np.str_("ab")) == [(("ab",), ())]
    assert stops(stop=0) == [((), (0,))] and stops(stop=VOCABULARY - 1) == [((), (VOCABULARY - 1,))]
    for make in (list, tuple):
        assert stops(stop=make(["a", 5, "b", np.int32(6), "a", 5])) == [(("a", "b"), (5, 6))]


def test_stops_of_a_list_of_prompts_are_for_all_or_a_list_for_each():
    for stop in ("a", ["a"], ("a",)):
        assert stops(2, True, stop) == [(("a",), ())] * 2
    assert stops(2, True, ["a", 5]) == [(("a",), (5,))] * 2
    assert stops(2, True, [["a"], (5,)]) == [(("a",), ()), ((), (5,))]
    assert stops(2, True, ([], ["a", "b"])) == [((), ()), (("a", "b"), ())]
    assert stops(2, True, []) == [((), ())] * 2 and stops(0, True, []) == []


@pytest.mark.parametrize(
    "stop",
    [
        *(True, np.False_, 1.5, 2.0, np.nan, b"a", {"a"}, {"a": 1}, object(), iter("a"), np.ones(2, int), 1j),
        *(-1, VOCABULARY, np.int64(VOCABULARY), 10**5000, "", "\udc80"),
    ],
    ids=shown,
)
def test_what_a_stop_may_not_be_is_named(stop):
    valid = r"(=.*(a text that ends the answer, the id of a token, or|ids of this tokenizer are 0 to 99)| is )"
    with pytest.raises(ValueError, match=rf"(?s)^stop{valid}"):
        read(stop=stop)
    for make in (list, tuple):
        with pytest.raises(ValueError, match=rf"(?s)^stop\[1\]{valid}"):
            read(stop=make(["a", stop]))
        with pytest.raises(ValueError, match=rf"(?s)^stop\[1\]\[0\]{valid}"):
            read(2, True, stop=make([["a"], [stop]]))


def test_lists_of_stops_belong_to_a_list_of_prompts_and_stand_alone():
    with pytest.raises(ValueError, match=r"^stop\[0\]=\['a'\] \(a list\): a text that ends"):
        read(stop=[["a"]])
    with pytest.raises(ValueError, match=r"^stop has 1 entries for 2 prompts; give one list, or one for each"):
        read(2, True, stop=[["a"]])
    with pytest.raises(ValueError, match=r"^stop\[0\]='a' \(a str\) stands beside lists; give one list of texts"):
        read(2, True, stop=["a", ["b"]])
    with pytest.raises(ValueError, match=r"^stop\[1\]\[0\]=\['a'\] \(a list\): a text"):
        read(2, True, stop=[[], [["a"]]])


def test_a_number_may_be_read_by_itself():
    assert read_real("n", 3, "0 to 5 is valid", 0, 5) == 3.0
    with pytest.raises(ValueError, match=r"^n=6 \(an int\): 0 to 5 is valid"):
        read_real("n", 6, "0 to 5 is valid", 0, 5)
    with pytest.raises(ValueError, match=r"^n=3 \(an int\): up to 2 is valid"):
        read_number("n", 3, "up to 2 is valid", most=2)


@pytest.mark.parametrize("value", [0, -1, True, False, 2.5, 4.0, "9", None, b"1", [1], (), {}, np.nan], ids=shown)
def test_numbers_are_whole_and_positive(value):
    with pytest.raises(ValueError, match=r"^batch_size=.*: a whole number of 1 or more is valid"):
        read_number("batch_size", value)
    assert read_number("batch_size", np.int64(3)) == 3


def test_numbers_are_one_for_all_or_one_for_each():
    assert read_numbers("n", 3, 2, many=True) == [3, 3]
    assert read_numbers("n", [3, 4], 2, many=True) == [3, 4]
    for value, count, many in (([3], 2, True), ([3, 0], 2, True), ([3], 1, False), (0, 2, True), ("33", 2, True)):
        with pytest.raises(ValueError, match=r"^n(\[1\])?(=| has)"):
            read_numbers("n", value, count, many)
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match="^truncate=.*: True or False is valid"):
            read_flag("truncate", value)
