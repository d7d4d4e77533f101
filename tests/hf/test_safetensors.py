"""Files of tensors: read without trusting them, written tensor by tensor."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmm_jax.hf import safetensors


def test_written_tensors_must_be_the_announced_ones(tmp_path):
    x = np.zeros((2, 3), np.float32)
    for wrong in (("b", x), ("a", x.astype(np.float16)), ("a", np.zeros((3, 2), np.float32))):
        with pytest.raises(ValueError, match=r"expected a \(2, 3\) float32"):
            safetensors.write(tmp_path, {"a": (2, 3)}, "float32", [wrong])
    with pytest.raises(ValueError, match="a is not contiguous"):
        safetensors.write(tmp_path, {"a": (2, 3)}, "float32", [("a", np.zeros((3, 2), np.float32).T)])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "no file of this folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors, which is not there"),
        ({"weight_map": {"a": "model.safetensors"}}, "promises 1 tensors"),
        ({"tensors": []}, "no weight_map"),
    ],
)
def test_bad_indices_are_refused(m3, index, message):
    (m3 / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        safetensors.Folder(m3)


def test_bad_files_are_refused(m3, tmp_path):
    weights = (m3 / "model.safetensors").read_bytes()
    (m3 / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        safetensors.Folder(m3)
    (m3 / "model.safetensors").unlink()
    (m3 / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle"):
        safetensors.Folder(m3)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(weights)
    (m3 / "model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        safetensors.Folder(m3)


def test_a_name_in_two_files_is_refused(m3):
    weights = load_file(m3 / "model.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, m3 / "more.safetensors")
    with pytest.raises(ValueError, match=r"tensor model.norm.weight is in"):
        safetensors.Folder(m3)


def test_headers_that_lie_are_refused(m3):
    """A name twice, data that overlap, a header larger than the file or than any header."""
    path = m3 / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length].decode(), content[8 + length :]

    def write(header, length=None):
        text = header.encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)

    keys = json.loads(header)
    first, second = (json.dumps({name: keys[name]})[1:-1] for name in sorted(keys.keys() - {"__metadata__"})[:2])
    overlapping = dict(keys, **{"model.norm.weight": keys["model.layers.0.input_layernorm.weight"]})
    for bad, size in (
        ("{" + first + "," + first + "," + second + "}", None),
        (json.dumps(overlapping), None),
        (header, len(content)),
        (header, 2**62),
    ):
        write(bad, size)
        with pytest.raises(ValueError, match=r"model.safetensors is not a sound safetensors file"):
            safetensors.Folder(m3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_in_several_files_is_read_back(tmp_path, monkeypatch, dtype):
    """By us and by the library's own reader, to which each file is a whole one."""
    monkeypatch.setattr(safetensors, "SHARD", 100)
    rng = np.random.default_rng(0)
    shapes = {"b": (2, 3), "a": (40, 5), "c": (), "d": (3, 1)}
    arrays = {name: np.array(rng.normal(size=shape), np.dtype(dtype)) for name, shape in shapes.items()}
    names = safetensors.write(tmp_path, shapes, dtype, iter(arrays.items()))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names) and names[-1] == "model.safetensors.index.json"
    assert names[:-1] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert {name: int(file[6:11]) for name, file in index["weight_map"].items()} == {"b": 1, "a": 2, "c": 3, "d": 3}
    folder = safetensors.Folder(tmp_path)
    assert folder.shapes == shapes and set(folder.dtypes.values()) == {dtype}
    for name, x in arrays.items():
        assert folder.read(name).dtype == x.dtype
        np.testing.assert_array_equal(folder.read(name), x)
        np.testing.assert_array_equal(load_file(tmp_path / index["weight_map"][name])[name], x)


def test_a_file_holds_tensors_in_their_order_up_to_its_size():
    assert safetensors.plan_shards({"a": 4, "b": 6, "c": 1, "d": 20, "e": 3}, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert safetensors.plan_shards({"a": 11}, 10) == [["a"]]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_that_are_not_finite_are_counted_and_named(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(safetensors, "_AT_ONCE", 7)  # so that an array is looked at in several pieces
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 9)).astype(np.dtype(dtype))
    x[1, 1], x[2, 2] = ml_dtypes.finfo(x.dtype).max, -ml_dtypes.finfo(x.dtype).max
    assert safetensors.count_not_finite(x) == 0 == safetensors.count_not_finite(x[:0])
    safetensors.write(tmp_path, {"a": x.shape}, dtype, [("a", x)])
    np.testing.assert_array_equal(safetensors.Folder(tmp_path).read("a"), x)
    x[0, 3], x[3, 3], x[4, 8] = np.nan, np.inf, -np.inf
    assert safetensors.count_not_finite(x) == 3 == safetensors.count_not_finite(x.T)
    safetensors.write(tmp_path, {"a": x.shape}, dtype, [("a", x)])
    with pytest.raises(ValueError, match=r"model\.safetensors: 3 of the 45 numbers of tensor a are not finite"):
        safetensors.Folder(tmp_path).read("a")


def test_whole_numbers_are_always_finite():
    assert safetensors.count_not_finite(np.full(3, -1, np.int32)) == 0
