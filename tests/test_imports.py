"""Imports go one way, and importing costs nothing until something is used."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import time

import pytest

from lmm_jax import families

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lmm_jax"

# The rooms, lowest first: each imports from those before it, from itself, and where it says so from no others.
# DESIGN: cli, tools, bench -> release, evaluation -> aot, generation -> training -> hf -> config -> models, data
# -> families, sharding, storage, reduction; demo -> tools, generation.
LOWEST = {
    "families",
    "sharding",
    "storage",
    "lock",
    "errors",
    "ranges",
    "strict_json",
    "pods",
    "free_memory",
    "watchdog",
    "exit_codes",
}
ALLOWED = {
    "sharding": set(),
    "storage": {"errors"},
    "free_memory": set(),
    "errors": set(),
    "exit_codes": set(),
    "interrupts": {"pods", "exit_codes"},
    "lock": {"storage"},
    "watchdog": {"pods"},
    "pods": {"exit_codes"},
    "families": set(),
    "reduction": set(),
    "ranges": set(),
    "strict_json": {"ranges", "storage"},
    "models": {"families", "reduction", "ranges", "sharding"},
    "data": {"families", "reduction", "storage", "lock", "ranges", "strict_json"},
    "fields": {"models", "data", "families", "ranges", "reduction", "sharding"},
    "config": {"fields", "models", "data", "families", "ranges", "strict_json", "sharding", "storage"},
    "hf": {"models", "data", "config", "fields", "families", "storage", "ranges", "strict_json"},
    "training": {"hf", "models", "data", "config", "interrupts", *LOWEST},
    "compile_cache": {"storage", "errors"},
    "asking": {"generation", "training", "data", "config", "interrupts", *LOWEST},
    "aot": {"training", "models", "data", "config", *LOWEST},
    "generation": {"training", "hf", "models", "data", "config", "reduction", *LOWEST},
    "evaluation": {"generation", "data", "config", *LOWEST},
    "integrations": {"generation", "data", *LOWEST},
    "release": {"generation", "training", "hf", "models", "data", "config", *LOWEST},
    "bench": {"aot", "generation", "training", "models", "data", "config", *LOWEST},
    "demo": {"tools", "generation", "models", "data", "config", "reduction", *LOWEST},
    "tools": {"evaluation", "generation", "training", "hf", "models", "data", "config", "fields", *LOWEST},
}
# Stricter than its room: it runs in a process of its own, beside torch.
STRICTER = {"bench.peer": {"bench.shape"}}
FORBIDDEN = {"torch", "transformers", "tensorflow"}
# Where an extra is asked for, and imported only then.
RUNS_OTHERS = {
    ("release.verify", "torch"),
    ("release.verify", "transformers"),
    ("hf.safetensors", "torch"),
    ("bench.peer", "torch"),  # a process of its own
    ("bench.peer", "transformers"),
}
# Never imported by ours: transformers runs copies of them, so that they may import of ours but one another.
SHIPPED = [PACKAGE / "hf" / whole.name / name for whole in families.WHOLES.values() for name in whole.code]
OF_SHIPPED = {"torch", "transformers", "numpy", "PIL", *sys.stdlib_module_names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted(set(PACKAGE.rglob("*.py")) - set(SHIPPED)), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    module, room = ".".join(parts), parts[0]
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in FORBIDDEN or (module, top) in RUNS_OTHERS, name
        assert not (room == "data" and top == "jax"), f"{path.name}: data must not import jax"
        if top == "lmm_jax" and room in ALLOWED:
            ours = ".".join(rest)
            allowed = STRICTER.get(module, ALLOWED[room] | {room})
            assert any(ours == a or ours.startswith(a + ".") for a in allowed), f"{module} imports {name}"


def test_nothing_uses_what_jax_keeps_to_itself():
    """It changes without notice; text is looked for, as imports may stand in strings, notebooks and scripts."""
    private = "jax." + "_src"
    files = [path for kind in ("py", "ipynb", "sh") for path in ROOT.rglob(f"*.{kind}") if not hidden(path)]
    assert len(files) > 200
    assert not [path for path in files if private in path.read_text()]


def hidden(path):
    """Of an environment or a cache, not of the tree."""
    return any(part.startswith(".") for part in path.relative_to(ROOT).parts)


def test_every_room_has_its_place():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__", "cli", "verbs"} == set(ALLOWED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_what_an_export_ships_needs_nothing_of_ours(path):
    for name in imported(path):
        if name.startswith("."):
            assert name.split(".")[1] in [other.stem for other in SHIPPED], name
        else:
            assert name.split(".")[0] in OF_SHIPPED, name


def test_import_is_fast_and_touches_no_backend():
    code = (
        "import sys, lmm_jax; lmm_jax.load_config; assert 'jax' not in sys.modules; "
        "import jax, lmm_jax.models.lmm, lmm_jax.training.loop, lmm_jax.generation.model; "
        "jax.config.update('jax_num_cpu_devices', 3)"  # an error once there is a backend
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import lmm_jax"], check=True)
    assert time.monotonic() - begin < 2


def test_help_is_fast_and_names_every_verb():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lmm_jax", "--help"], check=True, capture_output=True, text=True)
    assert time.monotonic() - begin < 1.5
    verbs = ("prepare", "train", "evaluate", "generate", "chat", "demo", "export", "compile", "show", "bench")
    for verb in verbs:
        assert verb in done.stdout


# Of packages that a declared one is made of, so that it is always there with that.
BROUGHT_ALONG = {
    "absl": "ml-collections",
    "etils": "orbax-checkpoint",
    "fsspec": "orbax-checkpoint",  # of etils, which opens buckets with it
    "jaxlib": "jax",
    "array_record": "grain",
    "loguru": "lmms-eval",
    "ml_dtypes": "jax",
    "starlette": "gradio",
}
REQUIREMENT = re.compile(r"[A-Za-z0-9_.-]+")


def declared(text):
    """Distributions that setup.py names: those of every installation, and those with extras too."""
    (call,) = [
        node.value for node in ast.parse(text).body if isinstance(node, ast.Expr) and "setup" in ast.dump(node)
    ]
    words = {word.arg: word.value for word in call.keywords}
    always = {distribution(x) for x in ast.literal_eval(words["install_requires"])}
    return always, always | {distribution(x) for of in ast.literal_eval(words["extras_require"]).values() for x in of}


def distribution(requirement):
    return REQUIREMENT.match(requirement)[0].lower().replace("_", "-")


def top_level(path):
    """Modules that are imported as soon as a file is."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_what_is_imported_at_once_is_required_and_the_rest_is_an_extra():
    """A fresh installation has no more than setup.py names, whatever this one has."""
    always, named = declared((ROOT / "setup.py").read_text())
    of_module = importlib.metadata.packages_distributions()

    def missing(module, known):
        if module in sys.stdlib_module_names or module == "lmm_jax":
            return False
        owners = {
            BROUGHT_ALONG.get(module, owner.lower().replace("_", "-")) for owner in of_module.get(module, [module])
        }
        return not owners & known

    wrong = set()
    for path in set(PACKAGE.rglob("*.py")) - set(SHIPPED):
        extra = path.parts[-2] in ("integrations", "demo") or path.stem == "peer"  # rooms that an extra is for
        wrong |= {(path.name, module) for module in top_level(path) if missing(module, named if extra else always)}
        wrong |= {(path.name, name) for name in map(first, imported(path)) if name and missing(name, named)}
    assert not wrong


def first(name):
    return name.split(".")[0]
