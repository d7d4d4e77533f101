"""One percent of bad records: no other moves, on any number of hosts."""

import numpy as np
import pytest

from lmm_jax.data.pipeline import batches
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import Prepared
from tests.data.test_input_path import text_rows
from tests.faults.rows import row
from tests.opened import open_packs


@row(21, few=1, full=3)
def test_bad_records_move_no_other(trials, tiny, tmp_path):
    """Of 10,000 rows in a full run, of 300 by default; read by 1, 2 and 4 hosts."""
    count = 10_000 if trials.full else 300
    text_rows(tmp_path / "rows.jsonl", count)
    prepare_rows(tmp_path / "rows.jsonl", None, tmp_path / "out", template="qa", workers=0)
    config = tiny("model.decoder.vocab_size=512", f"data.path={tmp_path / 'out'}", "data.length=256")
    with config.unlocked():
        config.data.rows, config.data.views, config.data.targets = 2, 0, None
    packs = open_packs(config, "train", packs_per_step=8, shuffle=True)
    steps = packs.stream._end(0) // 8
    good, read = read_all(packs, 1, steps), Prepared.__getitem__

    def check(number):
        bad = set(trials.random(number).choice(count, count // 100, replace=False).tolist())

        def broken(prepared, row):
            if row in bad:
                raise RuntimeError("Corrupted records file")
            return read(prepared, row)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Prepared, "__getitem__", broken)
            for hosts in (1, 2, 4):
                found = read_all(packs, hosts, steps)
                assert found["records"] == good["records"]
                for name in ("segment", "position"):
                    np.testing.assert_array_equal(found[name], good[name])
                same = (found["id"] == good["id"]).reshape(len(good["id"]), -1).all(axis=1)
                np.testing.assert_array_equal(same, [not bad & set(rows) for rows in good["records"]])
                seen = {record for of_pack in good["records"] for record in of_pack}
                assert {fault["record"] for fault in found["faults"]} == bad & seen

    trials.each(check)


def read_all(packs, hosts, steps):
    """Everything that `hosts` hosts read in `steps` steps, in global order."""
    parts = [np.arange(8).reshape(hosts, -1)[h] for h in range(hosts)]
    read = [list(batches(packs, part, 0, steps, threads=1, workers=0)) for part in parts]
    in_order = [read[h][step] for step in range(steps) for h in range(hosts)]
    out = {name: np.concatenate([b[name] for b in in_order]) for name in ("id", "segment", "position")}
    out["records"] = [[int(r) for r in row if r >= 0] for b in in_order for row in b["record_index"]]
    return out | {"faults": [fault for b in in_order for fault in b["faults"]]}
