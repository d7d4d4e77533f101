"""A tiny Qwen3-VL with drawn weights, in a folder as transformers writes it, and what its processor makes of a chat.

The processor's own class asks for torchvision; its parts, the tokenizer and the image processor, do not.
"""

import json

import numpy as np
from PIL import Image
from tokenizers import AddedToken

from tests.data.tokenizer import kinds

PATCH, LEAST, MOST = 4, 128, 1024  # pixels of a patch's side, and of a picture at least and at most
PAD, MARKS = "<|image_pad|>", ("<|vision_start|>", "<|vision_end|>")


def write(folder, transformers, torch, **text):
    """Writes model, tokenizer and image processor; returns transformers' model, tokenizer and image processor."""
    kinds.write(folder, "qwen", added=[AddedToken("<|video_pad|>", special=True)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start, end, image, video = tokenizer.convert_tokens_to_ids([*MARKS, PAD, "<|video_pad|>"])
    sizes = {"vocab_size": len(tokenizer) + 9, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": PATCH}
    vision |= {"out_hidden_size": 48, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]}
    config = transformers.Qwen3VLConfig(
        text_config=sizes | {"rope_parameters": rope} | text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            spread = 0.1 if "embed_tokens" in name else x.shape[-1] ** -0.5 if x.dim() > 1 else 0.2
            x.normal_(0, 1.5 * spread).add_(float(name.endswith("weight") and "norm" in name))
    model.save_pretrained(folder)
    module = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl
    sides = {"shortest_edge": LEAST, "longest_edge": MOST}
    half = [0.5] * 3
    pictures = module.Qwen2VLImageProcessorPil(size=sides, patch_size=PATCH, image_mean=half, image_std=half)
    pictures.save_pretrained(folder)
    return model, tokenizer, pictures


def picture(width, height, seed=0):
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def prompt(*turns):
    """What the released chat template renders of a chat that ends with a user's turn; `<image>` stays a tag."""
    said = [f"<|im_start|>{('user', 'assistant')[n % 2]}\n{turn}<|im_end|>\n" for n, turn in enumerate(turns)]
    return "".join(said) + "<|im_start|>assistant\n"


def inputs(tokenizer, processor, text, pictures):
    """What `Qwen3VLProcessor` gives of a rendered chat whose pictures are `<image>`."""
    import torch

    seen = processor(pictures, return_tensors="pt") if pictures else {}
    for grid in seen.get("image_grid_thw", ()):
        text = text.replace("<image>", f"{MARKS[0]}{PAD * int(grid.prod() // 4)}{MARKS[1]}", 1)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    visual = (ids == tokenizer.convert_tokens_to_ids(PAD)).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": visual, **seen}


def unpatched(patches, grids):
    """Pictures `[h, w, 3]` uint8 of the patches `[n, 3 · 2 · 4 · 4]` that an image processor gives."""
    out, first = [], 0
    for _, h, w in grids.tolist():
        x = patches[first : first + h * w].numpy().reshape(h // 2, w // 2, 2, 2, 3, 2, PATCH, PATCH)
        np.testing.assert_array_equal(x[:, :, :, :, :, 0], x[:, :, :, :, :, 1])  # the same twice: a still clip
        x = x[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * PATCH, w * PATCH, 3)
        out.append(np.rint((x * 0.5 + 0.5) * 255).astype(np.uint8))
        first += h * w
    return out


def rows(folder, count=24):
    """A file of conversations about pictures of many shapes, one in six of text alone; returns its path."""
    rng, out = np.random.default_rng(0), []
    for n in range(count):
        names = [f"{n}_{k}.png" for k in range((1 + (n % 4 == 1)) if n % 6 else 0)]
        for name in names:
            picture(*rng.integers(26, 42, 2), seed=n).save(folder / name)
        turns = [{"from": "human", "value": "<image>" * len(names) + "What is this?"}]
        turns.append({"from": "gpt", "value": f"a cat {n}"})
        out.append({"id": str(n), "conversations": turns} | ({"image": names} if names else {}))
    (folder / "rows.json").write_text(json.dumps(out))
    return folder / "rows.json"
