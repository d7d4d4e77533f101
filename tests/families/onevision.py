"""A tiny LLaVA-OneVision with drawn weights, in a folder as transformers writes it, and its processor."""

import json

from tokenizers import AddedToken

from tests.data.tokenizer import kinds
from tests.families.llava import SIDE as SIDE
from tests.families.llava import SIZES, TOWER

PATCH, TOKENS, MOST = 8, 9, 2  # of a view of 30 pixels, whose last 6 no patch holds; views' worth of tokens
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 4) for columns in range(1, 4)]


def write(folder, transformers, torch):
    """Writes model, tokenizer and image processor; returns transformers' model and its processor."""
    kinds.write(folder, "qwen", added=[AddedToken(piece, special=True) for piece in ("<image>", "<video>")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer) + 6, "tie_word_embeddings": True}
    config = transformers.LlavaOnevisionConfig(
        text_config=SIZES | text,
        vision_config=TOWER | {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH},
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{MOST}",
        tie_word_embeddings=True,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            spread = 0.1 if "embed_tokens" in name else 0.3 if x.dim() > 1 else 0.2
            x.normal_(0, spread).add_(float("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    pictures = image_processor()
    pictures.save_pretrained(folder)
    return model, processor(pictures, tokenizer, MOST)


def image_processor(side=SIDE, pinpoints=PINPOINTS):
    """LLaVA-OneVision's, which computes with Pillow."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    return LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=pinpoints,
        image_mean=[0.5, 0.4, 0.6],
        image_std=[0.5] * 3,
    )


def processor(pictures, tokenizer, most, tokens=TOKENS):
    """LLaVA-OneVision's, without what asks for torchvision: its video processor, and whether there is one."""
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    class OfPictures(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, name, argument):
            pass

    return OfPictures(
        image_processor=pictures,
        tokenizer=tokenizer,
        num_image_tokens=tokens,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
    )


def prompt(*turns):
    """The text of a chat that ends with a user's turn, in the layout `chatml`."""
    said = ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"]
    said += [f"<|im_start|>{('user', 'assistant')[n % 2]}\n{turn}<|im_end|>\n" for n, turn in enumerate(turns)]
    return "".join(said) + "<|im_start|>assistant\n"


def write_rows(folder, page, count=16):
    """A file of conversations: in turn text alone, a small picture, a large one, and two; returns its path."""
    shapes, out = ([], [(40, 25)], [(160, 130)], [(40, 70), (130, 20)]), []
    for n in range(count):
        sizes = shapes[n % 4]
        tags = "<image>\n" * len(sizes)
        turns = [{"from": "human", "value": f"{tags}how many? {n}"}, {"from": "gpt", "value": f"{n} of {n * n}"}]
        names = [f"{n}_{i}.png" for i in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            page(*size, seed=n).save(folder / name)
        out.append({"id": str(n), "conversations": turns} | ({"image": names} if names else {}))
    (folder / "rows.json").write_text(json.dumps(out))
    return folder / "rows.json"
