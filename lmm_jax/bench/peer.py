"""Times the PyTorch peer, transformers' LLaVA classes with random weights, on one shape. Needs the extra 'hf'.

    python -m lmm_jax.bench.peer --shape base --mode train|train_m3|decode|queue|attention

A process of its own, so that torch never enters ours. Its last line is a JSON object: `ms`, the median of the timed
steps, and what `--mode` adds to it.

train      full fine-tuning: forward, backward, AdamW.
train_m3   M3's step as its authors do it: at every scale the images are encoded again, projected, pooled, and the
           language model runs on its own sequence; the losses are averaged and differentiated once.
decode     greedy generation over a KV cache after all visual tokens: `ms` of --new-tokens, `prefill_ms` of the first.
queue      the questions of `shape.queue`, with pictures pooled to their budgets as M3's authors do it: `alone_ms`
           where they are answered one by one, `padded_ms` where they are padded to one batch, which answers until the
           longest is done.
attention  scaled dot-product attention on each of `bench_shapes.attention_cases`: `cases`, milliseconds forward and
           with the backward pass; copies of a pack run one by one, as the peer has no packs.
"""

import argparse
import json
import resource
import statistics
import sys
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lmm_jax.bench.shape import BEFORE_PICTURE, attention_cases, load_shape, queue


def build(s, dtype, device):
    """The model in `dtype`, and the id that stands for an image's tokens."""
    v, t = s["vision"], s["text"]
    image_token = t["vocab_size"] - 1
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=v["width"],
            intermediate_size=v["mlp"],
            num_hidden_layers=v["layers"],
            num_attention_heads=v["heads"],
            image_size=v["image"],
            patch_size=v["patch"],
        ),
        text_config=LlamaConfig(
            hidden_size=t["width"],
            intermediate_size=t["mlp"],
            num_hidden_layers=t["layers"],
            num_attention_heads=t["heads"],
            num_key_value_heads=t.get("kv_heads", t["heads"]),
            vocab_size=t["vocab_size"],
            max_position_embeddings=8192,
        ),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.to(device), image_token


def sequences(s, image_token, tokens, device):
    """Ids and labels `[B, tokens + text]`: an image's tokens after 8 of the text, whose second half is supervised."""
    b, n = s["batch"], s["text_len"]
    ids = torch.randint(3, image_token, (b, n), device=device)
    block = torch.full((b, tokens), image_token, device=device)
    labels = ids.clone()
    labels[:, : n // 2] = -100
    hole = torch.full_like(block, -100)
    return torch.cat([ids[:, :8], block, ids[:, 8:]], 1), torch.cat([labels[:, :8], hole, labels[:, 8:]], 1)


def train_step(a, s, model, image_token, px):
    """A step of `train` or `train_m3`, and the positions of its sequences."""
    model.train()
    if a.checkpoint:
        model.gradient_checkpointing_enable()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if a.compile else model
    side = s["vision"]["image"] // s["vision"]["patch"]
    full = side * side
    scales = s["scales"] if a.mode == "train_m3" else [full]
    rows = [sequences(s, image_token, n, px.device) for n in scales]
    embed = model.get_input_embeddings()

    def loss_at(n, ids, labels):
        if n == full:
            return forward(input_ids=ids, pixel_values=px, labels=labels).loss
        features = model.model.get_image_features(px, return_dict=True).pooler_output
        features = torch.stack(list(features)) if isinstance(features, list | tuple) else features
        k = int((full / n) ** 0.5)
        grid = features.reshape(s["batch"], side, side, -1).permute(0, 3, 1, 2)
        pooled = torch.nn.functional.avg_pool2d(grid, k, k).flatten(2).transpose(1, 2)
        e = embed(ids.clamp_max(image_token - 1))
        e = torch.cat([e[:, :8], pooled.to(e.dtype), e[:, 8 + n :]], 1)
        return forward(inputs_embeds=e, labels=labels).loss

    def step():
        loss = sum(loss_at(n, *row) for n, row in zip(scales, rows, strict=True)) / len(scales)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step, sum(ids.numel() for ids, _ in rows)


def decode_step(s, model, image_token, px, new_tokens):
    """Greedy generation of `new_tokens`."""
    model.eval()
    side = s["vision"]["image"] // s["vision"]["patch"]
    ids, _ = sequences(s, image_token, side * side, px.device)

    @torch.no_grad()
    def step():
        model.generate(
            input_ids=ids,
            pixel_values=px,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )

    return step


def queue_steps(s, model, image_token, device, dtype):
    """Answering the questions of a queue one by one, and as one padded batch."""
    model.eval()
    side, embed = s["vision"]["image"] // s["vision"]["patch"], model.get_input_embeddings()
    questions = queue(s)
    ids = [torch.randint(3, image_token, (1, q.text), device=device) for q in questions]
    image = s["vision"]["image"]
    pixels = torch.randn(len(questions), 3, image, image, device=device, dtype=dtype)

    def prompts(first, end):
        """Embeddings `[1, n, D]` of some of the questions."""
        features = model.model.get_image_features(pixels[first:end], return_dict=True).pooler_output
        for question, text, feature in zip(questions[first:end], ids[first:end], features, strict=True):
            k = int((side * side / question.scale) ** 0.5)
            grid = feature.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            pooled = torch.nn.functional.avg_pool2d(grid, k, k).flatten(2).transpose(1, 2)
            e = embed(text)
            yield torch.cat([e[:, :BEFORE_PICTURE], pooled.to(e.dtype), e[:, BEFORE_PICTURE:]], 1)

    def answer(embeds, mask, new):
        model.generate(
            inputs_embeds=embeds, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new
        )

    @torch.no_grad()
    def alone():
        for n, question in enumerate(questions):
            (embeds,) = prompts(n, n + 1)
            answer(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=device), question.new)

    @torch.no_grad()
    def padded():
        each = list(prompts(0, len(questions)))
        longest = max(e.shape[1] for e in each)
        embeds = torch.cat([torch.nn.functional.pad(e, (0, 0, longest - e.shape[1], 0)) for e in each])
        places = torch.arange(longest, device=device)
        mask = torch.stack([(places >= longest - e.shape[1]).long() for e in each])
        answer(embeds, mask, max(q.new for q in questions))

    return alone, padded


