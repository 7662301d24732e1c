# SPDX-License-Identifier: Apache-2.0
"""
Every module under `src` imports, by itself and without the optional extras; and every name of the libraries below it
that the package leans on exists in the installed versions.

`tests/upstream_symbols.txt` lists those names: all of transformers, accelerate, peft and huggingface_hub, and the private
ones of torch. The list is made from the source (`make upstream-symbols`), so that a new dependency on a library's inside
is seen in review, and a name that a new version dropped is reported as such. A `?` marks a name that the source looks for
inside a `try`, and does without.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


_ROOT = Path(__file__).resolve().parents[2]
_SRC = _ROOT / "src"
_SYMBOLS_FILE = _ROOT / "tests" / "upstream_symbols.txt"
_UPSTREAM = ("transformers", "accelerate", "peft", "huggingface_hub", "torch")
_REFRESH = "run `make upstream-symbols` (or `python tests/unit/test_imports.py --write`) and look at the difference"
_EXTRAS = ("datasets", "evaluate", "matplotlib", "peft", "scipy", "tensorboard", "trl")


def _modules() -> list[str]:
    paths = [path.relative_to(_SRC).with_suffix("") for path in _SRC.rglob("*.py") if path.name != "__main__.py"]
    if importlib.util.find_spec("triton") is None:  # kernels are imported where there is Triton, and nowhere else
        paths = [path for path in paths if not path.name.endswith("kernels")]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


class _SymbolCollector(ast.NodeVisitor):
    """Collects dotted names of upstream libraries: what is imported, and the attributes that are then used of it."""

    def __init__(self) -> None:
        self.symbols: dict[str, bool] = {}  # name -> whether the source can do without it
        self._aliases: dict[str, str] = {}
        self._optional = 0

    def visit_Try(self, node: ast.Try) -> None:
        caught = {
            name.id
            for handler in node.handlers
            if handler.type
            for name in ast.walk(handler.type)
            if isinstance(name, ast.Name)
        }
        guarded = bool(caught & {"ImportError", "ModuleNotFoundError", "AttributeError"})
        self._optional += guarded
        for statement in node.body:
            self.visit(statement)
        self._optional -= guarded
        for statement in [*node.handlers, *node.orelse, *node.finalbody]:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in _UPSTREAM:
                bound = alias.asname or alias.name.split(".")[0]
                self._aliases[bound] = alias.name if alias.asname else bound
                self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module and node.module.split(".")[0] in _UPSTREAM:
            for alias in node.names:
                self._aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._add(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        attributes: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            attributes.append(base.attr)
            base = base.value
        if isinstance(base, ast.Name) and base.id in self._aliases and isinstance(node.ctx, ast.Load):
            self._add(".".join([self._aliases[base.id], *reversed(attributes)]))
        elif not isinstance(base, ast.Name):
            self.visit(base)

    def _add(self, symbol: str) -> None:
        root, *rest = symbol.split(".")
        private = any(part.startswith("_") and not part.startswith("__") for part in rest)
        if rest and (root != "torch" or private):
            self.symbols[symbol] = self.symbols.get(symbol, True) and self._optional > 0


def _used_symbols() -> list[str]:
    """The upstream names that `src` uses, sorted, one per line of the list; optional ones end in `?`."""
    symbols: dict[str, bool] = {}
    for path in sorted(_SRC.rglob("*.py")):
        collector = _SymbolCollector()
        collector.visit(ast.parse(path.read_text(), filename=str(path)))
        for symbol, optional in collector.symbols.items():
            symbols[symbol] = symbols.get(symbol, True) and optional
    return [symbol + "?" * optional for symbol, optional in sorted(symbols.items())]


def _listed_symbols() -> list[str]:
    return _SYMBOLS_FILE.read_text().split()


def _resolve(symbol: str) -> object:
    parts = symbol.split(".")
    found: object = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:  # a submodule that nothing has imported yet
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError as error:
            raise AttributeError(f"{'.'.join(parts[: depth - 1])} has no {part}") from error
    return found


def _missing(symbols: list[str]) -> Iterator[str]:
    for symbol in symbols:
        if not symbol.endswith("?"):
            try:
                _resolve(symbol)
            except AttributeError:
                yield symbol


def test_the_list_of_upstream_symbols_is_up_to_date():
    used, listed = set(_used_symbols()), set(_listed_symbols())
    assert used == listed, f"new: {sorted(used - listed)}; gone: {sorted(listed - used)}: {_REFRESH}"


def test_every_upstream_symbol_exists():
    assert list(_missing(_listed_symbols())) == []


def test_a_symbol_that_is_gone_is_noticed():
    gone = ["transformers.Trainer.no_such_method", "torch.distributed._no_such_module.symbol"]
    assert list(_missing(["transformers.Trainer.train", *gone])) == gone


_IMPORT_EACH = """
import os, sys
sys.modules.update(dict.fromkeys({extras!r}))  # importing one of them fails
import torch, transformers, transformers.trainer
for module in {modules!r}:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            __import__(module)
        except BaseException:
            import traceback
            print("==", module); traceback.print_exc(file=sys.stdout); sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_every_module_imports_first_and_without_the_extras():
    """First: in a process that has imported no other module of ours, so that a circle of imports shows in any order."""
    program = _IMPORT_EACH.format(extras=_EXTRAS, modules=_modules())
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=_SRC, check=False)
    assert (completed.returncode, completed.stdout) == (0, ""), completed.stdout + completed.stderr


@pytest.mark.parametrize("module", _modules())
def test_every_module_says_what_it_is(module):
    assert importlib.import_module(module).__doc__, f"{module} has no docstring"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {sys.argv[0]} --write")
    _SYMBOLS_FILE.write_text("".join(f"{symbol}\n" for symbol in _used_symbols()))
    print(f"{_SYMBOLS_FILE.relative_to(_ROOT)}: {len(_listed_symbols())} symbols")
