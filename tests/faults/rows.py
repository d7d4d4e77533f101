"""The thirty faults that a run must survive, and how tests say which of them they prove.

    @row(3, few=20, full=1000)
    def test_damage_is_never_silent(trials, small_run):
        def check(number):
            random = trials.random(number)
            ...

        trials.each(check)

A test that proves a row does it by trials, numbered 0, 1, 2, …: `few` of them by default, `full` by `--faults`. What
is random in a trial comes from `trials.random(number)`, so that one that failed can be repeated alone by
`--trial NUMBER`.
"""

import pytest

# Number: the fault, and what is promised of it.
ROWS = {
    1: ("kill -9 at any moment", "nothing is lost beyond the last commit; what is restored is bit-equal"),
    2: ("half-deleted, empty and stray step folders", "named and passed over; the newest sound step goes on"),
    3: ("flipped bits and bytes anywhere in a step", "never used silently: right, an older step, or a refusal"),
    4: ("the newest step is damaged", "an older sound step goes on, and it is said; all damaged is refused"),
    5: ("truncated, empty and missing files", "noticed and named"),
    6: ("the disk is full", "earlier steps stay, nothing half-written stays, the space comes back"),
    7: ("SIGTERM", "saves and ends with 75 within 10 s, no step lost"),
    8: ("a second signal", "spoils neither the save nor the exit code; no process stays"),
    9: ("another host is killed", "the others end within 15 s; no process stays; a restart goes on"),
    10: ("another host, or a reader, stands still", "ends within the deadline, with the stacks of all threads"),
    11: ("stopped and continued, same devices", "the whole state is bit-equal to a run that was not stopped"),
    12: ("the same run again", "bit-equal, in float32 and bfloat16"),
    13: ("continued on other devices or hosts", "the same records; the loss differs by 1e-5 at most"),
    14: ("another mesh", "the same records; the loss differs by 1e-5 at most"),
    15: (
        "another config, tokenizer, data, seed or dtype",
        "refused with what differs; benign ones are not",
    ),
    16: ("fuzzed pictures", "valid or skipped by name; within 1 GiB and 2 s each"),
    17: ("unusual modes of pictures", "one documented result each"),
    18: ("fuzzed JSON lines", "taken or refused by file, line and reason"),
    19: ("odd conversations", "refused or cut by policy; a batch and its loss are always finite"),
    20: ("many bad records", "the run stops exactly at its limits, also after a restart"),
    21: ("one percent bad records", "no other record moves, on 1, 2 and 4 hosts"),
    22: ("NaN and Inf", "the update is skipped, its records are named; never applied"),
    23: ("a spike of the loss", "skipped; no false alarm in 1,000 clean steps"),
    24: ("a reader process dies or raises", "an error within 5 s; after it no record is lost or read twice"),
    25: ("a wrong export of others", "refused with the whole list; nothing is loaded"),
    26: ("hostile files", "refused before they are used; nothing outside is touched"),
    27: ("code in configs", "no eval, exec, pickle or yaml.load in the library"),
    28: ("a leaf of the state on the wrong devices", "named before the first step"),
    29: ("silent corruption on one device", "found when replicas are compared, before it is saved"),
    30: ("a slow host", "named within 20 steps"),
}


def row(number, few, full, cases=1):
    """Marks a test that proves a row.

    Args:
      number: of the row.
      few: trials by default; with 0 the test is left out then.
      full: trials in a run with `--faults`.
      cases: of which each trial consists, as the table counts them: a thousand pictures that one process reads.
    """
    assert number in ROWS and 0 <= few <= full
    return pytest.mark.row(number=number, few=few, full=full, cases=cases)
