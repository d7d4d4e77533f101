"""Golden sets as models: each is written as the folder its authors would release, and read by our own loader."""

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from lmm_jax import sharding
from lmm_jax.data.pack_layout import bank_slots
from lmm_jax.data.segments import NO_TARGET, blank, lay_out, pack
from lmm_jax.hf import load
from lmm_jax.hf.names import tensors
from lmm_jax.hf.read_config import read_model_config
from lmm_jax.models.decoder import Block, at_positions, inject
from lmm_jax.models.visual_tokens import splice
from lmm_jax.training.optimizer import split
from lmm_jax.training.state import abstract_state, make_program
from lmm_jax.training.step import eval_step, loss_and_grads
from tests.greedy import greedy_ids

IGNORE = -100


def write_folder(golden, out, keys, tower):
    """Writes `golden`'s weights to `out` in LLaVA's original layout, with the vision tower's config beside them."""
    (out / "vision_tower").mkdir(parents=True)
    llava = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": "vision_tower",
    }
    (out / "config.json").write_text(json.dumps(llava | keys))
    (out / "vision_tower/config.json").write_text(json.dumps(tower))
    shutil.copyfile(golden / "weights.safetensors", out / "model.safetensors")
    return out


class Reference:
    """A golden set's model.

    Attributes:
      folder: written by `write_folder`.
      weights: the set's own arrays.
      config, program, model, params: as our loader gives them.
      vocabulary: pieces, without those that pad tables.
      skipped: tensors that it did not read.
    """

    def __init__(self, folder):
        self.folder, self.config = folder, read_model_config(folder)
        self.vocabulary = self.config.model.decoder.vocab_size
        self.weights = load_file(folder / "model.safetensors")
        self.program = make_program(self.config, sharding.make_mesh({}, jax.devices()[:1]))
        self.model = self.program.model
        abstract = abstract_state(self.program).params
        self.params, table = load.load_params(folder, self.config.model, abstract)
        self.skipped = {entry.name: entry.why for entry in table if entry.fate == "ignored"}
        self._forward = jax.jit(self._outputs)
        self._see = jax.jit(functools.partial(self.model.apply, method="visual_tokens"))
        self._loss = jax.jit(loss_and_grads, static_argnums=0)

    def floats(self, pixels):
        """uint8 `[..., H, W, 3]` as floats `[..., 3, H, W]`, normalised."""
        vision = self.model.vision
        pixels = (np.asarray(pixels, np.float32) / 255 - np.float32(vision.mean)) / np.float32(vision.std)
        return np.moveaxis(pixels, -1, -3)

    def pixels(self, floats, dtype=np.uint8):
        """Inverse of `floats`; pictures were uint8, tensors that never were pictures stay float32."""
        vision = self.model.vision
        values = (np.moveaxis(np.float64(floats), -3, -1) * vision.std + vision.mean) * 255
        return np.rint(values).astype(dtype) if dtype == np.uint8 else values.astype(dtype)

    def forward(self, batch):
        """Namespace of bank, stacks, embeds and hidden `[G, R, T, D]`, logits without padded pieces, and loss."""
        return types.SimpleNamespace(**jax.device_get(self._forward(self.params, batch)))

    def bank(self, pixels):
        """What the model shows of pictures `[G, V, H, W, 3]`, `[G, slots, D]`."""
        return jax.device_get(self._see({"params": self.params}, pixels)[0])

    def _outputs(self, params, batch):
        def run(m):
            bank, stacks = m.visual_tokens(batch["pixels"], batch.get("gather"), batch.get("extent"))
            embeds = m.decoder.embed(batch["id"])
            G, R, T, D = embeds.shape
            embeds = splice(embeds.reshape(G, R * T, D), bank, batch["slot"].reshape(G, R * T)).reshape(G, R, T, D)
            hidden = m(batch)
            logits = m.logits(hidden)[..., : self.vocabulary]
            return {"bank": bank, "stacks": stacks, "embeds": embeds, "hidden": hidden, "logits": logits}

        sums, counts = eval_step(self.model, params, {name: x[None] for name, x in batch.items()})
        loss = (sums / jnp.maximum(counts, 1)).sum() / (counts > 0).sum()
        return self.model.apply({"params": params}, method=lambda m: run(m)) | {"loss": loss}

    def layer_inputs(self, batch):
        """`[L, G, R, T, D]` that each decoder layer sees, its stack added, and the last one's output."""
        out, decoder = self.forward(batch), self.model.decoder
        h, inputs = jnp.asarray(out.embeds), []
        context = {name: jnp.asarray(batch[name]) for name in ("position", "segment", "slot")}
        block = Block(**decoder.block_fields())
        for layer, number in enumerate(decoder.stack_numbers()):
            if number >= 0:
                h = inject(h, at_positions(jnp.asarray(out.stacks), context["slot"]), number)
            inputs.append(h)
            params = jax.tree.map(lambda x: x[layer], self.params["decoder"]["layers"])  # noqa: B023
            h, _ = block.apply({"params": params}, h, (-1, None), context)
        return np.stack(inputs), np.asarray(h)

    def gradients(self, batch, frozen=()):
        """`(loss, loss of each group, gradients under their names)`; leaves under the `frozen` prefixes have none."""
        paths = flatten_dict(self.params, sep="/")
        rates = {path: 0.0 if path.split("/")[0] in frozen else 1.0 for path in paths}
        trainable, fixed = split(self.params, rates)
        micro = {name: x[None] for name, x in batch.items()}
        loss, grads, groups, _ = jax.device_get(self._loss(self.model, trainable, fixed, micro))
        return float(loss), groups, self.theirs(grads)

    def theirs(self, flat):
        """A flat dict of ours under the names, and in the layout, of the reference."""
        shapes = {path: x.shape for path, x in flat.items()}
        out = {}
        for t in tensors(self.config.model, shapes):
            array = t.to_theirs(flat[t.path] if t.layer is None else flat[t.path][t.layer])
            table = t.path in ("decoder/table", "decoder/head/kernel")
            out[t.name] = array[: self.vocabulary] if table else array
        return out

    def greedy(self, batch, scale, tokens):
        """`[G, tokens]` greedy ids after the prompts of a batch; none ends a row."""
        return greedy_ids(self.model, self.params, batch, scale, tokens)


