# SPDX-License-Identifier: Apache-2.0
"""A small text corpus of plainly different domains, made of what every Python installation carries.

Nothing is downloaded: the texts are the language reference behind `help()`, the documentation and the sources of the
standard library, and the names in the Unicode character database. Modules are found by import machinery and read,
never executed. The same interpreter gives the same corpus, byte for byte.

Usage:

    python recipes/corpus.py --output runs/corpus

writes `train.jsonl` and `validation.jsonl` into that folder, one document a line with the fields `text`, `domain` and
`source`.
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import pkgutil
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm


Source = tuple[str, str]  # where it is from, its text

NETWORK_MODULES = (
    "asyncio concurrent ftplib http imaplib nntplib poplib selectors smtplib socket socketserver ssl telnetlib urllib wsgiref xmlrpc"
).split()
NUMERIC_MODULES = (
    "_pydatetime _pydecimal bisect calendar colorsys datetime fractions heapq numbers random statistics"
).split()
GUI_MODULES = ("idlelib tkinter turtle turtledemo").split()
TEST_MODULES = (
    "test.datetimetester test.pickletester test.test_argparse test.test_collections test.test_descr test.test_email "
    "test.test_typing test.test_unittest unittest.test"
).split()

PIECE_CHARS = 4000  # a document is cut into pieces of about this length at blank lines
MIN_PIECE_CHARS = 200  # a shorter piece says too little about its domain
LONG_LINE_CHARS = 24  # shorter lines repeat by nature (`return self`, `else:`)
MAX_SHARED_LINES = 0.25  # share of a validation piece's long lines that may occur in the training part


def module_sources(name: str) -> Iterator[Source]:
    """Sources of a module and, for a package, of everything under it; nothing when this installation lacks it.

    Args:
        name (`str`): A dotted module name. Neither it nor its parents are executed.

    Yields:
        `tuple[str, str]`: Dotted name and source text, in alphabetical order.
    """
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    for part in rest:
        spec = _children(spec).get(part)
    if spec is not None:
        yield from _sources_below(spec)


def _children(spec) -> dict:
    """Specs of a package's modules by their last name; importing the package, as `find_spec` would, is not needed."""
    if spec is None or not spec.submodule_search_locations:
        return {}
    modules = pkgutil.iter_modules(list(spec.submodule_search_locations))
    return {module.name: module.module_finder.find_spec(f"{spec.name}.{module.name}", None) for module in modules}


def _sources_below(spec) -> Iterator[Source]:
    get_source = getattr(spec.loader, "get_source", None)  # compiled modules have none, frozen ones answer None
    text = None
    if get_source is not None:
        try:
            text = get_source(spec.name)
        except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
            pass  # sourceless installation, or a module that is broken on purpose for the tests
    if text and text.strip():
        yield spec.name, text
    for _, child in sorted(_children(spec).items()):
        if child is not None:
            yield from _sources_below(child)


def reference() -> Iterator[Source]:
    """Chapters of the language reference, the prose that `help("if")` prints."""
    from pydoc_data.topics import topics

    for title in sorted(topics):
        yield f"pydoc_data.topics:{title}", topics[title]


def documentation() -> Iterator[Source]:
    """Docstrings of the modules that no other domain uses."""
    used = {name.split(".")[0] for name in (*NETWORK_MODULES, *NUMERIC_MODULES, *GUI_MODULES, *TEST_MODULES)}
    skipped = {"__phello__", "antigravity", "lib2to3", "pydoc_data", "test", "this"}
    for name in sorted(sys.stdlib_module_names - used - skipped):
        for module, source in module_sources(name):
            docstrings = list(_docstrings(source))
            if docstrings:
                yield module, "\n\n".join(docstrings)


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that this Python has come to warn about
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 80:  # one-liners are labels, not prose
                yield inspect.cleandoc(docstring)