def attention_steps(case, dtype, device):
    """Forward, and forward with backward, of every copy of a case."""

    def draw(heads, length):
        shape = (case.batch, heads, length, case.head_dim)
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    heads = (case.heads, case.kv_heads, case.kv_heads)
    copies = [[draw(h, length) for h in heads] for length in case.lengths]

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads
        )

    @torch.no_grad()
    def forward():
        for copy in copies:
            attend(*copy)

    def both():
        for copy in copies:
            torch.autograd.grad(attend(*copy).sum(), copy)

    return forward, both


def milliseconds(a, step, steps=None):
    """Times of the steps after the warm-up."""
    sync = torch.cuda.synchronize if a.device == "cuda" else (lambda: None)
    times = []
    for i in range(a.warmup + (steps or a.steps)):
        sync()
        begin = time.perf_counter()
        step()
        sync()
        if i >= a.warmup:
            times.append(1e3 * (time.perf_counter() - begin))
        print(f"peer, {a.mode}: {time.perf_counter() - begin:.3g} s", file=sys.stderr, flush=True)
    return times


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", required=True)
    p.add_argument("--mode", default="train", choices=["train", "train_m3", "decode", "queue", "attention"])
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="float32")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--compile", action="store_true", help="torch.compile")
    p.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    a = p.parse_args()
    torch.manual_seed(0)
    s = load_shape(a.shape)
    dtype = getattr(torch, a.dtype)
    before = _resident()
    if a.mode == "attention":
        found = {}
        for case in attention_cases(s):
            found[case.name] = [statistics.median(milliseconds(a, f)) for f in attention_steps(case, dtype, a.device)]
        print(json.dumps({"mode": a.mode, "cases": found}))
        return
    model, image_token = build(s, dtype, a.device)
    image = s["vision"]["image"]
    px = torch.randn(s["batch"], 3, image, image, device=a.device, dtype=dtype)
    result = {"mode": a.mode, "shape": s["name"], "parameters": sum(x.numel() for x in model.parameters())}
    if a.mode == "queue":
        steps = queue_steps(s, model, image_token, a.device, dtype)
        result |= {
            name: statistics.median(milliseconds(a, step))
            for name, step in zip(("alone_ms", "padded_ms"), steps, strict=True)
        }
        print(json.dumps(result))
        return
    if a.mode == "decode":
        result["prefill_ms"] = statistics.median(milliseconds(a, decode_step(s, model, image_token, px, 1)))
        step, tokens = decode_step(s, model, image_token, px, a.new_tokens), s["batch"] * a.new_tokens
    else:
        step, tokens = train_step(a, s, model, image_token, px)
    times = milliseconds(a, step)
    ms = statistics.median(times)
    # Without a card, what the process grew by since its imports.
    peak = torch.cuda.max_memory_allocated() if a.device == "cuda" else _resident() - before
    result |= {"ms": ms, "min_ms": min(times), "max_ms": max(times), "tokens_per_s": 1e3 * tokens / ms}
    print(json.dumps(result | {"peak_bytes": peak}))


def _resident():
    """The most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
