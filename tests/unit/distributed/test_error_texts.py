# SPDX-License-Identifier: Apache-2.0
"""Every error of topology and backend stands in docs/troubleshooting.md, in the words of the code."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from hf_locmoe.distributed import backend, collectives, failure, inner_backend, launch_environment, topology


MODULES = (backend, collectives, failure, inner_backend, launch_environment, topology)
PAGE = Path(__file__).parents[3] / "docs" / "troubleshooting.md"


def literal_parts(node):
    """The fixed words of a string: an f-string's values are cut out."""
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    return []


def messages():
    for module in MODULES:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
                continue
            if node.exc.func.id.startswith("_"):
                continue  # caught again in its module
            # up to the way out, which the page says in its own words
            problem = "|".join(literal_parts(node.exc.args[0])).split(": ")[0]
            longest = max((phrase.strip(" ()`,.") for phrase in problem.split("|")), key=len)
            if len(longest) >= 12:
                yield pytest.param(longest, id=f"{module.__name__.rpartition('.')[2]}-{node.lineno}")


@pytest.mark.parametrize("phrase", list(messages()))
def test_an_error_is_explained(phrase):
    assert phrase in PAGE.read_text(), f"docs/troubleshooting.md does not explain: {phrase}"


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
