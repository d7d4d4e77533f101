"""Ids and labels against the references' own (M3 and ConvLLaVA); where they gave up, against the conversation."""

import json
import re

import numpy as np
import pytest
import sentencepiece as spm

from lmm_jax.data.conversation import IMAGE, IMAGE_TAG, ROLES, encode, find_template, truncate
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece

IGNORE = -100
OURS = {"v1": "vicuna_v1", "llava_v1": "vicuna_v1"}  # the references' other names for a layout
CONTROL = re.compile("<s>|</s>|<unk>")


def as_turns(conversation):
    """Turns of a LLaVA sample; the reference loses a first turn that is not the human's."""
    turns = [(turn["from"], turn["value"]) for turn in conversation]
    return turns[ROLES[turns[0][0]] == "assistant" :]


def answers(turns):
    return [text for role, text in turns if ROLES[role] == "assistant"]


def labels(encoded):
    return np.where(encoded.supervised, encoded.ids, IGNORE)


def reference_is_right(case, turns):
    """Whether the reference reads this conversation as it was meant.

    It masks all of a sample whose count it cannot follow, obeys control pieces in texts, and makes one picture of
    several in a turn.
    """
    obeyed = any(CONTROL.search(text) for _, text in turns)
    merged = any(text.count(IMAGE_TAG) > 1 for _, text in turns)
    return not (case["mismatch_warning"] or obeyed or merged)


def expected_by_hand(turns, model, legacy):
    """Ids and labels of `vicuna_v1` with sentencepiece alone, text for text.

    Text that goes on is encoded after a newline, a piece of its own in LLaMA's vocabularies, which is then dropped.
    """
    processor = spm.SentencePieceProcessor(model_proto=model)
    ids, out, marked = [processor.bos_id()], [IGNORE], True

    def add(text, supervised):
        nonlocal marked
        new = processor.encode(text) if marked else processor.encode("\n" + text)[2:]
        ids.extend(new)
        out.extend(new if supervised else [IGNORE] * len(new))
        marked = marked and not text

    for n, (role, text) in enumerate(turns):
        if ROLES[role] == "assistant":
            add(" " + text, True)
            ids.append(processor.eos_id())
            out.append(processor.eos_id())
            marked = legacy
            continue
        if text.count(IMAGE_TAG) == 1:
            text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
        opening = find_template("vicuna_v1").system + " USER: " if n == 0 else "USER: "
        head, *rest = (opening + text + " ASSISTANT:").split(IMAGE_TAG)
        add(head, False)
        for part in rest:
            ids.append(IMAGE)
            out.append(IGNORE)
            marked = True
            add(part, False)
    return ids, out


@pytest.fixture(scope="module")
def m3(golden):
    """Runs of the M3 goldens, each with its tokenizer."""
    model = (golden / "m3/tokenizer.model").read_bytes()
    stored = json.loads((golden / "m3/conversations.json").read_text())
    return [(run, SentencePiece(model, legacy=run["legacy"])) for run in stored["runs"]]


def test_text_with_control_pieces(m3):
    for run, tokenizer in m3:
        assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (run["bos"], run["eos"], run["vocab_size"])
        for text, want in run["raw_tokenisation"].items():
            items = tokenizer.encode_items(tokenizer.markup(text))
            assert [tokenizer.bos, *(i for item in items for i in item)] == want, text


def test_conversations(m3):
    right = 0
    for run, tokenizer in m3:
        for case in run["cases"]:
            turns, name = as_turns(case["sample"]["conversations"]), (run["legacy"], case["name"])
            template, limit = OURS.get(case["template"], case["template"]), case["model_max_length"]
            if not all(text.strip() for text in answers(turns)):
                with pytest.raises(ValueError, match="empty answer"):
                    encode(turns, tokenizer, template)
                continue
            encoded = encode(turns, tokenizer, template)
            if reference_is_right(case, turns):
                n = len(case["input_ids"])
                assert n == len(encoded.ids) or n == limit < len(encoded.ids), name
                np.testing.assert_array_equal(encoded.ids[:n], case["input_ids"], err_msg=str(name))
                np.testing.assert_array_equal(labels(encoded)[:n], case["labels"], err_msg=str(name))
                right += 1
            else:
                assert template == "vicuna_v1", name
                ids, want = expected_by_hand(turns, tokenizer.model, run["legacy"])
                np.testing.assert_array_equal(encoded.ids, ids, err_msg=str(name))
                np.testing.assert_array_equal(labels(encoded), want, err_msg=str(name))
    assert right


