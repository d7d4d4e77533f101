"""`python -m tests.faults.read_pictures FOLDER SEED COUNT` prepares damaged pictures, and prints what became of them.

The last line is JSON: rows that were taken and refused, the longest time that a picture took, the peak of memory of
the process in bytes, and what was wrong with the list of refusals.
"""

import json
import pathlib
import re
import sys
import time

import numpy as np

from lmm_jax.data.images import MAX_PIXELS, open_picture
from lmm_jax.data.prepare.folder import prepare_rows
from tests.faults.fuzz import damaged, sound_pictures

if __name__ == "__main__":
    folder, seed, count = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    random, slowest, faults = np.random.default_rng([16, seed]), 0.0, []
    sound = sound_pictures(random)
    names = [f"{number}.png" for number in range(count)]
    for name in names:
        data = damaged(sound[random.integers(len(sound))], sound, random)
        (folder / name).write_bytes(data)
        begin = time.monotonic()
        try:
            picture = open_picture(folder / name)
            if picture.mode != "RGB" or picture.size[0] * picture.size[1] > MAX_PIXELS:
                faults.append(f"{name}: {picture.mode} {picture.size}")
        except ValueError as error:
            if name not in str(error):
                faults.append(f"{name}: {error}")
        slowest = max(slowest, time.monotonic() - begin)
    turns = [{"from": "human", "value": "<image>\nread"}, {"from": "gpt", "value": "3"}]
    (folder / "ok.png").write_bytes(sound[0])
    rows = [{"id": name, "image": name, "conversations": turns} for name in [*names, "ok.png"]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare_rows(folder / "rows.jsonl", None, folder / "out", template="qa", workers=0, max_refused=1)
    refused = [json.loads(line) for line in (folder / "out/refused.jsonl").read_text().splitlines()]
    faults += [str(line) for line in refused if not (line["file"] and line["line"] and line["id"] and line["reason"])]
    # Of this process alone: what `getrusage` tells begins with the memory of the process that started it.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    taken, total = found["rows"], sum(found["refused"].values())
    if taken + total != count + 1 or len(refused) != total:
        faults.append(f"{taken} taken and {total} refused of {count + 1}; {len(refused)} are listed")
    print(json.dumps({"taken": taken, "refused": total, "slowest": slowest, "peak": peak, "faults": faults[:5]}))
