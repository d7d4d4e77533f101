"""A tiny SmolVLM with drawn weights, in a folder as transformers writes it, and what its processor makes of text."""

import re

import numpy as np
from tokenizers import AddedToken

from tests.data.tokenizer import kinds

SIDE, TOKENS = 32, 4  # pixels of a tile, and its visual tokens
MOST = 3  # tiles of the longer side of a picture
TILES = [f"<row_{row}_col_{column}>" for row in range(1, MOST + 1) for column in range(1, MOST + 1)]
MARKS = ("<fake_token_around_image>", "<global-img>", *TILES)


def write(folder, transformers, torch):
    """Writes model, tokenizer and image processor; returns transformers' model, its image processor and tokenizer."""
    kinds.write(folder, "smolvlm", added=[AddedToken(mark, special=True) for mark in MARKS])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = {"vocab_size": len(tokenizer) + 10, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    text |= {"model_type": "llama", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.SmolVLMConfig(
        text_config=text,
        vision_config=vision | {"image_size": SIDE, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        pad_token_id=0,
    )
    model = transformers.SmolVLMForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            spread = 0.1 if "embed_tokens" in name else 0.3 if x.dim() > 1 else 0.2
            x.normal_(0, spread).add_(float(name.endswith("weight") and "norm" in name))
    model.save_pretrained(folder)
    pictures = image_processor(MOST * SIDE, SIDE)
    pictures.save_pretrained(folder)
    return model, pictures, tokenizer


def image_processor(longest, side):
    """SmolVLM's, which computes with Pillow."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return SmolVLMImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": side})


def inputs_of(pictures, text, processor, tokenizer):
    """What SmolVLM's processor makes of text and its pictures. Itself it asks for torchvision, for films."""
    import torch
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    found, shapes = {}, iter(())
    if pictures:
        found = dict(processor(pictures, return_row_col_info=True, return_tensors="pt"))
        shapes = iter(zip(found.pop("rows")[0], found.pop("cols")[0], strict=True))
        found = {name: torch.as_tensor(np.asarray(x)) for name, x in found.items()}

    def block(_):
        return get_image_prompt_string(*next(shapes), TOKENS, "<fake_token_around_image>", "<image>", "<global-img>")

    return found | dict(tokenizer(re.sub("<image>", block, text), return_tensors="pt"))


def prompt(*turns):
    """What the released chat template renders of a chat that ends with a user's turn."""
    roles = ("User", "Assistant")
    colons = ["" if turn.startswith("<image>") else " " for turn in turns]
    said = [f"{roles[n % 2]}:{colons[n]}{turn}<end_of_utterance>\n" for n, turn in enumerate(turns)]
    return "<|im_start|>" + "".join(said) + "Assistant:"
