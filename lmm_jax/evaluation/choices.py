"""Which letter a free answer chooses, as SEED-Bench and RealWorldQA read it in lmms-eval 0.7.3."""

import itertools

# What is said before a letter that is meant, and the letters of several scripts that lmms-eval looks for.
_ENGLISH = ("the answer is", "the correct answer is", "the best answer is", "the correct option is",
            "the best option is", "the choice is", "the correct choice is")  # fmt: skip
PHRASES = (
    *itertools.chain.from_iterable((phrase, phrase.removeprefix("the ")) for phrase in _ENGLISH),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# How surely a letter is meant that stands so, the surest first.
_FORMS = ("start", "end", "phrase", "({})", "{}.", "{}:", "{})", "{} ")


def seed_choice(answer, truth) -> float:
    """Whether the first character of an answer is the true letter, whatever the case: SEED-Bench."""
    return float(answer.strip()[:1].lower() == truth.lower().strip())


def realworldqa(answer, truth) -> float:
    """RealWorldQA: the letter that is chosen if the truth is one of A … D, else the same text.

    Case, white space around it and full stops behind it do not count in a text.
    """
    truth = truth.strip()
    if truth.upper() in ("A", "B", "C", "D"):
        return float(extract_letter(answer, "ABCD") == truth.upper())
    return float(answer.lower().strip().rstrip(".") == truth.lower())


def extract_letter(answer, letters="ABCDEFGH") -> str:
    """The letter of `letters` that an answer chooses, "" if none.

    Of the forms that letters stand in, the surest counts: alone at the start, alone at the end, behind a phrase such
    as "the answer is", "(A)", "A.", "A:", "A)", "A ". Of several letters in one form it is the last in the text. Only
    where no form is found any letter of the text counts, again the last.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not answer.strip():
        return ""
    bare, text = text.strip(), f" {text} "
    for form in _FORMS:
        found = [(at, letter) for letter in letters for at in _places(form, letter, text, bare)]
        if found:
            return max(found, key=lambda place: place[0])[1]
    latest = max(letters, key=text.rfind)
    return latest if latest in text else ""


def _places(form, letter, text, bare):
    """Where a letter stands in a form, of several places those that may be the last."""
    if form == "start":
        return [0] if bare.startswith(letter) and not bare[1:2].isalpha() else []
    if form == "end":
        return [0] if bare.endswith(letter) and not bare[-2:-1].isalpha() else []
    if form == "phrase":
        lower = text.lower()  # whose places are those of `text`, unless a letter has a longer lower case
        behind = [lower.find(phrase) + len(phrase) for phrase in PHRASES if phrase in lower]
        return [at for at in (text.find(letter, start) for start in behind) if at >= 0]
    at = text.rfind(form.format(letter))
    return [at] if at >= 0 else []
