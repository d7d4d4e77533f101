"""Nothing that is read is run: no call in the library that makes code of data, but for those that are listed here."""

import ast
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [*(ROOT / "lmm_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Modules that run what they read.
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "code"}
# Functions that do, by their name or by module and name.
CALLS = {
    *("eval", "exec", "execfile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("os.system", "os.popen", "os.execv", "os.execve", "os.spawnv", "pty.spawn", "subprocess.getoutput"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "runpy.run_path", "runpy.run_module"),
    *("ctypes.CDLL", "tensorflow_datasets.builder_from_directory", "tensorflow_datasets.load"),
    *("numpy.lib.format.read_array", "numpy.lib.npyio.load"),
}
BY_ATTRIBUTE = {"exec_module", "load_module", "read_pickle", "find_class"}
NAMED = {"importlib.import_module"}  # allowed of a constant
# What is allowed, by file and function, and why.
ALLOWED = {
    ("lmm_jax/config.py", "_run_file"): "a config file is a program of the user's own, whom the command line names",
    ("lmm_jax/__init__.py", "__getattr__"): "names of ours, by a constant table",
    ("lmm_jax/training/metrics.py", "_extra"): "the names of two extras, which are constants",
    ("lmm_jax/data/pipeline.py", "_end_with_parent"): "the C library of this process, for a call that Python lacks",
    ("lmm_jax/release/verify.py", "verify"): "transformers runs the classes that our own export has just written",
}


# What modules are mostly called, for snippets that do not import them.
USUAL = {"np": "numpy", "tfds": "tensorflow_datasets"}


def dotted(node, names):
    """`a.b.c` of a name or attribute, by what was imported as its first part; "" of anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    inner = dotted(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def imported(tree):
    """What the names that a module imports stand for: `{"np": "numpy", "system": "os.system"}`."""
    names = dict(USUAL)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {x.asname: x.name for x in node.names if x.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {x.asname or x.name: f"{node.module or ''}.{x.name}" for x in node.names}
    return names


def faults(tree):
    """`(function, what)` of everything in a module that could run what is read."""
    names = imported(tree)

    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            yield from of(child, inside)
            yield from walk(child, inside)

    def of(node, function):
        if isinstance(node, ast.Import):
            yield from ((function, f"import {x.name}") for x in node.names if x.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in MODULES:
            yield function, f"from {node.module} import …"
        elif isinstance(node, ast.ImportFrom) and any(x.name == "*" for x in node.names):
            yield function, f"from {node.module} import *"
        elif isinstance(node, ast.Name | ast.Attribute) and dotted(node, names) in CALLS:
            yield function, dotted(node, names)  # whether it is called here or handed on
        elif isinstance(node, ast.Call):
            name, words = dotted(node.func, names), {word.arg: word.value for word in node.keywords}
            last = node.func.attr if isinstance(node.func, ast.Attribute) else name.rpartition(".")[2]
            constant = (
                bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value not in MODULES
            )
            if name == "compile" and not is_ours(tree, name):
                yield function, "compile(…)"
            if last in BY_ATTRIBUTE or (name in NAMED and not constant):
                yield function, f"{name or last}(…)"
            if is_true(words.get("shell")):
                yield function, f"{name}(shell)"
            # A loader of ours hands it on to torch's weights-only reader.
            if is_true(words.get("allow_pickle")) and not (name.startswith("lmm_jax.") or is_ours(tree, name)):
                yield function, f"{name}(allow_pickle)"
            if name == "numpy.load" and (None in words or any(map(is_true, node.args[2:])) or has_star(node)):
                yield function, "numpy.load with arguments that may allow pickles"
            if name == "torch.load" and not is_true(words.get("weights_only")):
                yield function, "torch.load without weights_only=True"
            if "trust_remote_code" in words:
                yield function, "trust_remote_code"
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if "trust_remote_code" in keys:
                yield function, "trust_remote_code"

    yield from walk(tree, "")


def is_ours(tree, name):
    """Whether a module has something of its own under the name of a builtin, as `aot/fit.py` has a `compile`."""
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree))


def is_true(node):
    """Whether an argument is there and not a constant that is false."""
    return node is not None and not (isinstance(node, ast.Constant) and not node.value)


def has_star(node):
    return any(isinstance(arg, ast.Starred) for arg in node.args)


def places_of(path):
    """What a file of ours could run of what it reads, by file and function."""
    found = {}
    for function, what in faults(ast.parse(path.read_text())):
        found.setdefault((str(path.relative_to(ROOT)), function), []).append(what)
    return found


def test_nothing_in_the_library_runs_what_it_reads():
    found = {place: what for path in SOURCES for place, what in places_of(path).items()}
    assert len(SOURCES) > 150
    assert {place: what for place, what in found.items() if place not in ALLOWED} == {}
    assert not ALLOWED.keys() - found.keys(), "listed, but not there any more"


def test_nothing_in_a_notebook_runs_what_it_reads():
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                python = re.sub(r"^(\s*)[%!].*", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)
                assert not list(faults(ast.parse(python))), path.name
    assert NOTEBOOKS


@pytest.mark.parametrize(
    "text",
    [
        *(
            "import pickle",
            "from dill import loads",
            "import marshal as m",
            "eval(x)",
            "exec(x)",
            "compile(x, '', 'exec')",
        ),
        *("__import__(name)", "yaml.load(f)", "os.system(x)", "subprocess.run(x, shell=True)", "torch.load(f)"),
        *("torch.load(f, weights_only=False)", "AutoModel.from_pretrained(f, trust_remote_code=True)"),
        *("np.load(f, allow_pickle=True)", "importlib.import_module(read['module'])", "spec.loader.exec_module(m)"),
        *(
            "tfds.builder_from_directory(f)",
            "{'trust_remote_code': True}",
            "runpy.run_path(f)",
            "shell = run(x, shell=y)",
        ),
        *("np.load(f, allow_pickle=allow_pickle)", "np.load(f, None, True)", "np.load(f, *x)", "np.load(f, **x)"),
        *("from os import system; system(x)", "from os import system as s; s(x)", "import os as o; o.system(x)"),
        *("from importlib import import_module; import_module(x)", "import importlib as i; i.import_module(x)"),
        *(
            "from torch import load; load(f)",
            "from numpy import load; load(f, None, x)",
            "import torch as t; t.load(f)",
            "importlib.import_module('pickle')",
        ),
        *("from os import *", "list(map(eval, x))", "from builtins import exec as e; e(x)", "run = os.system"),
        *("other.load(f, allow_pickle=args.allow_pickle)", "from pandas import read_pickle; read_pickle(f)"),
    ],
)
def test_the_search_finds(text):
    assert list(faults(ast.parse(f"def f():\n    {text}")))


@pytest.mark.parametrize(
    "text",
    [
        *("re.compile(x)", "model.eval()", "ast.literal_eval(x)", "importlib.import_module('jax')"),
        *("run(x, shell=False)", "np.load(f)", "np.load(f, 'r', False)", "np.load(f, allow_pickle=False)"),
        *("from lmm_jax import load; load(f, allow_pickle=x)", "from importlib import import_module as i; i('jax')"),
    ],
)
def test_the_search_passes(text):
    assert not list(faults(ast.parse(f"def f():\n    {text}")))
