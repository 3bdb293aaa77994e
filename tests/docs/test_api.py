"""Every public name has a docstring that names its arguments, and a place in the API reference."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import lion
from lion import reference

API = Path(__file__).parents[2] / "docs" / "api"
# The modules that users and contributors call, each with the page of its package.
MODULES = {
    "lion.reference": "reference",
    "lion.cpu_kernels": "cpu_kernels",
    "lion.cuda_kernels.launch": "cuda_kernels",
    "lion.cuda_kernels.table": "cuda_kernels",
    "lion": "lion",
    "lion.functional": "lion",
    "lion.exchange": "lion",
    "lion.trainer": "lion",
}


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a module: those in ``__all__``, or the functions and classes it defines."""
    for name in getattr(module, "__all__", None) or vars(module):
        value = getattr(module, name)
        if isinstance(value, ModuleType) or name.startswith("_"):
            continue
        if hasattr(module, "__all__") or getattr(value, "__module__", None) == module.__name__:
            yield name, value


def documented(page: str) -> set[str]:
    """Return the full names that a page of the API reference shows."""
    names, module = set(), ""
    for line in (API / f"{page}.md").read_text().splitlines():
        if found := re.match(r"\.\. (?:currentmodule|automodule):: (\S+)", line):
            module = found[1]
        elif found := re.match(r"\.\. (?:auto(?:function|class)|py:data):: ([\w.]+)", line):
            names.add(found[1] if "." in found[1] else f"{module}.{found[1]}")
        elif line.strip() == ":members:":
            names.update(f"{module}.{name}" for name, _ in public(importlib.import_module(module)))
    return names


def names() -> list[str]:
    return [f"{m}.{name}" for m in MODULES for name, _ in public(importlib.import_module(m))]


@pytest.mark.parametrize("full_name", names())
def test_name_is_in_the_reference(full_name: str) -> None:
    module = full_name.rpartition(".")[0]
    assert full_name in documented(MODULES[module]), f"add it to docs/api/{MODULES[module]}.md"


def test_a_missing_name_would_be_noticed() -> None:
    assert "lion.reference.update_32bit" in documented("reference")
    assert "lion.reference.no_such_function" not in documented("reference")


def undocumented(value: Any, name: str) -> list[str]:
    """Return what the docstring of a function, a class or its methods lacks."""
    functions = {name: value} if inspect.isfunction(value) else {}
    if inspect.isclass(value):
        functions = {
            f"{name}.{key}": member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            for key, member in vars(value).items()
            if not key.startswith("_") and callable(getattr(member, "__func__", member))
        }
        if "__init__" in vars(value) and not inspect.isabstract(value):
            functions[name] = value
    missing = []
    for full_name, function in functions.items():
        doc = inspect.getdoc(function) or ""
        if not doc:
            missing.append(f"{full_name} has no docstring")
        if other := re.search(r"[Aa]rguments as :(?:func|class):`(\w+)`", doc):
            doc = inspect.getdoc(getattr(inspect.getmodule(function), other[1])) or ""
        parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        missing += [f"{full_name}: {p}" for p in parameters if not re.search(rf"^\s+\*{{0,2}}{p}: ", doc, re.MULTILINE)]
    return missing


@pytest.mark.parametrize("module_name", MODULES)
def test_docstrings_name_every_argument(module_name: str) -> None:
    module = importlib.import_module(module_name)
    missing = [gap for name, value in public(module) for gap in undocumented(value, f"{module_name}.{name}")]
    assert not missing


def test_a_missing_argument_would_be_noticed() -> None:
    def function(documented: int, forgotten: int) -> None:
        """Do something.

        Args:
            documented: A number.
        """

    assert undocumented(function, "function") == ["function: forgotten"]


CLASSES = [value for _, value in public(lion) if inspect.isclass(value) and issubclass(value, Optimizer)]


@pytest.mark.parametrize("cls", CLASSES)
def test_the_example_of_a_class_runs(cls: type[Optimizer]) -> None:
    source = re.search(r"Example::\n\n((?:    .*\n|\n)+)", inspect.getdoc(cls) or "")
    assert source and f"lion.{cls.__name__}(" in source[1]
    exec(textwrap.dedent(source[1]), {"torch": torch, "lion": lion})


@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_class_fixes_is_named(cls: type[Optimizer]) -> None:
    """A class that has not all of Lion's arguments says which are missing, and describes none again."""
    doc = " ".join((inspect.getdoc(cls) or "").split())
    missing = [
        name for name in inspect.signature(lion.Lion).parameters if name not in inspect.signature(cls).parameters
    ]
    if missing:
        assert f"Arguments as :class:`Lion`, without {' and '.join(f'``{name}``' for name in missing)}." in doc
        assert "Args:" not in doc


def test_values_of_data_are_right() -> None:
    for page in {*MODULES.values()}:
        text = (API / f"{page}.md").read_text()
        for name, kind, value in re.findall(r"\.\. py:data:: (\w+)\n +:type: (\w+)\n +:value: (\S+)\n", text):
            found = getattr(reference, name)
            assert (type(found).__name__, repr(found)) == (kind, value)
        assert "autodata" not in text
    assert "py:data:: BLOCK_SIZE" in (API / "reference.md").read_text()
