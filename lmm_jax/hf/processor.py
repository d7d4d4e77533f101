"""What an exported folder holds beside weights and `config.json`: tokenizer, chat template, image processor, generation.

transformers makes of these files the ids of `data.conversation` and the pixels of `data.views`. What it cannot:

- Control pieces and `<image>` in what a user or assistant says become ids; ours spells them out, except `<image>` of a
  user. `apply_chat_template(…, sanitize_control_tokens=True)` of transformers 5 spells them out too.
- `tokenizer.apply_chat_template` alone gives no begin piece, the processor's does; as in llava-hf's folders.
- A `strip` piece drops what white space follows, also that of a user, and of the template where ours keeps it: the
  newline between the turns of phi3.
- Of a tokenizer with `remove_extra_whitespaces` (LLaMA's has it not), spaces in a row after a control piece become
  one, and those at the end of a text are dropped; ours does that only where a word mark is put. `legacy` agrees.
- With torchvision installed, transformers resizes by it and not by Pillow: load with `backend="pil"` (4.x:
  `use_fast=False`). It drops an alpha channel, where ours composites on white.
- Of M3 the files stand for the largest scale. For a smaller one, set `processor.patch_size = size / sqrt(scale)`, and
  hand the pooled features of `model.model.get_image_features` to `generate` as `mm_encoder_outputs={"image": …}`.
"""

import base64
import json
import math

from etils import epath
from sentencepiece import sentencepiece_model_pb2 as sentencepiece

from lmm_jax.data.arrangement import Arrangement
from lmm_jax.data.conversation import IMAGE_TAG, SYSTEM, TEMPLATES, stop_id
from lmm_jax.hf.load import CLIP_MEAN, CLIP_STD

PAD = "<pad>"
MULTIPLE = 64  # rows of the tables, as llava-hf pads them: 32000 -> 32064
BICUBIC = 3  # Pillow's number
PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "fast_vlm": "LlavaProcessor",
    "deepstack": "DeepStackProcessor",
}
REMOTE = "processing_deepstack"  # the module that ships with "deepstack"


def write_processor(folder, config, tokenizer, architecture):
    """Writes the tokenizer's and processor's files into an exported folder; of transformers, 4.46 and later read them.

    Args:
      folder: that exists.
      config: of the model, see `lmm_jax.config.base`.
      tokenizer: a `Tokenizer`; `Tokenizer.load` reads an equal one back.
      architecture: "llava", "llava_next" (sequence "unpad"), "fast_vlm" (ConvLLaVA) or "deepstack" (remote code).

    Raises:
      ValueError: a SentencePiece model of a kind that tokenizer.json cannot hold.
    """
    folder = epath.Path(folder)
    image_processor = _image_processor(config, architecture)
    files = {
        "tokenizer.json": tokenizer_json(tokenizer),
        "processor_config.json": _processor(config, architecture),
        "preprocessor_config.json": image_processor | {"processor_class": PROCESSORS[architecture]},
        "generation_config.json": generation_config(tokenizer, config.data.template),
    }
    tokenizer.save(folder)
    settings = folder / "tokenizer_config.json"
    files[settings.name] = json.loads(settings.read_text()) | _tokenizer_settings(tokenizer, architecture)
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 1
        (folder / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer, config.data.template))


