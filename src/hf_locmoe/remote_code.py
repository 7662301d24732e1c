# SPDX-License-Identifier: Apache-2.0
"""
The modelling code as flat files beside a checkpoint, so that it loads where hf_locmoe is not installed.

transformers loads code from a checkpoint through `auto_map` and `trust_remote_code=True`. It knows one level of files:
it takes the modules a file needs from the text `from .x import`, and copies those. So our modules are written beside the
weights under flat names (`moe/gate.py` becomes `moe_gate.py`) with their imports rewritten, and nothing else changed but
imports in a `try` with an `except ImportError`: those a checkpoint does without.

This module is one of them: run from a checkpoint, the same code finds the flat files beside itself and copies them on.
"""

import ast
import functools
import os
import re
import textwrap
from pathlib import Path


AUTO_MAP = {
    "AutoConfig": "configuration_locmoe.LocMoeConfig",
    "AutoModel": "modeling_locmoe.LocMoeModel",
    "AutoModelForCausalLM": "modeling_locmoe.LocMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_locmoe.LocMoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_locmoe.LocMoeForTokenClassification",
}
"""The `auto_map` of `config.json`: the class of each of transformers' Auto classes, by flat file."""

# Searched by transformers, not executed: a configuration loaded alone brings the model's files along by it, so that it
# can be saved again with a model's `auto_map` that leads somewhere.
_NEEDED_FILES = """
from .modeling_locmoe import LocMoeModel
"""


def write_remote_code(save_directory: str | os.PathLike) -> list[str]:
    """
    Writes `configuration_locmoe.py`, `modeling_locmoe.py` and every module they import as flat files.

    Args:
        save_directory (`str` or `os.PathLike`): The checkpoint folder; made if it is not there. A file that is already
            the same is left alone.

    Returns:
        `list[str]`: The names of the files, sorted. The same sources give the same bytes.

    Raises:
        OSError: The folder cannot be written to.
    """
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    sources = flat_sources(Path(__file__).parent)
    for name, text in sources.items():
        file, data = directory / name, text.encode("utf-8")
        if not (file.is_file() and file.read_bytes() == data):
            file.write_bytes(data)
    return list(sources)


@functools.cache
def flat_sources(package_directory: Path, package_name: str = "hf_locmoe") -> dict[str, str]:
    """
    The flat form of `modeling_locmoe.py` and of the modules it imports, followed to the last.

    Args:
        package_directory (`Path`): Where `modeling_locmoe.py` is, in a package or flattened already.
        package_name (`str`, *optional*, defaults to `"hf_locmoe"`): The name absolute imports of the package begin with.

    Returns:
        `dict[str, str]`: File name to text, sorted by name.

    Raises:
        ValueError: An import that has no flat form, with its file and line.
    """
    texts: dict[str, str] = {}
    modules: dict[str, str] = {}
    pending = ["modeling_locmoe"]
    while pending:
        module = pending.pop()
        name = _flat_name(module) + ".py"
        if modules.setdefault(name, module) != module:
            raise ValueError(f"Modules `{module}` and `{modules[name]}` would both become `{name}`: rename one.")
        if name not in texts:
            texts[name], imported = _flatten(module, package_directory, package_name)
            pending.extend(imported)
    return dict(sorted(texts.items()))


def _flatten(module: str, package_directory: Path, package_name: str) -> tuple[str, list[str]]:
    """The text of `module` with flat imports, and the modules of the package that it imports."""
    located = _locate(module, package_directory)
    if located is None:
        raise FileNotFoundError(
            f"The source of `{module}` is not in {package_directory}: install the package unpacked."
        )
    file, package = located
    text = file.read_text(encoding="utf-8")
    text = _without_optional_imports(text, str(file), package_name)
    lines = text.splitlines(keepends=True)
    imported = []
    for node in ast.walk(ast.parse(text, filename=str(file))):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == package_name for alias in node.names):
            raise _no_flat_form(file, node)
        if not isinstance(node, ast.ImportFrom):
            continue
        target = _target(node, package, package_name)
        if target is None:
            continue
        submodules = [alias.name for alias in node.names if _locate(f"{target}.{alias.name}", package_directory)]
        if not target or submodules:  # `from . import x`, `from .moe import gate`: modules, which transformers misses
            raise _no_flat_form(file, node)
        line = lines[node.lineno - 1]
        head = re.compile(r"from\s+[\w.]+\s+import")
        lines[node.lineno - 1] = line[: node.col_offset] + head.sub(
            f"from .{_flat_name(target)} import", line[node.col_offset :], count=1
        )
        imported.append(target)
    return "".join(lines), imported


def _without_optional_imports(text: str, file_name: str, package_name: str) -> str:
    """
    `try: from .x import y` with an `except ImportError:` marks what a checkpoint does without: its flat form is the
    except's body.
    """
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text, filename=file_name).body):
        if not isinstance(node, ast.Try) or not any(
            isinstance(inner, ast.ImportFrom) and (inner.level or (inner.module or "").split(".")[0] == package_name)
            for inner in node.body
        ):
            continue
        fallback = node.handlers[0].body
        kept = "".join(lines[fallback[0].lineno - 1 : fallback[-1].end_lineno])
        lines[node.lineno - 1 : node.end_lineno] = textwrap.dedent(kept).splitlines(keepends=True)
    return "".join(lines)


def _target(node: ast.ImportFrom, package: list[str], package_name: str) -> str | None:
    """The module that is imported from, relative to the package's root; None if it is not ours."""
    names = node.module.split(".") if node.module else []
    if node.level:
        return ".".join(package[: len(package) - node.level + 1] + names)
    return ".".join(names[1:]) if names[0] == package_name else None


def _locate(module: str, package_directory: Path) -> tuple[Path, list[str]] | None:
    """The file of a module and the package its relative imports count from; None if there is no such module."""
    names = module.split(".")
    path = package_directory.joinpath(*names)
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py"), names[:-1]
    if (path / "__init__.py").is_file():
        return path / "__init__.py", names
    return None


def _flat_name(module: str) -> str:
    return module.replace(".", "_")


def _no_flat_form(file: Path, node: ast.stmt) -> ValueError:
    return ValueError(
        f"`{ast.unparse(node)}` ({file}, line {node.lineno}) imports a module, which a checkpoint's flat files cannot:"
        " import the names from the module instead, `from .moe.gate import LocMoeGate`."
    )
