# SPDX-License-Identifier: Apache-2.0
"""
Every way to spread a training over ranks takes the trajectory of one process: losses, gradient norms and router losses of
twenty steps, the parameters and the router state after them.

The choices that a run has are the axes below. A few members run with `make test`; `slow` and `many_ranks` run so many that
every pair of choices meets (every three, at expert parallelism over four ranks), on two and four nodes.
"""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch

from tests.distributed.golden_runs import RECORDED, TRUTHS, Member, record_of, train, train_all
from tests.harness import run_ranks
from tests.tolerances import assert_close


AXES = dict(
    layout=("sharded", "replicated", "spread"),
    plan=("flat", "two_level", "auto", "none"),
    slices=(1, 2),
    fan_out=("rank", "node"),
    accumulation=(1, 4),
    checkpointing=(False, True),
    tp_size=(1, 2),
)


def covering(strength: int, axes: dict[str, tuple]) -> list[dict]:
    """Few combinations of the axes' values, such that any `strength` of the axes meet in all of theirs. Greedy."""
    names = list(axes)
    every = [dict(zip(names, values)) for values in itertools.product(*axes.values())]

    def parts(choice: dict) -> set:
        return set(itertools.combinations(choice.items(), strength))

    missing = set().union(*map(parts, every))
    chosen = []
    while missing:
        best = max(every, key=lambda choice: len(parts(choice) & missing))
        missing -= parts(best)
        chosen.append(best)
    return chosen


@functools.cache
def truth(member: Member) -> dict:
    return train(member)


def assert_golden(member: Member, result: dict, expected: dict | None = None) -> None:
    """
    Args:
        member (`Member`): How the run was done.
        result (`dict`): What [`golden_runs.train`] gave.
        expected (`dict`, *optional*): What it gives for the truth; on this process's CPU if not given.
    """
    expected = expected or truth(member.truth)
    for key in ("losses", "norms", "router_losses", "parameters"):
        try:
            assert_close(result[key], expected[key], torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{member}: {key}: {error}") from error
    of_router = expected["router_gradient"]
    ratio = (result["router_gradient"] @ of_router / (of_router @ of_router)).item()
    assert ratio == pytest.approx(1.0, abs=5e-4), member


def run(members: list[Member]) -> None:
    for member in members:
        truth(member.truth)  # not beside the ranks: there are few cores
    ranks = members[0].ranks
    results = run_ranks(train_all, ranks, members, timeout_s=60 + 30 * ranks * len(members))[0]
    for member, result in zip(members, results, strict=True):
        assert_golden(member, result)


# ---- the truth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRUTHS)
def test_the_truth_is_what_was_recorded(name):
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == TRUTHS.keys()
    record = record_of(truth(TRUTHS[name]))
    for key, values in recorded[name].items():
        assert_close(record[key], values, torch.float32)


def test_the_truth_moves_and_its_router_losses_weigh():
    """Otherwise anything would agree with it."""
    alone, near = truth(Member()), truth(Member(nodes=2, locality=True))
    before = train(Member(), steps=0)["parameters"]
    moved = [
        name for name, tensor in alone["parameters"].items() if not torch.allclose(tensor, before[name], rtol=0.01)
    ]
    assert moved == list(before)
    assert alone["router_gradient"].norm() > 0.2 * alone["norms"][0]
    assert min(aux for aux, _ in alone["router_losses"]) > 2.05  # away from balance, which is `num_experts_per_tok`
    assert min(locality for _, locality in near["router_losses"]) > 0.1


@pytest.mark.parametrize("member", [Member(accumulation=4), Member(accumulation=2, checkpointing=True)])
def test_one_process_in_micro_batches(member):
    assert_golden(member, train(member))


# ---- over ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_two_ranks():
    on_two_nodes = dict(ranks=2, nodes=2)
    run(
        [
            Member(**on_two_nodes, layout="sharded", plan="none", slices=2),
            Member(**on_two_nodes, layout="replicated", checkpointing=True),
            Member(**on_two_nodes, layout="spread", plan="auto", slices=2, accumulation=4, locality=True),
        ]
    )


@pytest.mark.multiprocess
def test_four_ranks():
    on_two_nodes = dict(ranks=4, nodes=2)
    run(
        [
            Member(**on_two_nodes, layout="sharded", plan="auto"),
            Member(**on_two_nodes, layout="replicated", plan="flat", slices=2, checkpointing=True),
            Member(**on_two_nodes, layout="spread", plan="two_level", slices=2, fan_out="node", accumulation=4),
            Member(**on_two_nodes, layout="spread", plan="two_level", checkpointing=True, locality=True),
            Member(**on_two_nodes, layout="spread", plan="flat", fan_out="node", tp_size=2),
        ]
    )


def members(strength: int, **fixed) -> list[Member]:
    return [Member(**fixed, **choice) for choice in covering(strength, AXES)]


def parts(members: list[Member], size: int = 6) -> list[list[Member]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", parts(members(3, ranks=4, nodes=2)))
def test_any_three_choices_over_four_ranks(part):
    run(part)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", parts(members(2, ranks=4, nodes=2, ep_size=2)))
def test_any_two_choices_with_two_copies_of_every_expert(part):
    run(part)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("nodes", [2, 4])
def test_locality_loss_over_four_ranks(nodes):
    tp_sizes = (1, 2) if nodes == 2 else (1,)
    axes = AXES | dict(layout=("sharded", "spread"), plan=("flat", "two_level"), tp_size=tp_sizes)
    run([Member(ranks=4, nodes=nodes, locality=True, **choice) for choice in covering(2, axes)])


@pytest.mark.many_ranks
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("part", range(3))
def test_any_two_choices_over_eight_ranks(nodes, part):
    run(members(2, ranks=8, nodes=nodes)[part::3])


@pytest.mark.many_ranks
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("nodes", [2, 4])
def test_locality_loss_over_eight_ranks(nodes):
    choices = dict(plan="two_level", slices=2, fan_out="node", locality=True)
    run([Member(ranks=8, nodes=nodes, layout=layout, **choices) for layout in ("sharded", "spread")])
