# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys

import pytest

import corpus

from .conftest import RECIPES


SMALL = 60_000


@pytest.fixture(scope="module")
def built() -> corpus.Corpus:
    return corpus.build_corpus(SMALL, show_progress=False)


def test_at_least_four_domains_with_both_parts(built):
    assert len(built.domains) >= 4
    assert {"reference", "documentation", "network_code", "numeric_code", "characters"} <= set(built.domains)
    for domain in built.domains:
        sizes = [len(document["text"]) for document in built.train if document["domain"] == domain]
        assert SMALL / 3 < sum(sizes) <= SMALL
    assert {document["domain"] for document in built.validation} >= {"reference", "documentation", "network_code"}
    assert all(set(document) == {"text", "domain", "source"} for document in built.train + built.validation)


def test_the_same_corpus_twice(built):
    again = corpus.build_corpus(SMALL, show_progress=False)
    assert again == built
    other = corpus.build_corpus(SMALL, seed=1, show_progress=False)
    assert other != built


def test_domains_are_unlike(built):
    """A line of one domain tells its domain: hardly any long line occurs in two."""
    lines = {name: set() for name in built.domains}
    for document in built.train:
        lines[document["domain"]].update(corpus.long_lines(document["text"]))
    for name in built.domains:
        others = set().union(*(lines[other] for other in built.domains if other != name))
        assert len(lines[name] & others) < 0.05 * len(lines[name])


def test_validation_is_not_in_training(built):
    train_lines = {line for document in built.train for line in corpus.long_lines(document["text"])}
    train_texts = {" ".join(document["text"].split()) for document in built.train}
    for document in built.validation:
        lines = corpus.long_lines(document["text"])
        assert " ".join(document["text"].split()) not in train_texts
        assert sum(line in train_lines for line in lines) <= corpus.MAX_SHARED_LINES * len(lines)


def test_copies_and_near_copies_do_not_leak():
    prose = "\n".join(f"sentence number {number} of a text that is repeated elsewhere" for number in range(40))
    near_copy = prose.replace("number 7 ", "number seven ")

    def sources():
        yield "a", prose
        yield "b", prose.replace("\n", "\n  ")  # the same but for white space
        yield "c", near_copy
        for index in range(6):
            yield f"d{index}", "\n".join(f"text {index} on its own, with line {line} of it" for line in range(40))

    built = corpus.build_corpus(validation_share=0.5, domains={"only": sources}, show_progress=False)
    texts = [document["source"] for document in built.train + built.validation]
    assert ("a" in texts) + ("b" in texts) == 1  # the copy is kept once
    assert "c" in texts
    assert not {"a", "b", "c"} & {document["source"] for document in built.validation}
    assert built.validation  # the others may be held out


def test_pieces_are_the_text():
    paragraphs = [f"paragraph {number} " * 20 for number in range(50)]
    pieces = corpus.split_into_pieces("\n\n".join(paragraphs), 1000)
    assert "\n\n".join(pieces) == "\n\n".join(paragraphs)
    assert max(map(len, pieces)) < 2000
    lines = "\n".join(f"row {number}" for number in range(1000))
    pieces = corpus.split_into_pieces(lines, 1000)
    assert "\n".join(pieces) == lines
    assert max(map(len, pieces)) < 2000


def test_modules_are_read_and_not_executed():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import corpus;"
        "names = [name for name, _ in corpus.module_sources('wsgiref')];"
        "assert 'wsgiref.simple_server' in names, names;"
        "assert 'wsgiref' not in sys.modules;"
        "assert len(list(corpus.module_sources('this'))) == 1 and 'this' not in sys.modules;"
        "assert list(corpus.module_sources('no_such_module.at_all')) == [];"
        "assert list(corpus.module_sources('math')) == []"
    )
    subprocess.run([sys.executable, "-c", program, str(RECIPES)], check=True, timeout=60)


def test_an_installation_without_sources_is_named(monkeypatch):
    few = {name: corpus.DOMAINS[name] for name in ("reference", "characters")}
    monkeypatch.setattr(corpus, "DOMAINS", few)
    with pytest.raises(ValueError, match=r"2 of the domains only \(reference, characters\)"):
        corpus.build_corpus(SMALL, show_progress=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_chars_per_domain": 10}, r"`max_chars_per_domain` \(10\)"),
        ({"validation_share": 0}, r"`validation_share` \(0\)"),
        ({"validation_share": 1.5}, r"`validation_share` \(1.5\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        corpus.build_corpus(**arguments)


def test_files(built, tmp_path):
    paths = corpus.write_corpus(built, tmp_path / "made" / "here")
    for path, documents in zip(paths, (built.train, built.validation), strict=True):
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == documents
    sizes = built.sizes()
    assert f"{sum(len(document['text']) for document in built.train):,}" in sizes


def test_unwritable_output(built, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`output` \(.*file.*\) cannot be written"):
        corpus.write_corpus(built, tmp_path / "file" / "corpus")


def test_command_line(tmp_path, capsys):
    corpus.main(["--output", str(tmp_path), "--max_chars_per_domain", "20000"])
    assert "network_code" in capsys.readouterr().out
    assert (tmp_path / "train.jsonl").stat().st_size > 50_000