def characters() -> Iterator[Source]:
    """A table of all named Unicode characters: code point, category, name."""
    block = 256
    for start in range(0, sys.maxunicode + 1, block):
        rows = []
        for code in range(start, start + block):
            name = unicodedata.name(chr(code), "")
            if name and not re.search(r"(IDEOGRAPH|TANGUT|HANGUL SYLLABLE|NUSHU|KHITAN)", name):  # numbered, not named
                rows.append(f"U+{code:04X} {unicodedata.category(chr(code))} {name}")
        if rows:
            yield f"unicodedata:U+{start:04X}", "\n".join(rows)


def _sources_of(modules: list[str]) -> Callable[[], Iterator[Source]]:
    def sources() -> Iterator[Source]:
        for name in modules:
            yield from module_sources(name)

    return sources


# name -> sources. The first five exist in every installation; Linux distributions package the others apart.
DOMAINS: dict[str, Callable[[], Iterator[Source]]] = {
    "reference": reference,
    "documentation": documentation,
    "network_code": _sources_of(NETWORK_MODULES),
    "numeric_code": _sources_of(NUMERIC_MODULES),
    "characters": characters,
    "gui_code": _sources_of(GUI_MODULES),
    "test_code": _sources_of(TEST_MODULES),
}


@dataclass(frozen=True)
class Corpus:
    """Documents as dicts with `text`, `domain` and `source`, in an order that mixes the domains."""

    train: list[dict[str, str]]
    validation: list[dict[str, str]]

    @property
    def domains(self) -> list[str]:
        """Names of the domains present, in the order of `DOMAINS`."""
        present = {document["domain"] for document in self.train}
        return [name for name in DOMAINS if name in present]

    def sizes(self) -> str:
        """One line per domain: documents and characters of both parts."""
        lines = [f"{'domain':16}{'train docs':>12}{'chars':>12}{'valid. docs':>13}{'chars':>10}"]
        for name in [*self.domains, "total"]:
            row = f"{name:16}"
            for part, widths in ((self.train, (12, 12)), (self.validation, (13, 10))):
                lengths = [len(d["text"]) for d in part if name in (d["domain"], "total")]
                row += f"{len(lengths):>{widths[0]},}{sum(lengths):>{widths[1]},}"
            lines.append(row)
        return "\n".join(lines)


def split_into_pieces(text: str, piece_chars: int = PIECE_CHARS) -> list[str]:
    """Cuts a text at blank lines (at line ends where there are none) into pieces of about `piece_chars` characters.

    The pieces follow one another without overlap.
    """
    blocks = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))
    separator = "\n\n"
    if max(map(len, blocks)) > 2 * piece_chars:
        blocks, separator = text.splitlines(), "\n"
    pieces: list[str] = []
    current: list[str] = []
    length = 0
    for block in blocks:
        if current and length + len(block) > piece_chars:
            pieces.append(separator.join(current))
            current, length = [], 0
        current.append(block)
        length += len(block) + len(separator)
    pieces.append(separator.join(current))
    return [piece.strip("\n") for piece in pieces]


