"""Fuzzed rows of conversations: each is taken, or refused by its file, line and reason; sound ones stay."""

import json

from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import Prepared
from tests.faults.fuzz import damaged_row, sound_row
from tests.faults.rows import row

CASES = 500  # lines of a file
DAMAGED = range(1, CASES, 3)  # the other two of three are sound


@row(18, few=1, full=60, cases=len(DAMAGED))
def test_fuzzed_lines_are_taken_or_refused_by_file_and_line(trials, digits_folder, tmp_path):
    """Ten thousand damaged lines between twice as many sound ones, which are all taken."""

    def check(number):
        random, folder = trials.random(number), tmp_path / str(number)
        folder.mkdir()
        lines, sound = [], set()
        for i in range(CASES):
            good = sound_row(i, random)
            if i in DAMAGED:
                lines.append(damaged_row(good, random))
            else:
                lines.append(json.dumps(good))
                sound.add(good["id"])
        text = "".join(f"{line}\n" for line in lines)
        (folder / "rows.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
        tokenizer = digits_folder / "tokenizer.model"
        found = prepare_rows(
            folder / "rows.jsonl", None, folder / "out", tokenizer, template="qa", workers=0, max_refused=1
        )
        refused = [json.loads(line) for line in (folder / "out/refused.jsonl").read_text().splitlines()]
        assert found["rows"] + len(refused) >= len(lines) - len(DAMAGED)
        assert len(refused) == sum(found["refused"].values())
        for line in refused:
            assert line["file"].endswith("rows.jsonl") and line["reason"], line
            assert 1 <= line["line"] <= len(lines), line
        stored = Prepared(folder / "out", "train")
        assert len(stored) == found["rows"]
        ids = {stored[i]["id"].decode() for i in range(len(stored))}
        assert not sound - ids, f"sound rows are lost: {sorted(sound - ids)[:5]}"

    trials.each(check)
