"""Loading a trained model and answering questions about pictures, greedily, at a chosen token budget."""

import dataclasses
import functools

import jax
import numpy as np
from etils import epath

from lmm_jax import families, sharding
from lmm_jax.config import read_config, save_config, visual_layout
from lmm_jax.data.conversation import IMAGE_TAG, stop_id
from lmm_jax.data.images import image_size, open_picture
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.generation.greedy import generate_tokens
from lmm_jax.hf.load import load_params, stored_dtype
from lmm_jax.hf.read_config import is_model, read_model_config
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.state import abstract_params, make_program

BUCKET = 32  # prompts are padded to multiples of this, so that few programs are compiled


def load(path, vision=None, allow_pickle=False):
    """Loads a model onto whatever devices are here.

    Args:
      path: a workdir of `lmm train`, whose newest sound checkpoint is taken, or a model's folder in LLaVA's original
        layout or that of transformers (llava, llava_next, fast_vlm, what `lmm export` wrote). Parameters that were
        stored in two bytes are bfloat16, others float32.
      vision: folder of the vision tower, for a folder that neither holds nor names it.
      allow_pickle: see `hf.safetensors.Folder`.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: no checkpoint is sound, or tensors or keys of the folder do not fit; the message lists them.
    """
    path = epath.Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is neither a workdir of `lmm train` nor a model (no config.json)")
    table = []
    if is_model(path):
        config = read_model_config(path, vision)
        tokenizer = load_tokenizer(path, families.DECODERS[config.model.families.decoder].tokenizer)
        program = make_program(config, _mesh(config))
        abstract = abstract_params(program, stored_dtype(path, allow_pickle))
        params, table = load_params(path, config.model, abstract, vision, allow_pickle)
    else:
        config, tokenizer = read_config(path / "config.json"), load_tokenizer(path)
        program = make_program(config, _mesh(config))
        params, _ = Checkpoints(path).restore_params(abstract_params(program))
    return Model(program, params, tokenizer, table)


class Model:
    """A model, its parameters and its tokenizer: `generate` is the whole interface.

    Attributes:
      program: what `training.state.make_program` returned.
      params: nested dict of arrays.
      tokenizer: the `Tokenizer`.
      stop: id that ends an answer.
      table: what became of each tensor of the folder that it was loaded from, see `hf.load.report`.
    """

    def __init__(self, program, params, tokenizer, table=()):
        self.program, self.params, self.tokenizer, self.table = program, params, tokenizer, table
        self._layout = PackLayout.from_config(program.config, visual_layout(program.config))
        self.stop = stop_id(tokenizer, self._layout.template)
        self._generate = jax.jit(
            functools.partial(generate_tokens, program.model, eos=self.stop),
            static_argnames=("scale", "max_new_tokens"),
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """Token budgets that were trained; others that tile the grid can be asked for too."""
        return self._layout.scales

    def save(self, workdir):
        """Writes config, tokenizer and parameters as a workdir, which a run can start from or `lmm export` read."""
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True)
        save_config(self.program.config, workdir / "config.json")
        self.tokenizer.save(workdir)
        checkpoints = Checkpoints(workdir)
        checkpoints.save_params(self.params)
        checkpoints.close()

    def generate(self, images=(), prompt="", scale=None, max_new_tokens=64, batch_size=256):
        """Answers a question about pictures, or a list of questions.

        Args:
          images: paths or `PIL.Image`s of one prompt; for a list of prompts, one such list each.
          prompt: text; pictures without an `<image>` tag in it come first.
          scale: visual tokens of a square view; the largest trained scale if None.
          max_new_tokens: at most so many tokens are generated.
          batch_size: prompts that run at a time.

        Returns:
          str, or a list of str for a list of prompts.

        Raises:
          ValueError: a scale that does not tile the grid, tags that do not match the pictures, or a picture too thin
            to have a visual token.
        """
        if isinstance(prompt, str):
            return self.generate([images], [prompt], scale, max_new_tokens, batch_size)[0]
        return [
            self.tokenizer.decode(ids) for ids in self.generate_ids(images, prompt, scale, max_new_tokens, batch_size)
        ]

    def generate_ids(self, images, prompts, scale=None, max_new_tokens=64, batch_size=256) -> list[list[int]]:
        """As `generate` for a list of prompts: the ids of each answer, its end not among them."""
        scale = max(self.scales) if scale is None else scale
        self._layout.visual.token_grid(scale)
        requests = [self._request(*r, scale) for r in zip(images, prompts, strict=True)]
        # Prompts of like length and equally many views, which have equally many grids, share a batch.
        keys = [(layout.views, _bucket(len(segment))) for layout, segment, _ in requests]
        answers = [[]] * len(requests)
        for key in sorted(set(keys)):
            members = [i for i, k in enumerate(keys) if k == key]
            for first in range(0, len(members), batch_size):
                chosen = members[first : first + batch_size]
                size = min(batch_size, 1 << (len(members) - 1).bit_length())
                found = self._answer([requests[i] for i in chosen], key[1], scale, max_new_tokens, size)
                for i, ids in zip(chosen, found, strict=True):
                    answers[i] = ids
        return answers

    def batch(self, images, prompt, scale=None):
        """One prompt as the model sees it, padded: a batch of one pack, see `PackLayout.assemble`."""
        scale = max(self.scales) if scale is None else scale
        layout, segment, pictures = self._request(images, prompt, scale)
        return _assemble([(layout, segment, pictures)], _bucket(len(segment)))

    def visual_tokens(self, images, scale=None) -> int:
        """Positions that `images` of one prompt take at `scale`."""
        sizes = [image_size(image) for image in images]
        return int(self._layout.visual.tokens(sizes, max(self.scales) if scale is None else scale).sum())

    def _request(self, images, prompt, scale):
        pictures = [open_picture(image) for image in images]
        if IMAGE_TAG not in prompt:
            prompt = f"{IMAGE_TAG}\n" * len(pictures) + prompt
        sizes = [picture.size for picture in pictures]
        visual = self._layout.visual
        views = int(visual.views_of(sizes).sum()) if pictures else visual.fewest_views  # blank ones
        layout = dataclasses.replace(self._layout, scales=(scale,), views=views, rows=1, targets=0)
        (segment,) = layout.segments([("user", prompt)], sizes, self.tokenizer, (scale,))
        return layout, segment, pictures

    def _answer(self, requests, length, scale, max_new_tokens, size):
        """Ids that answer requests which share a shape, run as a batch of `size`."""
        batch = _assemble(requests + requests[-1:] * (size - len(requests)), length)
        with self.program.use():
            tokens, lengths = jax.device_get(
                self._generate(self.params, batch, scale=scale, max_new_tokens=max_new_tokens)
            )
        return [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)][: len(requests)]


def _assemble(requests, length):
    packs = []
    for layout, segment, pictures in requests:
        seen = [(picture.size, layout.see(picture)) for picture in pictures]
        packs.append(dataclasses.replace(layout, length=length).assemble([segment], seen))
    return {name: np.stack([p[name] for p in packs]) for name in packs[0]}


def _bucket(n):
    return -(-n // BUCKET) * BUCKET


def _mesh(config):
    try:
        return sharding.make_mesh(config.mesh)
    except ValueError:  # trained on other devices
        return sharding.make_mesh({"fsdp": -1})
