"""Scores of one answer against the true ones, of which the best counts: 0 … 1, free functions over strings."""

import re
import string

import numpy as np

ANLS_THRESHOLD = 0.5  # published with DocVQA: what is less alike than this scores nothing
RELAXED = 0.05  # published with ChartQA: a number may be off by so much of the true one

# "B", "(B)", "B.", "B)", "B:", or one of these with the text of the choice behind it; a bare letter stands alone.
_LETTER = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):](?!\w)|([A-Za-z])\s*$)")


def exact(answer, truths) -> float:
    """Whether an answer is one of the true ones, letter for letter; white space around it does not count."""
    return float(answer.strip() in [truth.strip() for truth in truths])


def contains(answer, truths) -> float:
    """Whether an answer contains a true one as whole words, whatever the case and the white space between them."""
    said = _plain(answer)
    return float(any(re.search(rf"(?<!\w){re.escape(_plain(truth))}(?!\w)", said) for truth in truths))


def anls(answer, truths) -> float:
    """Average normalised Levenshtein similarity of one answer, as DocVQA and InfographicVQA are scored.

    1 - distance / length of the longer, 0 below `ANLS_THRESHOLD`. Case and white space do not count in the distance.
    They do in the length, as in lmms-eval, whose numbers are those that are compared.
    """
    best = 0.0
    for truth in truths:
        longer = max(len(truth.upper()), len(answer.upper()))
        far = distance(_plain(truth), _plain(answer)) / longer if longer else 0.0
        best = max(best, 1 - far)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed(answer, truth) -> float:
    """ChartQA's relaxed accuracy: a number within 5 % of the true one, or the same text whatever the case.

    Numbers are what Python's `float` reads, "%" behind one divides it by 100. A true 0 is compared as text, and
    "1,000" is no number, as in lmms-eval.
    """
    said, true = _number(answer), _number(truth)
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= RELAXED)
    return float(answer.lower() == truth.lower())


def _number(text):
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def same_letters(answer, truth) -> float:
    """Whether two texts are the same but for case and ASCII punctuation; white space counts. GQA is scored so."""
    return float(_letters(answer) == _letters(truth))


def _letters(text):
    # lmms-eval does this in numpy, which drops final NULs and keeps the number of characters: one of the two of "İ".
    text = text.rstrip("\0")
    lower = text.lower()[: len(text)]
    return lower.translate(str.maketrans("", "", string.punctuation)).rstrip("\0")


def choice_letter(text) -> str:
    """The letter that a text chooses, in upper case: of "(B)", "B.", "b", "B) a cat"; "" if it chooses none."""
    found = _LETTER.match(text)
    return next(filter(None, found.groups())).upper() if found else ""


def is_choice(text) -> bool:
    """Whether a true answer is the letter of a choice and nothing else."""
    return choice_letter(text) != "" and len(re.findall(r"\w", text)) == 1


def choice(answer, truths) -> float:
    """Whether an answer chooses the letter of a true one, however each of them is punctuated."""
    said = choice_letter(answer)
    return float(said != "" and said in [choice_letter(truth) for truth in truths])


def distance(a, b) -> int:
    """Levenshtein's: how many characters have to be put in, taken out or exchanged to make `a` from `b`."""
    at = np.arange(len(b) + 1)
    letters, row = np.array([ord(letter) for letter in b], np.int64), at
    for n, letter in enumerate(a, start=1):
        # Exchanging or taking out; then putting in, which may follow itself: a running minimum along the row.
        new = np.concatenate([[n], np.minimum(row[:-1] + (letters != ord(letter)), row[1:] + 1)])
        row = np.minimum.accumulate(new - at) + at
    return int(row[-1])


def _plain(text):
    """Lower case, with single spaces."""
    return " ".join(text.lower().split())
