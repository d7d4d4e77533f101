"""What an exported folder holds beside weights and `config.json`: tokenizer, chat template, pictures, generation.

From these files transformers makes the ids of `data.conversation` and the pixels of `data.views`. What remains:

- Control pieces in what is said, and `<image>` in answers, become ids; ours spells them out. Clean what you do not
  trust before you hand it to transformers.
- The chat template writes no begin piece, as in llava-hf's folders: the tokenizer puts it before a text, unless it is
  told to add no special tokens. See `begin_note`.
- An answer that begins with a line break shares a piece with the line break before it in layouts that have one there
  (Qwen's); ours gives it one of its own, as it has when it is generated.
- After a `strip` piece transformers drops white space that ours keeps: the newline between the turns of phi3, and
  what a user's text begins with.
- In template qa, nothing parts a question from its answer if the tokenizer puts no word mark before a text.
- With torchvision installed, transformers resizes by it and not by Pillow: load with `backend="pil"` (4.x:
  `use_fast=False`). It drops an alpha channel, where ours composites on white; 4.x fails at sides of 1 or 3 pixels.
- llava_next rounds before it cuts padding: 2 of 54,161 sizes tried have two rows or columns of tokens more than ours.
- llava_onevision sees several pictures of a conversation whole where they are a list of their own in that of all
  pictures, as `apply_chat_template` hands them on; those of a flat list it tiles, each by itself.
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
from lmm_jax.hf.write_config import get_field, listed, own_scales, picture_keys, pixel_keys, tiling_pixels

BICUBIC = 3  # Pillow's number
SPACE, MARK = " ", "▁"


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
    name, image = whole.processor, whole.image_piece
    settings = _tokenizer_config(tokenizer, config.data.template, image)
    files = {
        "tokenizer_config.json": {**settings, "processor_class": name},
        "processor_config.json": {"processor_class": name, **processor_config(config, whole)},
        "preprocessor_config.json": {"processor_class": name, **preprocessor_config(config, whole)},
        "generation_config.json": generation_config(
            tokenizer, config.data.template, config.model.decoder.vocab_size, image
        ),
    }
    tokenizer.save(folder)  # for us; what transformers needs too is written over it
    (folder / "tokenizer.json").write_bytes(tokenizer_json(tokenizer, image))
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer, config.data.template, image))


def generation_config(tokenizer, template, held=0, placeholder=IMAGE_TAG) -> dict:
    """Greedy decoding to the end of an answer; what is added behind the `held` rows of a model is never generated.

    These are a placeholder and padding that its tokenizer has not, and rows that fill a table up; we cannot say them.
    Rows that a released table has beyond its pieces both can, as that model itself.
    """
    image, pad, rows = added_ids(tokenizer, held, placeholder)
    stop = stop_id(tokenizer, template)
    never = {image, pad, *range(tokenizer.vocab_size, rows)} - {stop}
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stop,
        "pad_token_id": pad,
        "do_sample": False,
        "suppress_tokens": sorted(token for token in never if token >= held),
    }


def _tokenizer_config(tokenizer, template, placeholder):
    return {
        **tokenizer_config(tokenizer, stop_id(tokenizer, template), placeholder),
        "tokenizer_class": "PreTrainedTokenizerFast",  # others take only the vocabulary from tokenizer.json
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def processor_config(config, whole) -> dict:
    """Content of `processor_config.json`: how many placeholders transformers puts where a picture goes."""
    vision, encoder = config.model.vision, encoder_family(config.model)
    if whole.pixels:
        return {}
    if not whole.llava_keys:
        return {"image_seq_len": min(own_scales(config.model))}
    if whole.shrink_key:
        return {
            "image_token": IMAGE_TAG,
            "num_image_tokens": max(config.model.scales) + encoder.class_token,  # which the strategy drops
            "vision_feature_select_strategy": select_strategy(encoder),
            whole.shrink_key: f"anyres_max_{config.data.shrink}",
        }
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
    if whole.pixels or whole.tile_key or whole.most_tiles_key:  # classes that ask other keys than CLIP's and LLaVA's
        del about["crop_size"], about["do_center_crop"]
        fixed = {key: allowed[0] for key, allowed in whole.picture_constants.items()}
        return about | fixed | _size_keys(config, whole)
    if whole.picture_fields:  # code that the folder ships reads our own words
        fields = {key: listed(get_field(config, field)) for key, field in whole.picture_fields.items()}
        return about | fields | {"size": square} | _auto_map(whole, "AutoProcessor", "AutoImageProcessor")
    if whole.picture_defaults:  # a class that has no crop
        del about["crop_size"], about["do_center_crop"]
        about |= {"size": square}
    if data.aspect == "pad":  # to a square, before all else
        about |= {"do_pad": True}
    elif data.aspect == "stretch":
        about |= {"size": square, "do_center_crop": False}
    elif data.aspect == "anyres":
        about |= {"do_pad": True}  # a batch to as many views
    if whole.tilings_key:
        about[whole.tilings_key] = tiling_pixels(config)
    return about


def _size_keys(config, whole):
    """Into how many pixels or tiles an image processor of another kind than CLIP's makes a picture."""
    side, tilings = config.model.vision.image_size, config.data.tilings
    if whole.pixels:
        return pixel_keys(config)
    if whole.tile_key:
        longest = side * max(map(max, tilings))
        return {"size": {"longest_edge": longest}, whole.tile_key: {"longest_edge": side}}
    counts = [columns * rows for columns, rows in tilings]
    tiles = {whole.fewest_tiles_key: min(counts), whole.most_tiles_key: max(counts)}
    return tiles | {"size": {"height": side, "width": side}}


