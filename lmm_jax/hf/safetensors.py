"""Folders of safetensors files as one set of named tensors: read without trusting them, written tensor by tensor."""

import functools
import json
import math
import struct

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from lmm_jax import storage, strict_json
from lmm_jax.hf.snapshot import holds

SUFFIX = ".safetensors"
PICKLE = ".bin"
MOST_HEADER = 16 * 2**20  # bytes; that of a model of 100,000 tensors has 12 million
MOST_TENSORS = 100_000  # of a file
MOST_INDEX = 64 * 2**20  # bytes; that of a model of 100,000 tensors has 9 million


class Folder:
    """The tensors of a folder: one file, or shards with an index that says which tensor is where.

    Of a folder in a bucket, these files are copied to this machine: see `storage.local_files`.

    Only headers are read at first; `read` reads one tensor. Safetensors itself refuses overlapping or missing data;
    names that stand twice, headers larger than any model's, and numbers that are not finite are refused here.

    Attributes:
      path: the folder.
      shapes: name to shape, of every tensor.
      dtypes: name to numpy's name of the type, of every tensor.
    """

    def __init__(self, path, allow_pickle=False):
        """Reads the headers.

        Args:
          path: the folder.
          allow_pickle: reads PyTorch's `.bin` files where there is no safetensors file, by torch's own reader, which
            then refuses whatever is not plain weights.

        Raises:
          FileNotFoundError: there is no file of tensors.
          ImportError: pickles are allowed and torch is not installed.
          ValueError: what is wrong with a file.
        """
        self.path = epath.Path(path)
        self.shapes, self.dtypes, self._home = {}, {}, {}
        for file in storage.local_files(_files(self.path, allow_pickle)):
            for name, shape, dtype in _header(file):
                if name in self._home:
                    raise ValueError(f"tensor {name} is in {self._home[name].name} and in {file.name} of {self.path}")
                self._home[name], self.shapes[name], self.dtypes[name] = file, shape, dtype
        suffix = next(iter(self._home.values())).suffix if self._home else SUFFIX
        index = next(iter(self.path.glob(f"*{suffix}.index.json")), None)
        if index is not None:
            promised = _weight_map(index, suffix)
            wrong = sorted(n for n in promised if n not in self._home or self._home[n].name != promised[n])
            if wrong:
                raise ValueError(f"{index} promises {len(wrong)} tensors that its files do not hold: {wrong[:5]}")

    def read(self, name):
        """One tensor as a numpy array, bfloat16 included.

        Raises:
          ValueError: not all of its numbers are finite.
        """
        file = self._home[name]
        if file.suffix != SUFFIX:
            array = _to_numpy(_unpickle(file)[name])
        else:
            with safe_open(str(file), framework="np") as handle:  # opened anew: what was mapped is released
                array = handle.get_tensor(name)
        if wrong := count_not_finite(array):
            raise ValueError(
                f"{file}: {wrong:,} of the {array.size:,} numbers of tensor {name} are not finite (NaN or infinity), "
                "so that the model would answer nothing; copy the file again, or take another checkpoint"
            )
        return array


