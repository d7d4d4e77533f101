"""The table configs/COMPILED.md: the recipes on TPU slices at their global batches, each fits or names what does.

    python -m lmm_jax.aot.table

compiles one cell after another, minutes each, and writes the table after each. What was compiled stays in a cache, so
that an interrupted run continues; a change of the code, of a config, or of jax or libtpu compiles anew. `--recipes`,
`--sizes` and `--slices` compile some of the cells; the rows of others stay as they are in the file, with their dates.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import jax

from lmm_jax.aot import topology as slices
from lmm_jax.config import flatten, load_config

ROOT = pathlib.Path(__file__).parents[2]
# Recipe to config and the views of a pack: as many pictures as conversations, which each config counts.
RECIPES = {
    "LLaVA-1.5": ("llava.py", "data.views=2"),
    "M3": ("m3.py", "data.views=5"),
    "DeepStack-L": ("deepstack.py", "data.views=10"),  # a picture and its tiles, at most four
    "DeepStack-L-HD": (
        "deepstack.py:recipe=hd",
        "data.views=25",
    ),  # each also in four of twice the size
    "ConvLLaVA 1536": ("convllava.py", "data.views=2"),
}
MOST_FSDP = {"convllava.py": 64}  # which its narrowest stage, 192 channels, divides by
SIZES, SLICES = ("7b", "13b"), ("v5e-64", "v5e-256", "v5p-64", "v6e-64")
HEAD = """# What the TPU compiler says of the recipes

Full fine-tuning with float32 masters, the papers' global batches, remat full, libtpu {libtpu} and jax {jax}, compiled on
a machine without TPUs; nothing of this has run on one. Memory is of a device at the peak. Collectives are bytes that a
device receives in a step, beside them how many times the least that FSDP needs; those along `tensor`, which move
activations, are not in it. Seconds are the least that a step can take by published rates, MFU the most; see `lmm
compile --help`. A row is of the code of its date. Written by `python -m lmm_jax.aot.table`.

