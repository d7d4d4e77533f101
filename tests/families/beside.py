"""What tests of families share: our arrays under published names, and a conversation that both train on."""

import functools
import json

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import lmm_jax as lmm
from lmm_jax.config import visual_layout
from lmm_jax.data.conversation import encode
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.packing import Capacity
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.hf.names import original_name, tensors
from lmm_jax.training.optimizer import split
from lmm_jax.training.step import loss_and_grads
from tests.families.granite import rows
from tests.release.recipes import CONFIGS

IGNORED = -100  # label of a position that transformers' loss leaves out


def original(tree, model):
    """Parameters or gradients of `config.model`, nested, by their original names, in the layout that is stored."""
    flat, parts = flatten_dict(jax.device_get(tree), sep="/"), {}
    for tensor in tensors(model, {path: x.shape for path, x in flat.items()}):
        array = flat[tensor.path] if tensor.layer is None else flat[tensor.path][tensor.layer]
        parts.setdefault(tensor.name, {})[tensor.rows[0] if tensor.rows else 0] = tensor.to_theirs(array)
    return {name: np.concatenate([x for _, x in sorted(of.items())]) for name, of in parts.items()}


def hidden_and_logits(model, batch, scale=None):
    """Hidden states `[T, D]` and logits `[T, rows]` of a batch of one row."""
    scales = None if scale is None else (scale,)

    def run(one, batch):
        h = one(batch, scales)
        return h, one.logits(h)

    with model.program.use():
        found = jax.jit(functools.partial(model.program.model.apply, method=run))({"params": model.params}, batch)
    return tuple(np.asarray(x)[0, 0] for x in found)


def training_batch(model, turns, pictures, scales):
    """One pack with a copy of a conversation at each of `scales`, and how many of its positions are supervised."""
    config = model.program.config
    layout = PackLayout.from_config(config, visual_layout(config).with_marks(model.tokenizer))
    sizes = [picture.size for picture in pictures]
    views = max(int(layout.visual.views_of(sizes).sum()), layout.visual.fewest_views)
    layout = PackLayout.from_config(config, layout.visual, Capacity(len(scales), 512, views, 64))
    segments = layout.training_segments(turns, sizes, model.tokenizer, scales)
    pack = layout.assemble(segments, [(picture.size, layout.see(picture)) for picture in pictures])
    supervised = int(encode(turns, model.tokenizer, config.data.template).supervised.sum())
    return {name: x[None] for name, x in pack.items()}, supervised


def gradients(model, batch):
    """Loss and the gradients of all parameters, by original name, as a training step takes them."""
    trainable, frozen = split(model.params, dict.fromkeys(model.program.rates, 1.0))
    with model.program.use():
        run = jax.jit(loss_and_grads, static_argnums=0)
        micro = {name: x[None] for name, x in batch.items()}
        loss, grads, *_ = run(model.program.model, trainable, frozen, micro)
    return float(loss), original(grads, model.program.config.model)


def same_gradients(found, theirs, unread=()):
    """Asserts that gradients by original name are those of a torch model; those under `unread` have none there.

    Returns:
      the largest difference.
    """
    left, worst = set(found), 0.0
    for name, x in theirs.named_parameters():
        name = original_name(name)
        if any(part in name for part in unread):
            assert x.grad is None or not x.grad.abs().max() or name not in found
            left.discard(name)
            continue
        want, ours = x.grad.numpy(), found[name]
        ours = ours[: len(want)]  # a table of ours has more rows
        norm = np.linalg.norm(want)
        # A softmax does not see what a bias adds to all keys, unless these are rotated.
        assert norm > 1e-5 or ("vision" in name and "k_proj.bias" in name), name
        np.testing.assert_allclose(np.linalg.norm(ours), norm, rtol=1e-3, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours, want, atol=1e-4 * max(1.0, norm), err_msg=name)
        worst = max(worst, float(np.abs(ours - want).max()))
        left.discard(name)
    assert not left
    return worst


def trained_and_back(released, tmp_path, *overrides, verify=True):
    """Trains a released folder five steps, packed, scanned and sharded over eight devices, and exports it.

    Asserts that the loss falls and that what was exported is loaded as it was trained, to the bit.

    Args:
      released: its folder.
      tmp_path: an empty folder.
      *overrides: of `configs/own.py`.
      verify: whether transformers runs the export beside our model.

    Returns:
      the losses, and the largest difference of logits, None if it was not verified.
    """
    template = lmm.load(released).program.config.data.template
    prepare.prepare_rows(rows(tmp_path), None, tmp_path / "data", released, template, workers=0, max_refused=0.0)
    config = lmm.load_config(
        f"{CONFIGS}/own.py:data={tmp_path / 'data'},model={released},rate=1e-2",
        *("model.dtype=float32", "train.log_every=1", "train.eval_every=0", "train.steps=5", "train.batch_size=8"),
        *("mesh.fsdp=8", *overrides),
    )
    assert lmm.train(config, tmp_path / "run")["step"] == 5
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    found = lmm.export(tmp_path / "run", tmp_path / "out", verify=verify)
    ours, again = lmm.load(tmp_path / "run"), lmm.load(tmp_path / "out", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    return losses, found.get("max_logit_difference")
