"""Reading a folder of safetensors files as one set of named tensors, without trusting it."""

import json

from etils import epath
from safetensors import SafetensorError, safe_open

INDEX = ".safetensors.index.json"


class Folder:
    """The tensors of a folder: one file, or shards with an index that says which tensor is where.

    Only headers are read at first; `read` reads one tensor. Safetensors itself refuses broken headers, overlapping
    or missing data; the rest is checked here.

    Attributes:
      path: the folder.
      shapes: name to shape, of every tensor.
    """

    def __init__(self, path):
        """Raises FileNotFoundError if there is no safetensors file, ValueError naming what is wrong with one."""
        self.path = epath.Path(path)
        self.shapes, self._home, self._open = {}, {}, {}
        for file in _files(self.path):
            try:
                handle = safe_open(str(file), framework="np")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is not a sound safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if name in self._home:
                    raise ValueError(f"tensor {name} is in {self._home[name].name} and in {file.name} of {self.path}")
                self._home[name], self.shapes[name] = file, tuple(handle.get_slice(name).get_shape())
            self._open[file] = handle
        index = next(iter(sorted(self.path.glob(f"*{INDEX}"))), None)
        if index is not None:
            promised = _weight_map(index)
            wrong = sorted(n for n in promised if n not in self._home or self._home[n].name != promised[n])
            if wrong:
                raise ValueError(f"{index} promises {len(wrong)} tensors that its files do not hold: {wrong[:5]}")

    def read(self, name):
        """One tensor as a numpy array, bfloat16 included."""
        return self._open[self._home[name]].get_tensor(name)


def _files(folder):
    """The safetensors files of a folder: those its index names, or all there are."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) > 1:
        raise ValueError(f"{folder} has {len(indices)} index files; keep one")
    names = sorted(set(_weight_map(indices[0]).values())) if indices else None
    files = [folder / n for n in names] if indices else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f"; {pickles[0]} is a pickle, which can run code: convert it to safetensors" if pickles else ""
        raise FileNotFoundError(f"{folder} holds no safetensors file{found}")
    root = folder.resolve()
    for file in files:
        if not file.exists():
            raise ValueError(f"{folder}: its index names {file.name}, which is not there")
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"{file} leads out of {folder}")
    return files


def _weight_map(index):
    """Tensor name to file name of an index file; file names that are paths are refused."""

    def no_duplicates(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"{index} names {twice[:5]} twice")
        return dict(pairs)

    try:
        content = json.loads(index.read_text(), object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"{index}: {error}") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names")
    for name, file in found.items():
        if "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: tensor {name} is said to be in '{file}', which is no file of this folder")
    return found