def _auto_map(whole, *names):
    """Where transformers finds classes of the code that the folder ships, if it ships any."""
    return {"auto_map": {name: whole.auto_map[name] for name in names}} if whole.auto_map else {}


# The chat template: it writes a conversation as one text whose ids are those of `conversation.encode`. Its first
# line, which `chat_template` writes, sets `form`: what is fixed of the layout. Then, turn by turn:
#
#   spoken(content)   the text of a turn; of a list its texts, and the placeholder and a newline for each picture
#   said(content)     the same, without white space around it where the layout has none
#   mark(text)        what parts `text` from what came before: `next.mark`, unless its own space does
#   write(text)       text that goes on what came before
#   fixed(part)       a part of the layout: its text, and whether spaces count from here on
#
# Text meets text with `next.mark` between them: nothing, or the space that becomes the next one's word mark.
# `next.exact` says that all its spaces count although the model has `remove_extra_whitespaces`: what a tokenizer's
# `encode` does without a prefix. They are written as the marks that they become. What stands between `generation` and
# `endgeneration` is what the model is trained to say: `return_assistant_tokens_mask` finds it by them.
CHAT = """\
{%- macro spoken(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}{{ item.text if item.type == 'text' else form.image ~ '\\n' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro said(content) -%}{{ spoken(content)|trim if form.trimmed else spoken(content) }}{%- endmacro -%}
{%- macro mark(text) -%}{{ '' if form.once and text[:1] == ' ' else next.mark }}{%- endmacro -%}
{%- macro write(text) -%}{{ text|replace(' ', '▁') if next.exact else text }}{%- endmacro -%}
{%- macro fixed(part) -%}
{{ write(part.text) }}
{%- if 'exact' in part -%}{%- set next.exact = part.exact -%}{%- endif -%}
{%- endmacro -%}
{%- set next = namespace(mark='', exact=false) -%}
{%- set system, turns = form.system, messages -%}
{%- if messages[0].role == 'system' -%}
{%- if not form.takes_system -%}{{ raise_exception('this model has no place for a system turn') }}{%- endif -%}
{%- set system, turns = said(messages[0].content), messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn.role != ('user', 'assistant')[loop.index0 % 2] -%}
{{ raise_exception('turns of user and assistant must alternate, and the user begins') }}
{%- endif -%}
{%- if turn.role == 'user' -%}
{%- if not loop.first -%}{{ fixed(form.user) }}
{%- elif system is undefined -%}{{ fixed(form.without_system) }}
{%- else -%}{{ fixed(form.head) ~ write(system) ~ fixed(form.tail) }}{%- endif -%}
{%- set parts = said(turn.content).split(form.image) -%}
{%- if form.in_place -%}
{{ write(form.before_text) if parts[0] or parts|length == 1 }}
{%- elif form.captions -%}
{%- set parts = [''] * parts|length -%}
{%- elif form.apart -%}
{%- set parts = parts|map('trim')|list -%}
{%- elif parts|length == 2 -%}
{%- set question = (parts|join)|trim -%}
{%- set parts = ['', '\\n' ~ question if question else ''] -%}
{%- endif -%}
{%- for part in parts -%}
{%- if not loop.first -%}
{%- if form.in_place and part[:1] == '\\n' -%}{%- set part = part[1:] -%}{%- endif -%}
{{ fixed(form.before_picture) ~ form.image }}{%- set next.mark, next.exact = form.after_image, false -%}
{%- if form.after_picture.text -%}{{ fixed(form.after_picture) }}{%- set next.mark = '' -%}{%- endif -%}
{%- endif -%}
{%- if part -%}
{{ mark(part) ~ write(part) }}{%- set next.mark = form.after_text -%}
{%- endif -%}
{%- endfor -%}
{%- if form.answer.text -%}
{{ (mark(form.answer.text) if form.answer_is_text else '') ~ fixed(form.answer) }}{%- set next.mark = '' -%}
{%- endif -%}
{%- else -%}
{%- generation -%}
{%- set answer = said(turn.content) -%}
{{ mark(form.assistant.text ~ answer) ~ fixed(form.assistant) ~ write(answer) ~ fixed(form.end) }}
{%- endgeneration -%}
{%- set next.mark = form.after_end -%}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(tokenizer, template, placeholder=IMAGE_TAG) -> str:
    """The Jinja template of a chat, whose ids are those of `conversation.encode`.

    Content is text with the placeholder of pictures in it, or a list of `{"type": "text", "text": …}` and `{"type":
    "image"}`, each of which stands for it and a newline. The opening of the answer follows every user's turn, as in
    training, with `add_generation_prompt` or without.
    """
    form = find_template(template)
    head, slot, tail = form.opening.partition(SYSTEM)
    prefix, one_space, once = converter(tokenizer).spaces(tokenizer)
    space = SPACE if prefix and not tokenizer.prefix_after_control else ""  # else the normalizer marks

    def fixed(text, ends_turn=False):
        items = tokenizer.markup(text)
        after_id = not tokenizer.prefix_after_control if any(isinstance(item, int) for item in items) else None
        exact = True if ends_turn and items and isinstance(items[-1], str) else after_id
        matters = exact is not None and one_space and not form.apart
        if matters and after_id:  # within the part, too
            at = next(n for n, item in enumerate(items) if isinstance(item, int))
            written = [item if isinstance(item, str) else tokenizer.piece(item) for item in items]
            text = "".join(written[:at]) + "".join(written[at:]).replace(SPACE, MARK)
        return {"text": text} | ({"exact": exact} if matters else {})

    answer = tokenizer.markup(form.user[1])
    before, after = form.picture or ("", "")
    values = {
        "image": placeholder,
        "head": fixed(head),
        "tail": fixed(tail),
        "without_system": fixed(form.without_system or ""),
        "takes_system": bool(slot),
        "user": fixed(form.user[0]),
        "answer": fixed(form.user[1], ends_turn=True),
        "answer_is_text": bool(answer) and isinstance(answer[0], str),
        "assistant": fixed(form.assistant[0]),
        "end": fixed(form.assistant[1], ends_turn=True),
        "in_place": form.picture is not None,
        "before_picture": fixed(before),
        "after_picture": fixed(after),
        "before_text": form.before_text,
        "trimmed": form.trimmed,
        "once": once,
        "captions": form.captions,
        "apart": form.apart,
        "after_image": space,
        "after_text": SPACE if form.apart and prefix else "",
        "after_end": space if form.apart else "",
    }
    if form.without_system is None:
        values["system"] = form.system if slot else ""
    return "{%- set form = " + json.dumps(values, indent=1, ensure_ascii=False) + " -%}\n" + CHAT


def begin_note(tokenizer) -> str:
    """What a reader of an export has to know of the begin piece: who puts it before a rendered chat."""
    if tokenizer.bos is None:
        return "The tokenizer has no begin piece: a rendered chat is tokenised as it is."
    piece = tokenizer.piece(tokenizer.bos)
    return (
        f"The chat template writes no begin piece. The tokenizer puts `{piece}` before a text, as the model was "
        "trained with: a rendered chat is tokenised with special tokens (`add_special_tokens=True`), as a processor "
        "does by itself. A server that tokenises it without them, as vLLM's chat endpoint does, has to be asked with "
        '`"add_special_tokens": true` in each request (in its openai client: '
        '`extra_body={"add_special_tokens": True}`); without the piece answers are worse.'
    )