| recipe | size | slice | mesh | packs a step | memory, GiB | of these, parameters and optimizer | collectives, GiB | along tensor, GiB | step, s | limit | MFU | compiled in, s | on |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def mesh_sizes(config, devices, most) -> dict[str, int]:
    """As configs/README.md says: fsdp divides the packs of a step and is at most `most`, the rest is tensor's."""
    packs = config.train.batch_size // config.train.micro_batches
    fsdp = min(packs & -packs, devices, most)
    return {"fsdp": fsdp, "tensor": devices // fsdp}


def cell(recipe, model_size, topology, run):
    """What was compiled for a cell, and for larger slices of its kind until one fits: a list of results.

    Args:
      recipe, model_size, topology: one of `RECIPES`, of `SIZES`, and the name of a slice.
      run: `(config arguments, topology)` to a dict as `compile.compile` returns.
    """
    file, *overrides = RECIPES[recipe]
    argument = f"{file}{',' if ':' in file else ':'}size={model_size}"
    config = load_config(str(ROOT / "configs" / argument), *overrides)
    results, target = [], slices.find_slice(topology)
    for tried in (target, *slices.larger(target)):
        sizes = mesh_sizes(config, tried.devices, MOST_FSDP.get(file.partition(":")[0], tried.devices))
        if sizes["tensor"] > 8:
            break
        arguments = (argument, *overrides, *(f"mesh.{axis}={n}" for axis, n in sizes.items()))
        results.append(run(arguments, tried.name) | {"packs": config.train.batch_size})
        if results[-1]["fits"]:
            break
    return results


def row(recipe, model_size, results) -> str:
    """A line of the table."""
    first, last = results[0], results[-1]
    mesh = " × ".join(f"{axis} {n}" for axis, n in first["mesh"].items())
    start = f"| {recipe} | {model_size} | {first['topology']} | {mesh} | {first['packs']} |"
    state = f"{first['state_bytes'] / 2**30:.1f}"
    if not first["fits"]:
        peak = "more" if first["peak_hbm_bytes"] is None else f"{first['peak_hbm_bytes'] / 2**30:.1f}"
        instead = f"fits on {last['topology']}" if last["fits"] else "on no larger one either"
        start = f"{start} **{peak}** of {first['hbm_bytes'] / 2**30:.1f}: {instead}"
        return f"{start} | {state} | | | | | | | {first['date']} |"
    ratio = first["parameter_bytes"] / first["minimum_bytes"]
    tensor = (first["collective_bytes"] - first["parameter_bytes"]) / 2**30
    roof = first["roofline"]
    return (
        f"{start} {first['peak_hbm_bytes'] / 2**30:.1f} of {first['hbm_bytes'] / 2**30:.1f} | {state} "
        f"| {first['parameter_bytes'] / 2**30:.1f} ({ratio:.2f}×) | {tensor:.1f} | {roof['step_seconds']:.2f} "
        f"| {roof['limits']} | {roof['mfu']:.0%} | {first['compile_seconds']:.0f} | {first['date']} |"
    )


def fingerprint(arguments, topology) -> str:
    """Of all that a result depends on: config, slice, code, and the versions of the compiler."""
    config = load_config(str(ROOT / "configs" / arguments[0]), *arguments[1:])
    parts = [json.dumps(flatten(config), sort_keys=True, default=str), topology, *versions().values()]
    code = [ROOT / "lmm_jax" / "sharding.py"]
    for folder in ("models", "training"):
        code += sorted((ROOT / "lmm_jax" / folder).rglob("*.py"))
    code += [
        ROOT / "lmm_jax" / "aot" / f"{name}.py" for name in ("compile", "collectives", "hlo", "topology", "flops")
    ]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in code:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def versions() -> dict[str, str]:
    """Of jax and libtpu."""
    return {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}


class NotCompiled(LookupError):
    """A result that the cache does not hold."""


def cached(cache, compiles=True):
    """A `run` for `cell`: a process of its own for each compilation, whose result stays in the folder `cache`.

    Raises:
      NotCompiled: by `run`, if it must not compile and the result is not there.
    """

    def run(arguments, topology):
        path = cache / f"{fingerprint(arguments, topology)}.json"
        if not path.exists() and not compiles:
            raise NotCompiled(path)
        if not path.exists():
            print(f"compiling {' '.join(arguments)} for {topology}", flush=True)
            command = [sys.executable, "-m", "lmm_jax", "compile", "--config", f"configs/{arguments[0]}"]
            command += [f"--config.{override}" for override in arguments[1:]]
            done = subprocess.run(
                [*command, "--topology", topology, "--json"],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            cache.mkdir(parents=True, exist_ok=True)
            path.write_text(done.stdout.splitlines()[-1])
        return json.loads(path.read_text()) | {"date": datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()}

    return run


def table(run, written) -> str:
    """The file: a row for each cell whose results `run` gives without compiling.

    Those of others are taken over from the file `written` before, if that was by the same compiler.
    """
    head, rows = HEAD.format(**versions()), []
    lines = written.removeprefix(head).splitlines() if written.startswith(head) else []
    before = {tuple(line.split(" | ")[:3]): line for line in lines}
    for topology in SLICES:
        for model_size in SIZES:
            for recipe in RECIPES:
                line = before.get((f"| {recipe}", model_size, topology))
                with contextlib.suppress(NotCompiled):
                    line = row(recipe, model_size, cell(recipe, model_size, topology, run))
                rows += [line] if line else []
    return head + "\n".join(rows) + "\n"


def main(argv=None):
    """Compiles what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "configs" / "COMPILED.md")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "runs" / "compiled")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--slices", nargs="+", choices=SLICES, default=SLICES)
    args = parser.parse_args(argv)
    for topology in args.slices:
        for model_size in args.sizes:
            for recipe in args.recipes:
                print(row(recipe, model_size, cell(recipe, model_size, topology, cached(args.cache))), flush=True)
                written = args.out.read_text() if args.out.exists() else ""
                args.out.write_text(table(cached(args.cache, compiles=False), written))


if __name__ == "__main__":
    main()