def unpadded(arrays, row, labels="labels", prefix=""):
    """`(ids, supervised)` of a row of a reference's batch."""
    real = arrays[f"{prefix}attention_mask"][row].astype(bool)
    ids, label = arrays[f"{prefix}input_ids"][row][real], arrays[f"{prefix}{labels}"][row][real]
    np.testing.assert_array_equal(label[label != IGNORE], ids[label != IGNORE])
    return ids, label != IGNORE


def grid_slots(unit, scale, scales, units):
    """Bank slots `[scale]` of one square grid."""
    return bank_slots(np.arange(scale), unit, scales.index(scale), scales, units)


def segment(ids, supervised, blocks, group=1, most=None):
    """A `Segment`; one that is longer than `most` is cut wherever that falls, as the references do."""
    out = lay_out(np.asarray(ids), np.asarray(supervised), blocks, group)
    if most is None or len(out) <= most:
        return out
    target = out.target[:most].copy()
    target[-1] = NO_TARGET
    return type(out)(out.id[:most], out.slot[:most], target, group)


def make_batch(packs, side="right", length=None, **more):
    """Packs of one row each, as a batch `[G, 1, T]`.

    Args:
      packs: a list of segments for each pack.
      side: where padding stands.
      length: T; that of the longest pack if None.
      more: arrays `[G, …]`, pixels and the like.
    """
    length = length or max(sum(map(len, segments)) for segments in packs)
    rows = []
    for segments in packs:
        room = length - sum(map(len, segments))
        if side == "left" and room:
            segments = [blank(room), *segments]
        rows.append(pack(segments, [0] * len(segments), 1, length, length))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | more


def labels_of(batch):
    """`[G, T]` labels as the references have them, from our shifted targets."""
    G, _, T = batch["id"].shape
    out = np.full((G, T), IGNORE)
    for g in range(G):
        used = batch["group"][g] > 0
        out[g, batch["target_at"][g][used] + 1] = batch["target"][g][used]
    return out


def pad_views(views):
    """`[G, V, H, W, 3]` of lists of views, blank where a pack has fewer."""
    most = max(map(len, views))
    shape = next(v[0].shape for v in views if len(v))
    return np.stack(
        [np.concatenate([*(x[None] for x in v), np.zeros((most - len(v), *shape), np.uint8)]) for v in views]
    )


def close(ours, theirs, atol, rtol=0.0):
    """Asserts equality within the tolerance that the set's README suggests."""
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=atol, rtol=rtol)