# The bits of a number's exponent, all of which are set in NaN and infinity alone, by the type of the number.
_EXPONENTS = {
    "float64": (np.uint64, 0x7FF0 << 48),
    "float32": (np.uint32, 0x7F80 << 16),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
_AT_ONCE = 1 << 18  # numbers that are looked at together, few enough for a processor's cache


def count_not_finite(array) -> int:
    """How many numbers of an array of any shape are NaN or infinity.

    Bits are compared, at about 0.2 s a GiB: numpy's own `isfinite` takes five times as long for bfloat16.
    """
    if array.dtype.name not in _EXPONENTS:
        return 0
    kind, exponent = _EXPONENTS[array.dtype.name]
    bits, held = np.ravel(array).view(kind), np.empty(min(array.size, _AT_ONCE), kind)
    wrong = 0
    for first in range(0, bits.size, _AT_ONCE):
        part = bits[first : first + _AT_ONCE]
        masked = np.bitwise_and(part, kind(exponent), out=held[: part.size])
        if masked.max() == exponent:
            wrong += int(np.count_nonzero(masked == exponent))
    return wrong


# Types that a weight may have, as safetensors and numpy call them.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _header(file):
    """`(name, shape, dtype)` of each tensor of a file."""
    if file.suffix != SUFFIX:
        for name, tensor in _unpickle(file).items():
            yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        return
    try:
        _check_header(file)
        with safe_open(str(file), framework="np") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                part = handle.get_slice(name)
                yield name, tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a sound safetensors file: {error}") from error


def _check_header(file):
    """Raises ValueError for a header that is no JSON, too large, or names a tensor twice."""
    size = file.stat().length
    with file.open("rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"its header of {length:,} bytes ends behind it, at {size:,}; copy it again")
        if length > MOST_HEADER:
            raise ValueError(f"its header has {length:,} bytes, more than {MOST_HEADER:,} are not read")
        header = strict_json.parse(f.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"its header is {strict_json.shown(header)}, where names of tensors are expected")
    if len(header) > MOST_TENSORS:
        raise ValueError(f"it names {len(header):,} tensors, more than {MOST_TENSORS:,} are not read")


@functools.lru_cache(maxsize=1)
def _unpickle(file):
    """PyTorch's weights-only reading of a `.bin` file, mapped and not copied: name to tensor."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{file} is a pickle, which only torch reads: pip install 'lmm_jax[hf]'") from error
    try:
        found = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds; each means that the file cannot be used
        raise ValueError(f"{file} holds more than weights, or is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{file} is no table of names and tensors")
    return found


def _to_numpy(tensor):
    import torch

    if tensor.dtype == torch.bfloat16:  # which torch's numpy() does not know
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _files(folder, allow_pickle):
    """The files of tensors of a folder: those its index names, or all there are."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    suffix = SUFFIX
    if not any(folder.glob(f"*{SUFFIX}*")):
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (PICKLE, ".pt", ".pth"))
        suffix = PICKLE if allow_pickle and any(folder.glob(f"*{PICKLE}")) else suffix
        if suffix == SUFFIX:
            found = ""
            if pickles:
                found = f"; {pickles[0]} is a pickle, which can run code: convert it, or pass --allow-pickle"
            raise FileNotFoundError(f"{folder} holds no safetensors file{found}")
    indices = sorted(folder.glob(f"*{suffix}.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} has {len(indices)} index files; keep one")
    names = sorted(set(_weight_map(indices[0], suffix).values())) if indices else None
    files = [folder / n for n in names] if indices else sorted(folder.glob(f"*{suffix}"))
    for file in files:
        if not file.exists():
            where = f"its index names {file.name}, which" if names else f"{file.name} is a link to a file that"
            raise ValueError(f"{folder}: {where} is not there; download it again")
        if not holds(folder, file):
            raise ValueError(f"{file} leads out of {folder}")
        if not storage.is_file(file):
            raise ValueError(f"{file} is a folder or a device, where a file is expected")
    return files


def _weight_map(index, suffix):
    """Tensor name to file name of an index file; file names that are paths are refused."""

    content = strict_json.read_object(index, MOST_INDEX)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names")
    for name, file in found.items():
        if "/" in file or "\\" in file or not file.endswith(suffix):
            raise ValueError(f"{index}: tensor {name} is said to be in '{file}', which is no file of this folder")
    return found


def plan_shards(sizes, most) -> list[list[str]]:
    """Names of the tensors of each file of at most `most` bytes, in the order of `sizes`; one alone may be larger."""
    shards, held = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


SHARD = 4_000_000_000  # bytes of a file


def write(folder, shapes, dtype, tensors):
    """Writes tensors as `model.safetensors`, or as numbered files and their index if they are many.

    The library's own writer wants a whole file's tensors in memory; here each is written as it comes.

    Args:
      folder: that exists.
      shapes: name to shape of every tensor, in the order in which they come.
      dtype: numpy's name of their type.
      tensors: yields `(name, array)`, contiguous and of that type.

    Returns:
      names of the files written.

    Raises:
      ValueError: a tensor that is not the one expected.
    """
    itemsize, kind = np.dtype(dtype).itemsize, {theirs: ours for ours, theirs in DTYPES.items()}[dtype]
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, SHARD)
    files = [f"model-{n:05d}-of-{len(shards):05d}{SUFFIX}" for n in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [f"model{SUFFIX}"]
    tensors = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [at, at + sizes[name]]}
            at += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                came, array = next(tensors)
                if (came, array.shape, array.dtype) != (name, tuple(shapes[name]), np.dtype(dtype)):
                    raise ValueError(
                        f"expected {name} {shapes[name]} {dtype}, got {came} {array.shape} {array.dtype}"
                    )
                if not array.flags.c_contiguous:
                    raise ValueError(f"{name} is not contiguous")
                f.write(array.data.cast("B") if array.dtype.kind == "f" else array.view(np.uint16).data.cast("B"))
    if len(files) == 1:
        return files
    home = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": home}
    (folder / f"model{SUFFIX}.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return [*files, f"model{SUFFIX}.index.json"]
