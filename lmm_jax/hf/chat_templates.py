"""The chat template that a folder brings, compared with the layout of prompts that we chose for it.

A template is a program, which we never run. But the strings in it tell what it writes: a folder whose template names
the marks of another layout, or another system prompt, was trained with other prompts than ours.
"""

import re

from etils import epath

from lmm_jax import families, strict_json
from lmm_jax.families.kinds import Prompt

# What tells layouts apart: a name for readers, and a pattern of the strings that a template joins.
MARKS = {
    **{f"`{mark}`": re.escape(mark) for mark in ("ASSISTANT:", "[INST]", "### Assistant", "<end_of_utterance>")},
    **{f"`<|{mark}|>`": re.escape(f"<|{mark}|>") for mark in ("im_start", "assistant", "start_header_id")},
    **{f"`<|{mark}|>`": re.escape(f"<|{mark}|>") for mark in ("start_of_role", "vision_start", "channel")},
    "`<start_of_turn>`": r"<start_of_turn>|<\|turn>",
    "`<|START_OF_TURN_TOKEN|>`": r"<\|START_OF_TURN_TOKEN\|>",
    "`<｜Assistant｜>`": r"<｜Assistant｜>",
    "a line break after `<|im_end|>`": r"<\|im_end\|>(['\"]\s*[+~]\s*['\"])?\n",
    "the system prompt 'You are a helpful assistant.'": r"You are a helpful assistant\.",
    "a system prompt that names the model": r"You are [A-Z]\w+, (created|developed|trained) by",
    "a date": r"Today Date|Today's Date|Knowledge Cutoff Date|Cutting Knowledge Date",
}
FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")


def find_differences(folder, template) -> str:
    """What speaks against a layout for a model, in a sentence that says what to do; "" if nothing does.

    Args:
      folder: of the model.
      template: a name that `data.conversation.find_template` knows, which was chosen for it.
    """
    file, text = _read(epath.Path(folder))
    found, ours = _marks(text), _marks(_text(families.prompts()[template]))
    if not text or found == ours:
        return ""
    more = [mark for mark in found if mark not in ours]
    less = [mark for mark in ours if mark not in found]
    told = [f"{word} {' and '.join(marks)}" for word, marks in (("has", more), ("lacks", less)) if marks]
    like = [name for name, prompt in families.prompts().items() if found and _marks(_text(prompt)) == found]
    known = f"the folder's looks like '{like[0]}'" if like else "none of ours looks like the folder's"
    return (
        f"{folder}: its chat template ({file}) is another than the layout '{template}' that was chosen: it "
        f"{' and '.join(told)}; {known}. template='{like[0] if like else template}' decides"
    )


def _marks(text):
    """Names of the marks in a text, in the order of `MARKS`."""
    return [name for name, pattern in MARKS.items() if re.search(pattern, text)]


def _text(prompt: Prompt):
    return "".join([prompt.opening, *prompt.user, *prompt.assistant, *(prompt.picture or ()), prompt.system])


def _read(folder):
    """`(file, text)` of the chat template that a folder brings, with its escaped line breaks; ("", "") if none."""
    for name in FILES:
        path = folder / name
        try:
            found = strict_json.read_bytes(path).decode().replace("\r\n", "\n")
            if not name.endswith(".jinja"):
                found = strict_json.parse(found).get("chat_template")
        except (OSError, ValueError, AttributeError):  # of which others say what is wrong
            continue
        if isinstance(found, list):  # several by name, as some tokenizers have them
            found = next(
                (t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None
            )
        if isinstance(found, str) and found:
            return name, found.replace("\\n", "\n")
    return "", ""
