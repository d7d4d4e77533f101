"""Stored records: in source order over several files, each as it was, and written one at a time."""

import tensorflow_datasets as tfds

from lmm_jax.data.prepare import records
from lmm_jax.data.prepared import as_turns


def record(n):
    """Of `n % 3` pictures and `n % 5` turns, of which the fourth is out of the loss."""
    turns = [{"role": "user", "text": f"turn {k} of {n} ☃", "kind": "kind" * (k % 2)} for k in range(n % 5)]
    turns[3:] = [turn | {"in_loss": False} for turn in turns[3:]]
    return {"id": f"row{n}", "images": [bytes([n, k, 255]) for k in range(n % 3)], "turns": turns}


def test_records_come_back_in_order_from_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROWS_PER_SHARD", 8)
    rows = [("train", n) for n in range(30)]
    rows[7:7], rows[20:20] = [("test", 100)], [("test", 101), ("test", 102)]  # between the others
    where = records.write_records(tmp_path, "rows", ["train", "test"], ((split, record(n)) for split, n in rows))
    assert len(list((tmp_path / where).glob("*train*array_record*"))) == 4
    builder = tfds.builder_from_directory(tmp_path / where)
    for split, numbers in (("train", range(30)), ("test", range(100, 103))):
        source = builder.as_data_source(split)
        assert len(source) == len(numbers)
        for found, want in zip(source, map(record, numbers), strict=True):
            assert found["id"].decode() == want["id"] and list(found["images"]) == want["images"]
            for field in ("role", "text", "kind"):
                assert [x.decode() for x in found["turns"][field]] == [turn[field] for turn in want["turns"]]
            in_loss = [turn.get("in_loss", True) for turn in want["turns"]]
            assert [turn.in_loss for turn in as_turns(found)] == in_loss
            del found["turns"]["in_loss"]  # as folders of earlier versions are read
            assert all(turn.in_loss for turn in as_turns(found))


def test_records_are_written_as_they_come(tmp_path, monkeypatch):
    """No row waits for the last one: the first files are there long before."""
    monkeypatch.setattr(records, "ROWS_PER_SHARD", 8)
    seen = []

    def source():
        for n in range(40):
            seen.append(len(list(tmp_path.rglob("*array_record*"))))
            yield record(n)

    records.write_records(tmp_path, "rows", ["train"], (("train", row) for row in source()))
    assert seen[0] <= 1 and seen[20] >= 2 and seen == sorted(seen)
