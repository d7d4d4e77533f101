"""What an exported folder holds beside weights and `config.json`: tokenizer, chat template, pictures, generation.

From these files transformers makes the ids of `data.conversation` and the pixels of `data.views`. What remains:

- Control pieces in what is said, and `<image>` in answers, become ids; ours spells them out. Clean what you do not
  trust before you hand it to transformers.
- `tokenizer.apply_chat_template` gives no begin piece, only the processor's does; as in llava-hf's folders.
- After a `strip` piece transformers drops white space that ours keeps: the newline between the turns of phi3, and
  what a user's text begins with.
- In template qa, nothing parts a question from its answer if the tokenizer puts no word mark before a text.
- With torchvision installed, transformers resizes by it and not by Pillow: load with `backend="pil"` (4.x:
  `use_fast=False`). It drops an alpha channel, where ours composites on white; 4.x fails at sides of 1 or 3 pixels.
- llava_next rounds before it cuts padding: 2 of 54,161 sizes tried have two rows or columns of tokens more than ours.
- Of M3 the files stand for the largest scale. For a smaller one, set `processor.patch_size = size / sqrt(scale)`, and
  hand the pooled features of `model.model.get_image_features` to `generate` as `mm_encoder_outputs={"image": …}`.
"""

import json
import math

from etils import epath

from lmm_jax.data.conversation import IMAGE_TAG, find_template, stop_id
from lmm_jax.families.kinds import SYSTEM
from lmm_jax.hf.names import encoder_family
from lmm_jax.hf.read_config import select_strategy
from lmm_jax.hf.tokenizer_json import added_ids, converter, tokenizer_config, tokenizer_json
from lmm_jax.hf.write_config import get_field, listed, picture_keys, tiling_pixels

BICUBIC = 3  # Pillow's number
SPACE = " "


def write_processor(folder, config, tokenizer, whole):
    """Writes the files of tokenizer and processor into an exported folder, for transformers 4.57 and later.

    Args:
      folder: that exists.
      config: of the model, see `lmm_jax.config.base`.
      tokenizer: a `Tokenizer`; `load_tokenizer` reads an equal one back.
      whole: the family of `families.WHOLES` that the folder is of.

    Raises:
      ValueError: a tokenizer that tokenizer.json cannot hold.
    """
    folder = epath.Path(folder)
    name = whole.processor
    files = {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {"processor_class": name, **_tokenizer_config(tokenizer)},
        "processor_config.json": {"processor_class": name, **processor_config(config, whole)},
        "preprocessor_config.json": {"processor_class": name, **preprocessor_config(config, whole)},
        "generation_config.json": generation_config(tokenizer, config.data.template),
    }
    tokenizer.save(folder)  # for us; its settings are written over by those that transformers needs too
    for file, content in files.items():
        indent = None if file == "tokenizer.json" else 1
        (folder / file).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer, config.data.template))


def generation_config(tokenizer, template) -> dict:
    """Greedy decoding to the end of an answer; pictures, padding and rows without a piece are never generated."""
    image, pad, rows = added_ids(tokenizer)
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stop_id(tokenizer, template),
        "pad_token_id": pad,
        "do_sample": False,
        "suppress_tokens": sorted({image, pad, *range(tokenizer.vocab_size, rows)}),
    }


def _tokenizer_config(tokenizer):
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # others take only the vocabulary from tokenizer.json
        **tokenizer_config(tokenizer),
        "padding_side": "left",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def processor_config(config, whole) -> dict:
    """Content of `processor_config.json`: how many placeholders transformers puts where a picture goes."""
    vision, encoder = config.model.vision, encoder_family(config.model)
    about = {
        "image_token": IMAGE_TAG,
        # Of a visual token at the largest scale, in pixels: of M3's and ConvLLaVA's too.
        "patch_size": vision.image_size // math.isqrt(max(config.model.scales)),
        "num_additional_image_tokens": int(encoder.class_token),  # counted, and dropped by the strategy
        "vision_feature_select_strategy": select_strategy(encoder),
    }
    return about | _auto_map(whole, "AutoProcessor", "AutoImageProcessor")


