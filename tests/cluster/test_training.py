# SPDX-License-Identifier: Apache-2.0
"""Training on emulated nodes: the same numbers as one process whatever the network does, and errors that say who is gone."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cluster import Cluster, Fault, Link, RunResult, run_on_nodes, why_unavailable
from benchmarks.cluster.network import why_no_loss
from hf_locmoe.distributed.layouts import LAYOUTS
from tests.cluster.train import Run, train, write
from tests.tolerances import assert_close


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.multiprocess,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

ROOT = Path(__file__).parents[2]
SHAPED = Link(rate="200mbit")


def run_cluster(
    run: Run,
    directory: Path,
    nodes: int = 2,
    link: Link = SHAPED,
    fault: str | None = None,
    environment: dict[str, str] | None = None,
    timeout_s: float = 300,
) -> tuple[RunResult, dict | None]:
    """Train on a cluster of `nodes`; what the cluster saw, and what rank 0 wrote."""
    output = directory / "trained.pt"
    path = write(replace(run, output=str(output)), directory / "run.json")
    command = [sys.executable, "-m", "torch.distributed.run", "-m", "tests.cluster.train", str(path)]
    with Cluster(nodes, link) as cluster:
        result = run_on_nodes(
            cluster,
            command,
            run.world_size // nodes,
            environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "LOGLEVEL": "ERROR", **(environment or {})},
            faults=[Fault.parse(fault)] if fault else [],
            timeout_s=timeout_s,
            grace_s=120,  # a launcher gives a stalled rank 30 s to end
        )
    return result, torch.load(output) if output.exists() else None


@functools.cache
def one_process(architecture: str, num_experts_per_tok: int, accumulation: int) -> dict:
    return train(Run(architecture, num_experts_per_tok, accumulation=accumulation))


def assert_as_one_process(run: Run, result: RunResult, trained: dict | None) -> None:
    assert result.status == 0, result.text()
    truth = one_process(run.architecture, run.num_experts_per_tok, run.accumulation)
    for key in ("losses", "norms", "parameters"):
        assert_close(trained[key], truth[key], torch.float32)


@pytest.mark.parametrize(
    "architecture, num_experts_per_tok, layout",
    [*(("locmoe", 1, layout) for layout in LAYOUTS), ("locmoe", 2, "spread"), ("olmoe", 2, "spread")],
)
def test_two_nodes_train_as_one_process(architecture, num_experts_per_tok, layout, tmp_path):
    run = Run(architecture, num_experts_per_tok, layout=layout)
    assert_as_one_process(run, *run_cluster(run, tmp_path))


def test_four_nodes_train_as_one_process(tmp_path):
    run = Run()
    result, trained = run_cluster(run, tmp_path, nodes=4)
    assert_as_one_process(run, result, trained)
    # every node sent something to the others
    assert min(node.tx_bytes for node in result.crossed) > 100_000


def test_accumulation_on_two_nodes(tmp_path):
    run = Run(accumulation=3)
    assert_as_one_process(run, *run_cluster(run, tmp_path))


@pytest.mark.parametrize("layout, crosses", [("spread", True), ("replicated", False)])
def test_whether_tokens_cross_nodes_shows_in_the_interfaces_counters(layout, crosses, tmp_path):
    # nothing left to choose, so that no rates are measured at the start
    chosen = {"LOCMOE_SLICES": "1", "LOCMOE_FAN_OUT": "rank"}
    few, many = (
        run_cluster(Run(layout=layout, sequences_per_rank=count), tmp_path, link=Link(), environment=chosen)[0]
        for count in (2, 32)
    )
    assert few.status == many.status == 0, few.text() + many.text()
    sent = [sum(node.tx_bytes for node in result.crossed) for result in (few, many)]
    # without tokens on the way, sixteen times the tokens change nothing but the noise of the rendezvous
    assert (sent[1] > 2 * sent[0]) == crosses
    assert (abs(sent[1] - sent[0]) < 0.2 * sent[0]) == (not crosses)


def test_a_lossy_link_changes_nothing_but_the_bytes(tmp_path):
    if (reason := why_no_loss()) is not None:
        pytest.skip(reason)
    run = Run()
    result, trained = run_cluster(run, tmp_path, link=Link(rate="200mbit", loss="1%"))
    assert_as_one_process(run, result, trained)
    assert sum(node.tcp_retransmits for node in result.crossed) > 0


def test_a_rank_ten_times_slower_changes_nothing(tmp_path):
    run = Run()
    result, trained = run_cluster(run, tmp_path, fault="slow:3:10@/step 0/")
    assert_as_one_process(run, result, trained)
    assert result.events == ["fault: slow rank 3 by 10"]


def test_a_link_that_comes_back_within_the_timeout_changes_nothing(tmp_path):
    run = Run()
    result, trained = run_cluster(run, tmp_path, fault="cut:1@/step 0/+3s")
    assert_as_one_process(run, result, trained)
    assert result.events == ["fault: cut node 1", "mended: cut node 1"]


@pytest.mark.parametrize(
    "fault, culprits",
    [("cut:1@/step 2/", {2, 3}), ("kill:3@/step 2/", {3}), ("stop:3@/step 2/", {3})],
    ids=["cut link", "killed rank", "stalled rank"],
)
def test_every_surviving_rank_names_who_is_lost(fault, culprits, tmp_path):
    # as the default group's backend: the dense layers' collectives are watched, too
    run = Run(steps=200, timeout_s=20, backend="locmoe")
    result, trained = run_cluster(run, tmp_path, fault=fault)
    assert trained is None
    assert None not in result.statuses, "a rank hung:\n" + result.text()
    assert result.status != 0
    # node 0 has its store and both its ranks; the first to raise may have the launcher end the second
    messages = [line for line in result.output[0] if "CollectiveError" in line]
    assert messages, result.text()
    for text in messages:
        lost = re.search(r"lost or stalled: ((?:rank \d \(node \d\)(?:, )?)+)\.", text)
        assert culprits <= {int(rank) for rank in re.findall(r"rank (\d)", lost[1])}, text
    if fault.startswith("cut"):
        assert any("this node is cut off" in line for line in result.output[1]), result.text()
