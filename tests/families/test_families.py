"""Families are data, and nobody but them spells what they are called."""

import ast
import dataclasses
import pathlib
import re

import pytest

from lmm_jax import families
from lmm_jax.families.kinds import Decoder, Encoder, Whole

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "lmm_jax"
ASKING = [PACKAGE / "config.py", *(p for room in ("hf", "release", "data") for p in (PACKAGE / room).rglob("*.py"))]
RECORD = PACKAGE / "release/runs.py"  # of what was run in which program: no code asks it for anything
SHIPPED = {PACKAGE / "hf" / whole.name / name for whole in families.WHOLES.values() for name in whole.code}
TABLES = {"decoder": families.DECODERS, "encoder": families.ENCODERS, "whole": families.WHOLES}


def names():
    """What families call themselves and their prompts."""
    found = set()
    for table in TABLES.values():
        for family in table.values():
            found |= {family.name, *getattr(family, "model_types", ()), *getattr(family, "prompts", ())}
            found |= {getattr(family, "architecture", ""), getattr(family, "model_type", "")}
    return found - {""} - {"convnext"}  # an encoder's module, too


def texts(tree):
    """All strings of a module but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", sorted(set(ASKING) - SHIPPED - {RECORD}), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_who_asks_a_family_spells_none(path):
    spelled = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names(), key=len, reverse=True)))})\b", re.IGNORECASE)
    found = [(line, text) for line, text in texts(ast.parse(path.read_text())) if spelled.search(text)]
    assert not found
    imported = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    allowed = {"lmm_jax.families", "lmm_jax.families.kinds"}
    assert {m for m in imported if m and m.startswith("lmm_jax.families")} <= allowed


@pytest.mark.parametrize("path", sorted((PACKAGE / "families").glob("*.py")), ids=lambda p: p.name)
def test_a_family_is_data(path):
    tree = ast.parse(path.read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert all(m.startswith("lmm_jax.families") or m in ("dataclasses", "collections.abc", "typing") for m in modules)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_name_their_families_and_these_are_frozen(kind):
    classes = {"decoder": Decoder, "encoder": Encoder, "whole": Whole}
    for name, family in TABLES[kind].items():
        assert family.name == name and type(family) is classes[kind]
        with pytest.raises(dataclasses.FrozenInstanceError):
            family.name = "another"


def test_names_of_prompts_are_of_one_family_each():
    told = [name for family in families.DECODERS.values() for name in family.prompts]
    assert len(set(told)) == len(told) and not set(told) & set(families.GENERAL_PROMPTS)
    assert set(families.prompts()) == {*told, *families.GENERAL_PROMPTS}
    assert families.DEFAULT_PROMPT in told and families.DEFAULT_DECODER in families.DECODERS


def test_model_types_are_of_one_family_each():
    for table in (families.DECODERS, families.ENCODERS):
        told = [kind for family in table.values() for kind in family.model_types]
        assert len(set(told)) == len(told)
    assert len({whole.model_type for whole in families.WHOLES.values()}) == len(families.WHOLES)