def long_lines(text: str) -> list[str]:
    """The lines of a text that are long enough to be recognised again."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE_CHARS]


def build_corpus(
    max_chars_per_domain: int = 800_000,
    validation_share: float = 0.06,
    seed: int = 0,
    domains: dict[str, Callable[[], Iterator[Source]]] | None = None,
    show_progress: bool = True,
) -> Corpus:
    """Builds the corpus.

    A piece of a document belongs to the training or to the validation part as a whole. Equal pieces are kept once, and
    a piece chosen for validation goes back to training when more than a quarter of its long lines occur there too
    (licence headers, generated tables), so validation measures text that training has not seen.

    Args:
        max_chars_per_domain (`int`): Characters after which a domain is full. Pieces are drawn evenly from all its
            sources.
        validation_share (`float`): Share of the pieces of each domain tried for validation, between 0 and 1.
        seed (`int`): Order of the documents and choice of the validation pieces.
        domains (`dict`, *optional*): Name to a function that yields `(source, text)`; `DOMAINS` by default. A domain
            without text on this installation is left out.
        show_progress (`bool`): Whether to show a progress bar.

    Returns:
        `Corpus`: The two parts.

    Raises:
        ValueError: If an argument is out of range, or fewer than four of the default domains have text.
    """
    if max_chars_per_domain < PIECE_CHARS:
        raise ValueError(
            f"`max_chars_per_domain` ({max_chars_per_domain}) must hold one piece of {PIECE_CHARS} characters: set it "
            f"to {PIECE_CHARS} or more."
        )
    if not 0 < validation_share < 1:
        raise ValueError(f"`validation_share` ({validation_share}) must lie between 0 and 1, for example 0.06.")
    random_order = random.Random(seed)
    seen: set[str] = set()
    train: list[dict[str, str]] = []
    validation: list[dict[str, str]] = []
    for name, sources in tqdm((domains or DOMAINS).items(), desc="corpus", unit="domain", disable=not show_progress):
        documents = []
        for source, text in sources():
            for piece in split_into_pieces(text):
                key = hashlib.sha256(" ".join(piece.split()).encode()).hexdigest()
                if len(piece) >= MIN_PIECE_CHARS and key not in seen:
                    seen.add(key)
                    documents.append({"text": piece, "domain": name, "source": source})
        random_order.shuffle(documents)
        documents = _up_to(documents, max_chars_per_domain)
        held_out = max(1, round(validation_share * len(documents))) if len(documents) > 1 else 0
        validation += documents[:held_out]
        train += documents[held_out:]
    validation, leaking = _without_leaks(train, validation)
    train += leaking
    random_order.shuffle(train)
    random_order.shuffle(validation)
    corpus = Corpus(train, validation)
    if domains is None and len(corpus.domains) < 4:
        raise ValueError(
            f"This Python has the sources of {len(corpus.domains)} of the domains only ({', '.join(corpus.domains)}): "
            "four are needed. Use an installation with the standard library's sources (`.py` files), or pass your own "
            "text with `--train_file`."
        )
    return corpus


def _up_to(documents: list[dict[str, str]], max_chars: int) -> list[dict[str, str]]:
    total = 0
    for count, document in enumerate(documents):
        total += len(document["text"])
        if total > max_chars:
            return documents[:count]
    return documents


def _without_leaks(train: list[dict[str, str]], validation: list[dict[str, str]]) -> tuple[list, list]:
    """Splits the validation pieces into clean ones and ones whose lines occur in training or in other such pieces."""
    occurrences: Counter[str] = Counter()
    for document in (*train, *validation):
        occurrences.update(set(long_lines(document["text"])))
    clean, leaking = [], []
    for document in validation:
        lines = long_lines(document["text"])
        shared = sum(occurrences[line] > 1 for line in lines)
        (leaking if shared > MAX_SHARED_LINES * len(lines) else clean).append(document)
    return clean, leaking


def write_corpus(corpus: Corpus, output_dir: str | Path) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `validation.jsonl`.

    Args:
        corpus (`Corpus`): What to write.
        output_dir (`str` or `Path`): A folder; made when missing.

    Returns:
        `tuple[Path, Path]`: The two files.

    Raises:
        ValueError: If the folder cannot be written.
    """
    output_dir = Path(output_dir)
    paths = (output_dir / "train.jsonl", output_dir / "validation.jsonl")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for path, documents in zip(paths, (corpus.train, corpus.validation), strict=True):
            with path.open("w", encoding="utf-8", newline="\n") as file:
                for document in documents:
                    file.write(json.dumps(document) + "\n")
    except OSError as error:
        raise ValueError(
            f"`output` ({output_dir}) cannot be written ({error.strerror}): name a folder you may write to."
        ) from error
    return paths


def main(argv: list[str] | None = None) -> None:
    """Command line: builds the corpus, writes it, prints its sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/corpus", help="folder for train.jsonl and validation.jsonl")
    parser.add_argument("--max_chars_per_domain", type=int, default=800_000)
    parser.add_argument("--validation_share", type=float, default=0.06)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    corpus = build_corpus(arguments.max_chars_per_domain, arguments.validation_share, arguments.seed)
    paths = write_corpus(corpus, arguments.output)
    print(corpus.sizes())
    print("written:", *paths)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