def test_what_is_supervised_is_the_answers(m3):
    """Of every case, whatever the reference made of it."""
    for run, tokenizer in m3:
        for case in run["cases"]:
            turns = as_turns(case["sample"]["conversations"])
            if case["template"] != "v1" or not all(text.strip() for text in answers(turns)):
                continue
            encoded = encode(turns, tokenizer, "vicuna_v1")
            kept = encoded.ids[encoded.supervised]
            ends = np.flatnonzero(kept == tokenizer.eos)
            texts = [tokenizer.decode(part) for part in np.split(kept, ends + 1)[:-1]]
            assert texts == answers(turns) and ends[-1] == len(kept) - 1, case["name"]
            assert [encoded.ids[end - 1] for end in encoded.turn_ends] == [tokenizer.eos] * len(texts)


def test_too_long_ends_with_a_turn(m3):
    """The reference trains on what a cut within an answer leaves; here a whole conversation stays, or none."""
    for run, tokenizer in m3:
        for case in run["cases"]:
            turns, limit = as_turns(case["sample"]["conversations"]), case["model_max_length"]
            if len(case["input_ids"]) < limit or not all(text.strip() for text in answers(turns)):
                continue
            encoded = encode(turns, tokenizer, OURS.get(case["template"], case["template"]))
            # The reference cuts ids at first, in which a picture is one; later what its visual tokens made longer.
            pictures = [1] * encoded.images
            fitting = encoded.turn_ends[encoded.turn_ends <= limit]
            if not len(fitting):
                with pytest.raises(ValueError, match="no supervised token"):
                    truncate(encoded, pictures, limit, "cut")
                continue
            cut = truncate(encoded, pictures, limit, "cut")
            np.testing.assert_array_equal(cut.turn_ends, fitting, err_msg=case["name"])
            right = reference_is_right(case, turns)
            ids, want = (case["input_ids"], case["labels"]) if right else (encoded.ids, labels(encoded))
            np.testing.assert_array_equal(cut.ids, ids[: fitting[-1]], err_msg=case["name"])
            np.testing.assert_array_equal(labels(cut), want[: fitting[-1]], err_msg=case["name"])


def test_open_prompts(m3):
    for run, tokenizer in m3:
        for case in run["eval_prompts"]:
            system = case["prompt"].partition(" USER: ")[0]
            turns = [("system", system), ("human", case["question"])]
            if case["conv_mode"] == "vicuna_v1":
                assert system == find_template("vicuna_v1").system
                turns = turns[1:]
            encoded = encode(turns, tokenizer, OURS.get(case["conv_mode"], case["conv_mode"]))
            np.testing.assert_array_equal(encoded.ids, case["input_ids"])
            assert not encoded.supervised.any() and not len(encoded.turn_ends)


def test_convllava(golden):
    tokenizer = SentencePiece.load(golden / "convllava/tokenizer.model")
    stored = json.loads((golden / "convllava/text.json").read_text())
    arrays = np.load(golden / "convllava/text.npz")
    samples = {name: case for name, case in stored.items() if isinstance(case, dict) and "conversation" in case}
    assert samples
    for name, case in samples.items():
        encoded = encode(as_turns(case["conversation"]), tokenizer, "vicuna_v1")
        np.testing.assert_array_equal(encoded.ids, arrays[f"{name}/input_ids"], err_msg=name)
        np.testing.assert_array_equal(labels(encoded), arrays[f"{name}/labels"], err_msg=name)
    question = stored["inference"]["prompt"].partition(" USER: ")[2].removesuffix(" ASSISTANT:")
    np.testing.assert_array_equal(
        encode([("user", question)], tokenizer, "vicuna_v1").ids, arrays["inference/input_ids"]
    )
