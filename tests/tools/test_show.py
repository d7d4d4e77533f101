"""Tables of what a config or a folder holds."""

from lmm_jax.tools import show


def rows(text):
    """Cells of each line of a table, by the first one."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_a_table_of_parameters_adds_up(tiny):
    table = rows(show.param_table(tiny('optimizer.groups=(("vision", 0.0),)')))
    _, shape, axes, number, rate = table["decoder/layers/up/kernel"]
    assert (shape, axes, number) == ("3×32×64", "layers,embed,mlp", "6,144") and float(rate) > 0
    assert table["vision/patches/kernel"][-1] == "frozen"
    numbers = {name: int(cells[-2].replace(",", "")) for name, cells in table.items() if "/" in name}
    totals = {name: int(cells[-1].replace(",", "")) for name, cells in table.items() if len(cells) == 2}
    assert totals.pop("all") == sum(numbers.values()) == sum(totals.values())
    assert totals["vision"] == sum(n for name, n in numbers.items() if name.startswith("vision/"))


def test_a_table_of_shardings_says_what_a_device_holds(tiny):
    text = show.sharding_table(tiny("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"))
    assert text.startswith("mesh: ") and "fsdp 4" in text.splitlines()[0]
    (up,) = [line for line in text.splitlines() if line.startswith("decoder/layers/up/kernel")]
    assert "(None, 'fsdp', 'tensor')" in up and up.split()[-1] == str(3 * 32 * 64 / 8 * 4 / 1024)
    (norm,) = [line for line in text.splitlines() if line.startswith("decoder/norm/scale")]
    assert norm.endswith("replicated")
