"""The tests themselves: each module has its file, and what is behind --long is listed with its reason."""

import ast
import pathlib
import re

from tests.conftest import LONGEST

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "lmm_jax"
README = (TESTS / "README.md").read_text()


def test_each_module_has_its_file_or_a_row_that_says_where_it_is_tested():
    rows = dict(re.findall(r"^\| `([\w/]+(?:\.py|/))` \| `([\w/]+\.py)` \|", README, re.MULTILINE))
    modules = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")]
    without = {path for path in modules if not (TESTS / path.parent / f"test_{path.name}").exists()}
    for module in sorted(without):
        missing = f"tests/{module.parent}/test_{module.name} is missing"
        listed = {str(module), f"{module.parent}/"} & rows.keys()
        assert listed, f"{missing}, and no row of tests/README.md says where it is tested"
    needed = {str(module) for module in without} | {f"{module.parent}/" for module in without}
    assert not rows.keys() - needed, "rows of tests/README.md for modules that have their file, or are gone"
    for place in rows.values():
        assert (TESTS / place).exists(), place


def test_what_is_no_module_is_installed_with_its_package():
    """An installation that is not editable has only what `package_data` of setup.py names."""
    setup = ast.parse((TESTS.parent / "setup.py").read_text())
    calls = [node for node in ast.walk(setup) if isinstance(node, ast.Call)]
    (named,) = (ast.literal_eval(key.value) for call in calls for key in call.keywords if key.arg == "package_data")
    installed = {path for package, names in named.items() for name in names for path in _folder(package).glob(name)}
    others = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md"))
    assert installed == set(others)


def _folder(package):
    return TESTS.parent.joinpath(*package.split("."))


def marked_long(path):
    """Names of a file's tests that, as a whole or with some of their parameters, need --long."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if re.search(r"\bmark\.long\b|\bby_default\(", decorators):
                yield node.name


def test_the_list_of_long_tests_is_that_of_the_marks():
    listed = re.findall(r"^\| `([\w/]+\.py)::(\w+)`[^|]* \| (?:\d+|–) \| \S.* \|$", README, re.MULTILINE)
    marked = {(str(path.relative_to(TESTS)), name) for path in TESTS.rglob("test_*.py") for name in marked_long(path)}
    assert sorted(listed) == sorted(marked)


def test_the_files_that_begin_first_are_there():
    assert not [name for name in LONGEST if not (TESTS / name).exists()]


def test_the_tests_that_the_page_names_are_there():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", README)
    assert len(named) > 40
    for path, name in named:
        assert f"def {name}(" in (TESTS / path).read_text(), f"{path}::{name}"