def added_ids(tokenizer) -> tuple[int, int, int]:
    """`(id of <image>, id of <pad>, rows)`: the pieces that are added to ours, and rows of the padded tables."""
    image = tokenizer.added.get(IMAGE_TAG, (tokenizer.vocab_size,))[0]
    pad = tokenizer.added.get(PAD, (max(tokenizer.vocab_size, image + 1),))[0]
    rows = max(tokenizer.vocab_size, image + 1, pad + 1)
    return image, pad, -(-rows // MULTIPLE) * MULTIPLE


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


def _tokenizer_settings(tokenizer, architecture):
    """Beside what `Tokenizer.save` writes; the pieces that it does not name as added are in tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # others build a tokenizer of their own, not that of the file
        "processor_class": PROCESSORS[architecture],
        "bos_token": tokenizer.piece(tokenizer.bos),
        "eos_token": tokenizer.piece(tokenizer.eos),
        "unk_token": _model(tokenizer).trainer_spec.unk_piece,
        "pad_token": PAD,
        "padding_side": "left",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _processor(config, architecture):
    vision = config.model.vision
    about = {
        "processor_class": PROCESSORS[architecture],
        "image_token": IMAGE_TAG,
        # Of a visual token at the largest scale, in pixels: of M3's and ConvLLaVA's too.
        "patch_size": vision.image_size // math.isqrt(max(config.model.scales)),
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    if config.model.encoder == "vit":  # which counts its class token and drops it
        about |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    if architecture == "deepstack":
        about["auto_map"] = {"AutoProcessor": f"{REMOTE}.DeepStackProcessor"}
    return about


def _image_processor(config, architecture):
    side, data = config.model.vision.image_size, config.data
    square = {"height": side, "width": side}
    about = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BICUBIC,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    if architecture == "deepstack":
        about |= {
            "image_processor_type": "DeepStackImageProcessor",
            "auto_map": {"AutoImageProcessor": f"{REMOTE}.DeepStackImageProcessor"},
            "aspect": data.aspect,
            "tilings": [list(tiling) for tiling in data.tilings],  # (columns, rows)
            "zoom": data.zoom,
        }
    elif data.aspect == "pad":  # to a square, before all else
        about |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    elif data.aspect == "stretch":
        about |= {"size": square, "do_center_crop": False}
    elif data.aspect == "anyres":
        pinpoints = [[rows * side, columns * side] for columns, rows in Arrangement.from_config(config).tilings]
        about |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "do_pad": True,  # a batch to as many views
            "image_grid_pinpoints": pinpoints,
        }
    return about


# ---- tokenizer.json

_KINDS = sentencepiece.ModelProto.SentencePiece  # NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE
SPACE, MARK = " ", "▁"


def _model(tokenizer):
    return sentencepiece.ModelProto.FromString(tokenizer.model)


def tokenizer_json(tokenizer) -> dict:
    """The content of Hugging Face's tokenizer.json, for BPE and Unigram models.

    Raises:
      ValueError: a model of another type, or one that writes spaces in another way than LLaMA's.
    """
    model = _model(tokenizer)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    unigram = trainer.model_type == trainer.UNIGRAM
    if not unigram and trainer.model_type != trainer.BPE:
        raise ValueError("tokenizer.json holds SentencePiece models of type BPE and Unigram, this is of neither")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError("tokenizer.json needs a SentencePiece model that writes a space as ▁ before a word")
    vocabulary = _vocabulary(tokenizer, model)
    bos = tokenizer.piece(tokenizer.bos)
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    decoders = [_replace({"String": MARK}, SPACE), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": SPACE, "start": 1, "stop": 0})
    normalizers, pre_tokenizers = _spaces(normalizer, tokenizer.legacy)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer, model, vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(model, vocabulary) if unigram else _bpe(model, vocabulary),
    }


def _vocabulary(tokenizer, model):
    """The piece of each id; all of them, so that each keeps its number."""
    image, pad, _ = added_ids(tokenizer)
    added = {i: piece for piece, (i, _) in tokenizer.added.items()} | {image: IMAGE_TAG, pad: PAD}
    pieces = dict(enumerate(piece.piece for piece in model.pieces)) | added
    return [pieces.get(i, f"<|nothing_{i}|>") for i in range(max(pieces) + 1)]


def _added_tokens(tokenizer, model, vocabulary):
    """What is found in text before it is tokenised: control and user-defined pieces, and those added to the model."""
    image, pad, _ = added_ids(tokenizer)
    strips = {image: False, pad: False} | dict(tokenizer.added.values())
    user_defined = set()
    for i, piece in enumerate(model.pieces):
        if piece.type in (_KINDS.UNKNOWN, _KINDS.CONTROL, _KINDS.USER_DEFINED):
            strips.setdefault(i, False)
        if piece.type == _KINDS.USER_DEFINED and tokenizer.decode([i]):  # not one of those that structure a prompt
            user_defined.add(i)
    return [
        {
            "id": i,
            "content": vocabulary[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": strips[i],
            "normalized": False,
            "special": i not in user_defined,
        }
        for i in sorted(strips)
    ]


def _replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def _metaspace(replacement, scheme):
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": False}


def _spaces(settings, legacy):
    """`(normalizers, pre-tokenizers)` that put and write word marks as SentencePiece does.

    A normalizer acts on each stretch of text between control pieces. Only Metaspace can mark the first alone; but it
    leaves out the mark before a text that starts with what it replaces. So spaces are marks by then, except where
    SentencePiece itself takes several for one.
    """
    steps = []
    if settings.precompiled_charsmap:
        charsmap = base64.b64encode(settings.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if settings.remove_extra_whitespaces:
        steps += [_replace({"Regex": " {2,}"}, SPACE), _replace({"Regex": r"[ ▁]+\z"}, "")]
    first = settings.add_dummy_prefix and not legacy
    if legacy and settings.remove_extra_whitespaces:
        steps.append(_replace({"Regex": r"\A +"}, ""))
    if legacy and settings.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": MARK})
    if not (first and settings.remove_extra_whitespaces):
        steps.append(_replace({"String": SPACE}, MARK))
    return steps, [_metaspace(SPACE, "first" if first else "never"), _metaspace(MARK, "never")]


def _bpe(model, vocabulary):
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _KINDS.NORMAL}
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(scores, key=scores.get, reverse=True)  # stable: of equals the earlier one
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in scores and piece[at:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.trainer_spec.unk_piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: i for i, piece in enumerate(vocabulary)},
        "merges": merges,
    }


def _unigram(model, vocabulary):
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _KINDS.NORMAL}
    # No text may take the other pieces for words: worse than any word in characters that are not known.
    never = min(scores.values(), default=0.0) * 32 - 1000
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": [[piece, scores.get(piece, never)] for piece in vocabulary],
    }


# ---- chat_template.jinja

# `gap.text` is what the next text begins with: nothing, or the space that becomes its word mark.
CHAT = """\
{%- macro spoken(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}{{ item.text if item.type == 'text' else form.image ~ '\\n' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set gap = namespace(text='') -%}
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
{{ form.head ~ system ~ form.tail if loop.first else form.user }}
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
{%- if not loop.first -%}{{ form.image }}{%- set gap.text = form.after_image -%}{%- endif -%}
{%- if part -%}{{ gap.text ~ part }}{%- set gap.text = form.after_text -%}{%- endif -%}
{%- endfor -%}
{%- if form.answer -%}
{{ (gap.text if form.answer_is_text else '') ~ form.answer }}{%- set gap.text = '' -%}
{%- endif -%}
{%- else -%}
{{ gap.text ~ form.assistant ~ spoken(turn.content) ~ form.end }}{%- set gap.text = form.after_end -%}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(tokenizer, template) -> str:
    """The Jinja template of a chat, whose ids are those of `conversation.encode`.

    Content is text with `<image>` in it, or a list of `{"type": "text", "text": …}` and `{"type": "image"}`, each of
    which stands for `<image>` and a newline. The opening of the answer follows every user's turn, as in training,
    with `add_generation_prompt` or without.
    """
    form = TEMPLATES[template]
    head, slot, tail = form.opening.partition(SYSTEM)
    prefix = _model(tokenizer).normalizer_spec.add_dummy_prefix
    space = SPACE if prefix and not tokenizer.legacy else ""  # if legacy, the normalizer puts the mark
    answer = tokenizer.markup(form.user[1])
    values = {
        "image": IMAGE_TAG,
        "head": head,
        "system": form.system if slot else "",
        "tail": tail,
        "takes_system": bool(slot),
        "user": form.user[0],
        "answer": form.user[1],
        "answer_is_text": bool(answer) and isinstance(answer[0], str),
        "assistant": form.assistant[0],
        "end": form.assistant[1],
        "captions": form.captions,
        "apart": form.apart,
        "after_image": space,
        "after_text": SPACE if form.apart and prefix else "",
        "after_end": space if form.apart else "",
    }
    return "{%- set form = " + json.dumps(values, indent=1, ensure_ascii=False) + " -%}\n" + CHAT
