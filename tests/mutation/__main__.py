"""Mutation testing: change one operator or one number at a time; a test must fail for each.

``python -m tests.mutation MODULE...`` works on a copy of the project. The mutants are cosmic-ray's; the tests run in
forked children, which saves importing torch and Numba for every mutant.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numba
import pytest
import torch  # noqa: F401  not needed here, but slow to import
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

from tests.differential.cpu_paths import ENVIRONMENTS
from tests.mutation.plan import MODULES, OPERATORS, Run
from tests.mutation.survivors import SURVIVORS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("cpu_kernels", "cuda_kernels", "lion", "reference", "tests")
MEMORY_LIMIT = 16 * 2**30
# In seconds, for a deadlock; endless loops end at a multiple of the processor time that is usual.
PATIENCE = 600


class Mutant(NamedTuple):
    """A changed source, and where it differs."""

    source: str
    line: int
    function: str
    old: str
    new: str


def mutants(source: str) -> Iterator[Mutant]:
    """Yield the mutants of a module, one for each operator and place that says what is computed."""
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    kept = [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in _remarks(tree)]
    nodes = list(ast_nodes(get_ast(source)))
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        places = [place for node in nodes for place, _ in operator.mutation_positions(node)]
        for occurrence, place in enumerate(places):
            if any(begin <= place < end for begin, end in kept):
                continue
            mutated = mutate_code(source, operator, occurrence)
            changed = list(difflib.ndiff(source.splitlines(), mutated.splitlines()))
            old, new = (" ".join(line[2:].strip() for line in changed if line[0] == sign) for sign in "-+")
            function = [node.name for node in functions if node.lineno <= place[0] <= node.end_lineno]
            yield Mutant(mutated, place[0], "".join(function), old, new)


def _remarks(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield annotations, and zip's ``strict``: it says what holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "strict":
            yield node.value
        for name in ("annotation", "returns"):
            if isinstance(expression := getattr(node, name, None), ast.expr):
                yield expression


def passes(run: Run, processor_seconds: int) -> bool:
    """Return whether the tests of a run pass in time, in a child of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *run.arguments]
        if run.lookups:  # it is too late to tell this process
            environment = {**os.environ, **ENVIRONMENTS[run.lookups], "NUMBA_DISABLE_JIT": str(int(run.as_python))}
            os.execve(sys.executable, [sys.executable, "-m", "pytest", *arguments], environment)
        numba.config.DISABLE_JIT = run.as_python
        os._exit(pytest.main(arguments))
    end = time.monotonic() + PATIENCE
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.02)
    return status[1] == 0


def processor_time(run: Run) -> int:
    """Return the seconds that a run may take: several times what it takes without a mutation, where it must pass."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    if not passes(run, PATIENCE):
        raise RuntimeError(f"These tests fail without a mutation: {run}")
    return 10 + int(3 * (used() - before))


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """Make a copy of the project the current folder and the first place of imports."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        ignored = shutil.ignore_patterns("__pycache__")
        for name in COPIED:
            # The links in lion/ have to lead to the copies.
            shutil.copytree(ROOT / name, Path(folder, name), symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        sys.path = [folder, *(path for path in sys.path if Path(path).resolve() != ROOT)]
        for name in [name for name in sys.modules if name.split(".")[0] in COPIED]:
            del sys.modules[name]
        os.environ.update(
            PYTHONPATH=os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]),
            NUMBA_CACHE_DIR=str(Path(folder, "numba")),
            HYPOTHESIS_PROFILE="mutation",
        )
        os.chdir(folder)
        yield Path(folder)


def warm_up(folder: Path) -> None:
    """Do once what every child would do first."""
    (folder / "empty").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder / "empty")])
    numba.njit("void()")(lambda: None)
    gc.freeze()


def survivors(folder: Path, module: str) -> int:
    """Print the mutants of a module that no test kills, and return how many; those with a reason are not run."""
    path, runs = folder / module, MODULES[module]
    source, begin = path.read_text(), time.monotonic()
    seconds = [processor_time(run) for run in runs]
    reasons = {(old, new) for old, _, *became in SURVIVORS.get(module, ()) for new in became}
    count, lived, listed = 0, 0, 0
    for mutant in mutants(source):
        count += 1
        if (mutant.old, mutant.new) in reasons:
            listed += 1
            continue
        path.write_text(mutant.source)
        os.utime(path, (count, count))  # Python's cache of bytecode goes by time and size
        mine = [i for i, run in enumerate(runs) if not run.within or mutant.function in run.within]
        if all(passes(runs[i], seconds[i]) for i in mine):
            lived += 1
            print(f"{module}:{mutant.line}\n  - {mutant.old}\n  + {mutant.new}", flush=True)
        if not module.startswith("lion/"):  # the kernels were compiled from sources that never come back
            shutil.rmtree(os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)
    path.write_text(source)
    os.utime(path, (0, 0))
    minutes = (time.monotonic() - begin) / 60
    print(
        f"{module}: {count} mutants, {count - listed - lived} killed, {listed} listed, {lived} survived, "
        f"{minutes:.1f} min",
        flush=True,
    )
    return lived


def main() -> int:
    """Change the modules named, all by default; print what no test notices and exit with 1 if there is anything."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=main.__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="for instance reference/lion.py")
    chosen = parser.parse_args().modules or list(MODULES)
    with copied() as folder:
        warm_up(folder)
        return 1 if sum([survivors(folder, module) for module in chosen]) else 0


if __name__ == "__main__":
    sys.exit(main())