def preprocessor_config(config, whole) -> dict:
    """Content of `preprocessor_config.json`: how transformers makes the pixels of a picture."""
    side, data = config.model.vision.image_size, config.data
    square = {"height": side, "width": side}
    about = picture_keys(config) | {
        "image_processor_type": whole.image_processors[data.aspect],
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BICUBIC,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    if whole.picture_fields:  # code that the folder ships reads our own words
        fields = {key: listed(get_field(config, field)) for key, field in whole.picture_fields.items()}
        return about | fields | {"size": square} | _auto_map(whole, "AutoProcessor", "AutoImageProcessor")
    if data.aspect == "pad":  # to a square, before all else
        about |= {"do_pad": True}
    elif data.aspect == "stretch":
        about |= {"size": square, "do_center_crop": False}
    elif data.aspect == "anyres":
        about |= {"do_pad": True}  # a batch to as many views
    if whole.tilings_key:
        about[whole.tilings_key] = tiling_pixels(config)
    return about


def _auto_map(whole, *names):
    """Where transformers finds classes of the code that the folder ships, if it ships any."""
    return {"auto_map": {name: whole.auto_map[name] for name in names}} if whole.auto_map else {}


# The chat template: it writes a conversation as one text whose ids are those of `conversation.encode`. Its first
# line, which `chat_template` writes, sets `form`: what is fixed of the layout. Then, turn by turn:
#
#   spoken(content)   the text of a turn; of a list its texts, and the placeholder and a newline for each picture
#   write(text)       text that goes on what came before
#   fixed(part)       a part of the layout: its text, and whether spaces count from here on
#
# Text meets text with `next.mark` between them: nothing, or the space that becomes the next one's word mark.
# `next.exact` says that all its spaces count although the model has `remove_extra_whitespaces`: what a tokenizer's
# `encode` does without a prefix. They are written as the marks that they become.
CHAT = """\
{%- macro spoken(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}{{ item.text if item.type == 'text' else form.image ~ '\\n' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro write(text) -%}{{ text|replace(' ', '▁') if next.exact else text }}{%- endmacro -%}
{%- macro fixed(part) -%}
{{ write(part.text) }}
{%- if 'exact' in part -%}{%- set next.exact = part.exact -%}{%- endif -%}
{%- endmacro -%}
{%- set next = namespace(mark='', exact=false) -%}
{%- set system, turns = form.system, messages -%}
{%- if messages[0].role == 'system' -%}
{%- if not form.takes_system -%}{{ raise_exception('this model has no place for a system turn') }}{%- endif -%}
{%- set system, turns = spoken(messages[0].content), messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn.role != ('user', 'assistant')[loop.index0 % 2] -%}
{{ raise_exception('turns of user and assistant must alternate, and the user begins') }}
{%- endif -%}
{%- if turn.role == 'user' -%}
{{ fixed(form.head) ~ write(system) ~ fixed(form.tail) if loop.first else fixed(form.user) }}
{%- set parts = spoken(turn.content).split(form.image) -%}
{%- if form.captions -%}
{%- set parts = [''] * parts|length -%}
{%- elif form.apart -%}
{%- set parts = parts|map('trim')|list -%}
{%- elif parts|length == 2 -%}
{%- set question = (parts|join)|trim -%}
{%- set parts = ['', '\\n' ~ question if question else ''] -%}
{%- endif -%}
{%- for part in parts -%}
{%- if not loop.first -%}{{ form.image }}{%- set next.mark, next.exact = form.after_image, false -%}{%- endif -%}
{%- if part -%}{{ next.mark ~ write(part) }}{%- set next.mark = form.after_text -%}{%- endif -%}
{%- endfor -%}
{%- if form.answer.text -%}
{{ (next.mark if form.answer_is_text else '') ~ fixed(form.answer) }}{%- set next.mark = '' -%}
{%- endif -%}
{%- else -%}
{{ next.mark ~ fixed(form.assistant) ~ write(spoken(turn.content)) ~ fixed(form.end) }}
{%- set next.mark = form.after_end -%}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(tokenizer, template) -> str:
    """The Jinja template of a chat, whose ids are those of `conversation.encode`.

    Content is text with `<image>` in it, or a list of `{"type": "text", "text": …}` and `{"type": "image"}`, each of
    which stands for `<image>` and a newline. The opening of the answer follows every user's turn, as in training,
    with `add_generation_prompt` or without.
    """
    form = find_template(template)
    head, slot, tail = form.opening.partition(SYSTEM)
    prefix, one_space = converter(tokenizer).spaces(tokenizer)
    space = SPACE if prefix and not tokenizer.prefix_after_control else ""  # else the normalizer marks

    def fixed(text, ends_turn=False):
        items = tokenizer.markup(text)
        after_id = not tokenizer.prefix_after_control if any(isinstance(item, int) for item in items) else None
        exact = True if ends_turn and items and isinstance(items[-1], str) else after_id
        matters = exact is not None and one_space and not form.apart
        return {"text": text} | ({"exact": exact} if matters else {})

    answer = tokenizer.markup(form.user[1])
    values = {
        "image": IMAGE_TAG,
        "head": fixed(head),
        "system": form.system if slot else "",
        "tail": fixed(tail),
        "takes_system": bool(slot),
        "user": fixed(form.user[0]),
        "answer": fixed(form.user[1], ends_turn=True),
        "answer_is_text": bool(answer) and isinstance(answer[0], str),
        "assistant": fixed(form.assistant[0]),
        "end": fixed(form.assistant[1], ends_turn=True),
        "captions": form.captions,
        "apart": form.apart,
        "after_image": space,
        "after_text": SPACE if form.apart and prefix else "",
        "after_end": space if form.apart else "",
    }
    return "{%- set form = " + json.dumps(values, indent=1, ensure_ascii=False) + " -%}\n" + CHAT
