"""A tiny Granite-Docling with drawn weights, in a folder as transformers writes it, and pages to show it."""

import json

import numpy as np
from PIL import Image
from tokenizers import AddedToken

from tests.data.tokenizer import kinds

SIDE, TOKENS = 64, (4, 16)  # pixels of a tile, and its visual tokens on both paths
MOST_TILES = 6
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
MARKS = ("<fake_token_around_image>", "<global-img>", *TILES)
ROUTER = 8


def write(folder, transformers, torch):
    """Writes model, tokenizer and processor; returns transformers' model and processor."""
    kinds.write(folder, "granite", added=[AddedToken(mark, special=True) for mark in MARKS])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = {"vocab_size": len(tokenizer) + 10, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    text |= {"attention_multiplier": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 8, "out_hidden_size": 32, "scale_factor": 4}
    config = transformers.GraniteDoclingConfig(
        text_config=text,
        vision_config=vision | {"deepstack_visual_indexes": [0, 1, 2]},
        image_token_id=image,
        density_router_hidden_size=ROUTER,
        pad_token_id=0,
    )
    model = transformers.GraniteDoclingForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            spread = 0.1 if "embed_tokens" in name else 0.5 if x.dim() > 1 else 0.2
            x.normal_(0, spread).add_(float(name.endswith("weight") and ("norm" in name or "ln_" in name)))
    model.save_pretrained(folder)
    module = transformers.models.granite_docling
    pictures = module.GraniteDoclingImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=MOST_TILES)
    processor = module.GraniteDoclingProcessor(pictures, tokenizer, image_seq_len=TOKENS[0])
    processor.save_pretrained(folder)
    return model, processor


def page(width, height, seed=0):
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def prompt(*turns):
    """What the released chat template renders of a chat that ends with a user's turn."""
    roles = ("user", "assistant")
    said = [f"<|start_of_role|>{roles[n % 2]}<|end_of_role|>{turn}<|end_of_text|>\n" for n, turn in enumerate(turns)]
    return "".join(said) + "<|start_of_role|>assistant<|end_of_role|>"


def rows(folder, count=16):
    """A file of conversations about pages of several shapes, one in four of text alone; returns its path."""
    shapes, out = ((50, 40), (130, 260), (300, 120)), []
    for n in range(count):
        tag = "<image>" if n % 4 else ""
        turns = [{"from": "human", "value": f"{tag}how many? {n}"}, {"from": "gpt", "value": f"{n} of {n * n}"}]
        row = {"id": str(n), "conversations": turns}
        if tag:
            page(*shapes[n % 3], seed=n).save(folder / f"{n}.png")
            row["image"] = f"{n}.png"
        out.append(row)
    (folder / "rows.json").write_text(json.dumps(out))
    return folder / "rows.json"
