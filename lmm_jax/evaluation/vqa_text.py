"""Soft accuracy of VQA and TextVQA, and the spelling that answers are brought into before they are compared.

The definitions are those of lmms-eval 0.7.3 and LLaVA, whose numbers are the ones that papers print. Both have two
oddities that are kept, since every published number has them: a full stop that follows a digit is dropped where none
follows it (the pattern was meant to keep it), and no more than 32 full stops of an answer are dropped.
"""

import functools
import re
import statistics

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMERALS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")

_CONTRACTED = (
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've "
    "must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't "
    "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll "
    "who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd "
    "you'd've you'll you're you've"
)


def _without_one_apostrophe(word):
    return [word[:n] + word[n + 1 :] for n, letter in enumerate(word) if letter == "'"]


# What is written with an apostrophe too few to how it is written. The one that takes an apostrophe out is theirs.
CONTRACTIONS = {wrong: right for right in _CONTRACTED.split() for wrong in _without_one_apostrophe(right)}
CONTRACTIONS["somebody'd"] = "somebodyd"

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_A_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # at most so many are dropped


def without_punctuation(text) -> str:
    """Punctuation marks out of a text, in the way of the VQA challenge.

    A mark with a space beside it anywhere in the text is dropped, any other becomes a space; all are dropped where
    the text has a number with a comma in it. Full stops are dropped that stand before no digit.
    """
    drop_all, found = _COMMA_IN_A_NUMBER.search(text) is not None, text
    for mark in _MARKS:
        dropped = drop_all or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if dropped else " ")
    return _FULL_STOP.sub("", found, count=_FULL_STOPS)


def plain_words(text) -> str:
    """Lower-case words with single spaces: number words as digits, no articles, apostrophes where they belong."""
    words = [NUMERALS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@functools.lru_cache(maxsize=1 << 16)  # as people agree, and answers repeat
def textvqa_form(text) -> str:
    """An answer as TextVQA compares it: EvalAI's processing, which also sets a genitive apart ("man 's")."""
    spaced = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(one_line(spaced)))


@functools.lru_cache(maxsize=1 << 16)
def vqav2_form(text) -> str:
    """An answer as VQAv2 compares it."""
    return plain_words(without_punctuation(one_line(text)))


def one_line(text) -> str:
    """A text with line breaks and tabs as spaces, without white space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def textvqa_accuracy(answer, truths) -> float:
    """Soft accuracy of one answer against those of people, after `textvqa_form`; see `soft_accuracy`."""
    return soft_accuracy(textvqa_form(answer), [textvqa_form(truth) for truth in truths])


def vqav2_accuracy(answer, truths) -> float:
    """Soft accuracy of one answer against those of people, after `vqav2_form`; see `soft_accuracy`."""
    return soft_accuracy(vqav2_form(answer), [vqav2_form(truth) for truth in truths])


def soft_accuracy(answer, truths) -> float:
    """Mean, over leaving each person out, of min(1, people among the others who gave this answer / 3).

    VQA and TextVQA asked ten people.

    Raises:
      ValueError: there are no true answers.
    """
    if not truths:
        raise ValueError("soft accuracy needs the answers of people, and there are none")
    return _soft_accuracy(sum(truth == answer for truth in truths), len(truths))


@functools.cache
def _soft_accuracy(same, people):
    left_out = [min(1.0, (same - 1) / 3)] * same + [min(1.0, same / 3)] * (people - same)
    return float(statistics.mean(left_out))
