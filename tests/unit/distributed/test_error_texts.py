# SPDX-License-Identifier: Apache-2.0
"""Every error of what runs on several ranks, of the plugin, the launcher and `locmoe plan` stands in docs/troubleshooting.md, in the words of the code."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import hf_locmoe
from hf_locmoe.distributed import failure


SRC = Path(hf_locmoe.__file__).parent
PAGE = Path(__file__).parents[3] / "docs" / "troubleshooting.md"
FILES = [*(file for folder in ("distributed", "training", "plan") for file in sorted((SRC / folder).glob("*.py")))]
FILES += [SRC / "launch.py"]
ERRORS = {"ValueError", "RuntimeError", "CheckpointError", "CollectiveError"}


def literal_parts(node):
    """The fixed words of a string: an f-string's values are cut out."""
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    return []


def plain(text):
    """Without the marks that set code apart."""
    return text.replace("`", "")


def messages():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", None) not in ERRORS or not node.args:
                continue
            # up to the way out, which the page says in its own words
            problem = "|".join(literal_parts(node.args[0])).split(": ")[0]
            longest = max((phrase.strip(" ()`,.;") for phrase in problem.split("|")), key=len)
            if len(longest) >= 12:
                yield pytest.param(longest, id=f"{file.stem}-{node.lineno}")


@pytest.mark.parametrize("phrase", list(messages()))
def test_an_error_is_explained(phrase):
    assert plain(phrase) in plain(PAGE.read_text()), f"docs/troubleshooting.md does not explain: {phrase}"


@pytest.mark.parametrize(
    "phrase",
    [
        "lost or stalled: ",
        "are among them: a lost node or a cut link.",
        "had not reached it, the last call there being number ",
        "this rank came too late: ",
        "all ranks had reached it and none is lost, so the connection between them is at fault",
        "The store does not answer either (",
    ],
)
def test_a_lost_rank_is_explained_in_the_words_of_the_code(phrase):
    assert phrase in PAGE.read_text()
    assert phrase.strip() in re.sub(r'"\s+f?"', "", inspect.getsource(failure))
