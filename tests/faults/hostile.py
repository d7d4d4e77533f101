"""Files that somebody else made to do harm: each a change to a sound folder, by name.

A canary is a file that appears if anything runs: on import of the module `canary`, or on unpickling a `Canary`.
"""

import io
import json
import os
import pathlib
import pickle
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

DEEP = "[" * 50_000
CANARY = "CANARY"  # environment variable: path of the file that appears


class Canary:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(os.environ[CANARY]),)


def keys(file, change):
    """Sets keys of a JSON object; a dot in a name leads into a part."""

    def apply(folder):
        content = json.loads((folder / file).read_text())
        for name, value in change.items():
            *parents, leaf = name.split(".")
            node = content
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        (folder / file).write_text(json.dumps(content))  # which writes NaN and Infinity as they are

    return apply


def text(file, content):
    """Replaces a file."""
    data = content if isinstance(content, bytes) else content.encode()

    def apply(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(data)

    return apply


def twice(file, key):
    """Writes a key a second time, with the same value."""

    def apply(folder):
        content = (folder / file).read_text()
        value = json.dumps(json.loads(content)[key])
        (folder / file).write_text(content.rstrip()[:-1] + f', "{key}": {value}}}')

    return apply


def link(file, target):
    """Puts a link in the place of a file; {outside} is a folder that does not belong to it."""

    def apply(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(str(target).format(outside=folder.parent / "outside"))

    return apply


def folder_instead(file):
    def apply(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    return apply


def pipe(file):
    def apply(folder):
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return apply


def header(change, length=None, tail=b""):
    """Changes the header of model.safetensors, as a dict or as text."""

    def apply(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        found = change(json.loads(content[8 : 8 + size]))
        data = (found if isinstance(found, str) else json.dumps(found)).encode()
        path.write_bytes(
            struct.pack("<Q", len(data) if length is None else length) + data + content[8 + size :] + tail
        )

    return apply


def weight(name, values, dtype):
    """Sets the first numbers of a tensor, whatever its type is."""

    def apply(folder):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        array = tensors[name].astype(dtype)
        array.reshape(-1)[: len(values)] = values
        save_file(tensors | {name: array}, folder / "model.safetensors")

    return apply


def weight_of_no_axis(name):
    """A tensor that is a single number."""

    def apply(folder):
        from safetensors.numpy import load_file, save_file

        save_file(
            load_file(folder / "model.safetensors") | {name: np.ones((), np.float32)}, folder / "model.safetensors"
        )

    return apply


def _first(header, **change):
    name = sorted(header.keys() - {"__metadata__"})[0]
    return header | {name: header[name] | change}


def _named_twice(header):
    name = sorted(header.keys() - {"__metadata__"})[0]
    return json.dumps(header)[:-1] + ", " + json.dumps({name: header[name]})[1:]


def pickled(file):
    return lambda folder: (folder / file).write_bytes(pickle.dumps({"model.norm.weight": Canary()}))


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    pickled("pytorch_model.bin")(folder)


def index(weight_map):
    return text("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


CONFIG, ADDED = "config.json", "tokenizer_config.json"
BAD_VALUES = {
    "ten million layers": ("num_hidden_layers", 10**7),
    "no layers": ("num_hidden_layers", 0),
    "less than no heads": ("num_attention_heads", -4),
    "a width in words": ("hidden_size", "wide"),
    "a list of widths": ("hidden_size", [64]),
    "true layers": ("num_hidden_layers", True),
    "half a head": ("num_attention_heads", 0.5),
    "no number for eps": ("rms_norm_eps", float("nan")),
    "an infinite base": ("rope_theta", float("inf")),
    "a base of nothing": ("rope_theta", 0),
    "scales without end": ("matryoshka_vis_token_scale", list(range(1, 10_000))),
    "a scale of all memory": ("matryoshka_vis_token_scale", [10**12]),
    "a row of all memory": ("tokenizer_model_max_length", 10**12),
    "a tied head in words": ("tie_word_embeddings", "false"),
    "a kind that is a list": ("model_type", ["llava_llama"]),
    "another kind": ("mm_projector_type", "os.system('x')"),
    "a projector of a thousand layers": ("mm_projector_type", "mlp1000x_gelu"),
    "a tower above": ("mm_vision_tower", "../outside"),
    "a tower elsewhere": ("mm_vision_tower", "/etc"),
    "a tower of numbers": ("mm_vision_tower", 7),
    "a level far away": ("mm_vision_select_layer", -(10**9)),
    "a scaling of nothing": ("rope_scaling", {"type": "linear", "factor": 0}),
    "a scaling in words": ("rope_scaling", {"type": "linear", "factor": "2"}),
    "a scaling that is a list": ("rope_scaling", ["linear", 2.0]),
    "architectures of numbers": ("architectures", [1]),
    "a template of code": ("lmm_jax_template", "{{ ''.__class__ }}"),
    "a template that is a list": ("lmm_jax_template", []),
    "quantised weights": ("quantization_config", {"bits": 4}),
    "a type of weights in numbers": ("torch_dtype", 16),
    "a code word": ("torch_dtype", "__import__('os')"),
}
MODELS = {
    **{name: keys(CONFIG, {key: value}) for name, (key, value) in BAD_VALUES.items()},
    "ten million layers of the tower": keys("tower/config.json", {"num_hidden_layers": 10**7}),
    "a picture of a million pixels a side": keys("tower/config.json", {"image_size": 10**6}),
    "a patch of nothing": keys("tower/config.json", {"patch_size": 0}),
    "an infinite eps of the tower": keys("tower/config.json", {"layer_norm_eps": float("inf")}),
    "an endless picture": keys(CONFIG, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(1e999, 96)]"}),
    "a config of all memory": lambda folder: text(CONFIG, '{"a": [' + "[]," * (6 * 2**20) + "1]}")(folder),
    "a norm that is one number": weight_of_no_axis("model.norm.weight"),
    "a config without end": link(CONFIG, "/dev/zero"),
    "a config in a pipe": pipe(CONFIG),
    "a config in pieces": text(CONFIG, '{"model_type": '),
    "an empty config": text(CONFIG, ""),
    "a config of a list": text(CONFIG, "[1]"),
    "a deep config": text(CONFIG, '{"model_type": ' + DEEP),
    "a config of no text": text(CONFIG, b"\xff\xfe\x00\x01"),
    "a key twice": twice(CONFIG, "hidden_size"),
    "a number beyond numbers": text(CONFIG, '{"mm_projector_type": "linear", "rms_norm_eps": 1e400}'),
    "a header of all memory": header(lambda h: h, length=2**62),
    "a header of a gigabyte": header(lambda h: h, length=2**30),
    "a header that is larger than any": header(lambda h: h | {"__metadata__": {"x": "x" * (17 * 2**20)}}),
    "a header in pieces": header(lambda h: json.dumps(h)[:-20]),
    "a header of a list": header(lambda h: "[1, 2]"),
    "a header of no numbers": header(lambda h: json.dumps(h)[:-1] + ', "x": NaN}'),
    "a deep header": header(lambda h: DEEP),
    "a name twice": header(_named_twice),
    "tensors without number": header(
        lambda h: h | {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_001)}
    ),
    "a tensor of all memory": header(lambda h: _first(h, shape=[2**40, 2**20])),
    "a tensor of less than nothing": header(lambda h: _first(h, shape=[-1])),
    "a tensor behind the end": header(lambda h: _first(h, data_offsets=[2**40, 2**41])),
    "a tensor over another": header(lambda h: _first(h, data_offsets=[0, 4])),
    "a tensor of no known type": header(lambda h: _first(h, dtype="OBJECT")),
    "bytes behind the tensors": header(lambda h: h, tail=b"x" * 64),
    "weights that are empty": text("model.safetensors", b""),
    "weights of seven bytes": text("model.safetensors", b"\x01" * 7),
    "weights that are a pickle": pickled("model.safetensors"),
    "a pickle alone": only_pickle,
    "a shard that is a pickle": lambda f: [pickled("b.safetensors")(f), index({"x": "b.safetensors"})(f)],
    "weights elsewhere": link("model.safetensors", "{outside}/model.safetensors"),
    "weights without end": link("model.safetensors", "/dev/zero"),
    "weights in a pipe": pipe("model.safetensors"),
    "weights that are a folder": folder_instead("model.safetensors"),
    "weights that are no numbers": weight("model.norm.weight", [np.nan], np.float32),
    "infinite weights": weight("lm_head.weight", [np.inf, -np.inf], np.float32),
    "infinite weights in float16": weight("model.norm.weight", [np.inf], np.float16),
    "a shard above": index({"x": "../outside/model.safetensors"}),
    "a shard elsewhere": index({"x": "/etc/passwd"}),
    "a shard in another folder": index({"x": "a/../../outside/model.safetensors"}),
    "a shard of another system": index({"x": "..\\outside\\model.safetensors"}),
    "a shard that is no shard": index({"x": "config.json"}),
    "a shard that is not there": index({"x": "gone.safetensors"}),
    "a shard that is a number": index({"x": 3}),
    "an index of a list": text("model.safetensors.index.json", "[]"),
    "an index of a list of shards": index(["model.safetensors"]),
    "an index with a key twice": text("model.safetensors.index.json", '{"weight_map": {}, "weight_map": {}}'),
    "an index without end": link("model.safetensors.index.json", "/dev/zero"),
    "a deep index": text("model.safetensors.index.json", '{"weight_map": ' + DEEP),
    "an empty tokenizer": text("tokenizer.model", b""),
    "a tokenizer of text": text("tokenizer.model", b"import os"),
    "a tokenizer without end": link("tokenizer.model", "/dev/zero"),
    "a tokenizer in a pipe": pipe("tokenizer.model"),
    "a piece with a huge id": text(ADDED, '{"added_tokens_decoder": {"1000000000": {"content": "<x>"}}}'),
    "a piece with an id below nothing": text(ADDED, '{"added_tokens_decoder": {"-5": {"content": "<x>"}}}'),
    "a piece far behind": text(ADDED, '{"added_tokens_decoder": {"15000000": {"content": "<x>"}}}'),
    "a piece behind the table": text(
        ADDED, '{"added_tokens_decoder": {"300": {"content": "<x>", "special": false}}}'
    ),
    "two pieces of one id": text(
        ADDED, '{"added_tokens_decoder": {"130": {"content": "<x>"}, "0130": {"content": "<y>"}}}'
    ),
    "pieces in a list": text(ADDED, '{"added_tokens_decoder": [1]}'),
    "a piece that is a number": text(ADDED, '{"added_tokens_decoder": {"130": {"content": 7}}}'),
    "a flag in words": text(ADDED, '{"legacy": "no"}'),
    "settings that are no JSON": text(ADDED, "{"),
    "settings of a list": text(ADDED, "[]"),
    "settings with a key twice": text(ADDED, '{"legacy": true, "legacy": false}'),
    "pieces elsewhere with a huge id": text("added_tokens.json", '{"<x>": 1000000000}'),
    "pieces elsewhere with an id in words": text("added_tokens.json", '{"<x>": "many"}'),
    "pieces elsewhere with half an id": text("added_tokens.json", '{"<x>": 1.5}'),
}

RUN = {
    "another schema": {"schema": 10**6},
    "a schema in words": {"schema": "1"},
    "ten million layers": {"model.decoder.depth": 10**7},
    "layers in words": {"model.decoder.depth": "4"},
    "true layers": {"model.decoder.depth": True},
    "no number for eps": {"model.decoder.norm_eps": float("nan")},
    "an infinite base": {"model.decoder.rope_theta": float("inf")},
    "an encoder of code": {"model.encoder": "__import__('os').system('x')"},
    "an encoder that is a list": {"model.encoder": ["vit"]},
    "a picture of a million pixels a side": {"model.vision.image_size": 10**6},
    "scales of all memory": {"model.scales": [10**12]},
    "a part that is a number": {"model": 3},
    "a field that nobody knows": {"model.os": "x"},
    "steps below nothing": {"train.steps": -1},
    "a batch of all memory": {"train.batch_size": 10**12},
    "a mesh in words": {"mesh.data": "all"},
    "rates that are objects": {"optimizer.groups": [{"vision": 0}]},
    "a row of all memory": {"data.length": 10**12},
    "a template of code": {"data.template": "{{ config }}"},
    "no data": {"data": None},
}
WORKDIRS = {
    **{name: keys(CONFIG, change) for name, change in RUN.items()},
    "a config in pieces": text(CONFIG, '{"schema": 1'),
    "a deep config": text(CONFIG, '{"schema": ' + DEEP),
    "a key twice": twice(CONFIG, "seed"),
    "a config without end": link(CONFIG, "/dev/zero"),
    "a config that is a pickle": lambda folder: (folder / CONFIG).write_bytes(pickle.dumps(Canary())),
}

RECORDS = "records/conversations/1.0.0"


def class_of_features(folder):
    path = folder / RECORDS / "features.json"
    content = json.loads(path.read_text())
    content["featuresDict"]["features"]["id"]["pythonClassName"] = "canary.Feature"
    path.write_text(json.dumps(content))


def moved(file):
    """The file lies elsewhere, and a link leads there."""

    def apply(folder):
        there = folder.parent / "outside" / pathlib.Path(file).name
        (folder / file).rename(there)
        (folder / file).symlink_to(there)

    return apply


def unpickled_index(folder):
    np.savez(folder / "index_train.npz", turn_offsets=np.array([Canary()], dtype=object))


def index_of_all_memory(folder):
    """An array of 2^50 numbers, by its header."""
    start = b"\x93NUMPY\x01\x00"
    about = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1125899906842624,), }"
    about = about.ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "index_train.npz", "w") as f:
        f.writestr("turn_offsets.npy", start + struct.pack("<H", len(about)) + about + b"\0" * 64)


def index_that_unpacks(folder):
    """Some hundred kilobytes that become 400 MB."""
    np.savez_compressed(folder / "index_train.npz", turn_tokens=np.zeros(100_000_000, np.int32))


def changed_index(name, value):
    """The index with one number in the place of all of an array's, and a picture of the last row."""

    def apply(folder):
        with np.load(folder / "index_train.npz") as f:
            arrays = dict(f) | {"image_sizes": np.array([[8, 8]], np.int32)}
        arrays["image_offsets"][-1] = 1
        arrays[name][:] = value
        np.savez(folder / "index_train.npz", **arrays)

    return apply


PREPARED = {
    "an index that unpacks": index_that_unpacks,
    "pictures that no record has": changed_index("turn_images", 2**31 - 1),
    "pictures of no side": changed_index("image_sizes", 0),
    "pictures of endless sides": changed_index("image_sizes", 2**31 - 1),
    "more to learn than there is": changed_index("turn_supervised", 2**31 - 1),
    "a class to import": class_of_features,
    "a class of the whole": keys(f"{RECORDS}/features.json", {"pythonClassName": "canary.Features"}),
    "features of a list": text(f"{RECORDS}/features.json", "[]"),
    "deep features": text(f"{RECORDS}/features.json", '{"featuresDict": ' + DEEP),
    "a builder above": keys("prepared.json", {"builder": "../../outside/1.0.0"}),
    "a builder elsewhere": keys("prepared.json", {"builder": "/etc"}),
    "a builder of code": keys("prepared.json", {"builder": "canary"}),
    "a split above": keys("prepared.json", {"splits": {"train": {"rows": 3}, "../x": {"rows": 1}}}),
    "rows without end": keys("prepared.json", {"splits.train.rows": 2**60}),
    "rows below nothing": keys("prepared.json", {"splits.train.rows": -1}),
    "a fingerprint that is a path": keys("prepared.json", {"fingerprint": "../../outside"}),
    "another fingerprint": keys("prepared.json", {"fingerprint": "0" * 64}),
    "digests of nothing": keys("prepared.json", {"files": {}}),
    "digests in words": keys("prepared.json", {"files": "none"}),
    "a key twice": twice("prepared.json", "builder"),
    "files by a path of their own": keys(
        f"{RECORDS}/dataset_info.json", {"splits": [{"name": "train", "filepathTemplate": "/etc/{SPLIT}"}]}
    ),
    "a description of other records": keys(f"{RECORDS}/dataset_info.json", {"fileFormat": "tfrecord"}),
    "a description of code": keys(f"{RECORDS}/dataset_info.json", {"moduleName": "canary"}),
    "an index to unpickle": unpickled_index,
    "an index of all memory": index_of_all_memory,
    "an index that is a pickle": lambda folder: (folder / "index_train.npz").write_bytes(pickle.dumps(Canary())),
    "an index elsewhere": moved("index_train.npz"),
    "records elsewhere": moved(f"{RECORDS}/conversations-train.array_record-00000"),
    "records of nothing": text(f"{RECORDS}/conversations-train.array_record-00000", b"\0" * 131072),
}


def png(width, height, chunks=b""):
    """A PNG of that size by its header, with next to nothing in it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunks + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def jpeg_of_scans(count):
    """A small progressive JPEG whose last scan stands there that often."""
    file = io.BytesIO()
    Image.new("RGB", (512, 512), "red").save(file, "jpeg", progressive=True)
    data = file.getvalue()[:-2]
    return data + data[data.rindex(b"\xff\xda") :] * count + b"\xff\xd9"


def tiff_of_a_tile(side):
    """A TIFF of 16 x 16 pixels in one tile of that side."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 72) + b"\0" * 64 + struct.pack("<H", len(tags)) + entries + b"\0" * 4


PICTURES = {
    "a JPEG of 20,000 scans": jpeg_of_scans(20_000),
    "a TIFF of a huge tile": tiff_of_a_tile(60_000),
    "a bomb": png(100_000, 100_000),
    "a tall bomb": png(1, 2**31 - 1),
    "a picture of no width": png(0, 5),
    "a picture that ends early": png(64, 64),
    "an empty picture": b"",
    "a picture of text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a program of PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\nshowpage\n",
    "a document": b"%PDF-1.4\n1 0 obj <<>> endobj",
    "a pickle": pickle.dumps({"x": 1}),
    "a film of nothing": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0" * 3 + b"\x2c",
    "a TIFF in a circle": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "a BMP of all memory": b"BM" + struct.pack("<4I2i2H6I", 54, 0, 54, 40, 2**30, 2**30, 1, 24, *[0] * 6),
}
