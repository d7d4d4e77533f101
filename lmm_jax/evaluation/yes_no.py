"""Scores of questions that are answered by yes or no: POPE, by both of its definitions, and MME.

POPE is scored in two ways that give different numbers for the same answers as soon as a model answers in sentences.
lmms-eval takes an answer that is "yes" or "no" and nothing else, and leaves any other out of precision and recall;
LLaVA takes "no", "No" or "not" in the first sentence for no, and everything else for yes.
"""

import collections
import re


def lmms_eval_label(answer) -> str:
    """An answer as lmms-eval compares it with POPE's labels: lower case, without white space around it."""
    return answer.lower().strip()


def llava_label(answer) -> str:
    """ "no" if a word of the first sentence is "No", "no" or "not", else "yes", as LLaVA reads answers to POPE.

    A sentence ends at a full stop, commas do not count, and words are parted by single spaces and nothing else.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(pairs) -> dict:
    """POPE by both definitions: {"lmms_eval": {…}, "llava": {…}}, shares 0 … 1.

    Args:
      pairs: (answer, label) of all questions, labels "yes" or "no".

    Returns:
      of each definition "accuracy", "precision", "recall", "f1"; of LLaVA's also "yes_ratio", how often the model
      said yes. lmms-eval's own yes_ratio is left out, since it counts the labels. What would be a division by zero
      is 0; LLaVA's script stops there.
    """
    return {
        "lmms_eval": _rates([(lmms_eval_label(answer), label) for answer, label in pairs]),
        "llava": _with_yes_ratio([(llava_label(answer), label) for answer, label in pairs]),
    }


def confusion(pairs) -> tuple[int, int, int, int]:
    """(true yes, false yes, true no, false no) of (said, label) pairs; what is neither yes nor no is in none."""
    found = collections.Counter(pairs)
    return found["yes", "yes"], found["yes", "no"], found["no", "no"], found["no", "yes"]


def _rates(pairs):
    right_yes, wrong_yes, _, wrong_no = confusion(pairs)
    precision, recall = _share(right_yes, right_yes + wrong_yes), _share(right_yes, right_yes + wrong_no)
    return {
        "accuracy": _share(sum(said == label for said, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
    }


def _with_yes_ratio(pairs):
    return _rates(pairs) | {"yes_ratio": _share(sum(said == "yes" for said, _ in pairs), len(pairs))}


def _share(part, whole):
    return part / whole if whole else 0.0


PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_label(answer) -> str:
    """ "yes", "no" or "other", whichever the first four characters of an answer to MME hold, as lmms-eval reads it.

    Full stops do not count; a single letter "y" or "n" does.
    """
    said = answer.lower().strip().replace(".", "")
    if said in ("y", "n"):
        return {"y": "yes", "n": "no"}[said]
    found = re.search("yes", said[:4]) or re.search("no", said[:4])
    return found.group() if found else "other"


def mme(items) -> dict:
    """The score of each category of MME, 0 … 200: accuracy and accuracy+ in percent, added.

    Args:
      items: (category, question, right) of all answers, `right` 0 or 1. Two answers to one question (one picture)
        count together; accuracy+ is the share of pictures of which both are right.

    Raises:
      ValueError: a picture that has not two answers.
    """
    answers = collections.defaultdict(lambda: collections.defaultdict(list))
    for category, question, right in items:
        answers[category][question].append(right)
    return {category: _mme_category(category, of_category) for category, of_category in answers.items()}


def _mme_category(category, answers):
    score = 0.0
    for question, right in answers.items():
        if len(right) != 2:
            raise ValueError(f"MME scores pairs of questions, and {category}/{question} has {len(right)}")
        score += sum(right) / 2 * 100 + (sum(right) == 2) * 100
    return score / len(answers)
