# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks.bench_step import CHECKED_STEPS, _merge, largest_difference, main, parse, report, rows, verdicts
from benchmarks.cluster import Link
from benchmarks.record import Load
from benchmarks.step_variants import VARIANTS, Setup, Variant


SETUP = Setup(warmup=1, repeats=4)
LINK = Link(rate="200mbit")
UPSTREAM = [VARIANTS["a"], VARIANTS["d"]]
OURS = Variant("ours", "a", "locmoe", upstream=False)
TRUTH = [3.0, 2.0, 1.0, 1.0, 1.0]


def measured(seconds: float, losses: list[float] = TRUTH, sent: float = 25e6) -> dict:
    # the first step is warm-up and slow
    return {"seconds": [99.0] + [seconds] * 4, "sent": [1e9] + [sent] * 4, "losses": losses}


def table(**by_variant) -> dict[str, dict]:
    variants = [*UPSTREAM, OURS, VARIANTS["alone"]]
    variants = [variant for variant in variants if variant.name in by_variant]
    return {row["variant"]: row for row in rows(SETUP, variants, [LINK], {str(LINK): by_variant}, TRUTH)}


def test_times_are_medians_after_the_warm_up_and_bytes_become_seconds_at_the_links_rate():
    row = table(a=measured(4.0), d=measured(2.0))["a"]
    assert row["seconds 200mbit"].median == row["seconds 200mbit"].highest == 4.0
    assert row["sent 200mbit"] == 25.0
    assert row["wire 200mbit"] == 1.0


def test_ratios_are_to_the_fastest_upstream_layout():
    result = table(a=measured(4.0), d=measured(2.0), ours=measured(1.0))
    assert [result[name]["ratio 200mbit"] for name in ("a", "d", "ours")] == [2.0, 1.0, 0.5]


def test_ratios_pair_steps_on_the_same_batch():
    first, second = measured(1.0), measured(1.0)
    first["seconds"] = [9.0, 1.0, 10.0, 100.0, 1000.0]
    second["seconds"] = [9.0, 0.5, 5.0, 50.0, 500.0]
    assert table(a=first, ours=second)["ours"]["ratio 200mbit"] == 0.5


@pytest.mark.parametrize("loss", [1.001, math.nan])
def test_a_layout_with_other_losses_gets_no_speed_and_sets_no_standard(loss):
    result = table(a=measured(4.0), d=measured(2.0, losses=[*TRUTH[:4], loss]))
    assert not result["d"]["correct"]
    assert not [key for key in result["d"] if key.startswith(("seconds", "ratio", "sent"))]
    assert result["a"]["ratio 200mbit"] == 1.0


def test_a_rank_alone_is_measured_and_not_checked():
    row = table(a=measured(4.0), alone=measured(1.0, losses=[0.0] * 5))["alone"]
    assert row["correct"]
    assert row["ratio 200mbit"] == 0.25
    assert "loss_difference" not in row


def test_the_verdict_compares_time_and_bytes_with_upstreams_fastest():
    half = dataclasses.replace(OURS, name="half", wire_dtype="bfloat16")
    by_name = {"a": measured(4.0), "d": measured(2.0), "ours": measured(1.0, sent=5e6), "half": measured(3.0)}
    variants = [*UPSTREAM, OURS, half, VARIANTS["alone"]]
    by_name["alone"] = measured(0.1)
    result = rows(SETUP, variants, [LINK], {str(LINK): by_name}, TRUTH)
    first, second = verdicts([LINK], variants, result)
    assert first.startswith("200mbit, float32 on the wire: `ours` takes 0.50 of the time")
    assert "`d`, and sends 0.20 of its bytes." in first
    assert "`half` takes 1.50 of the time" in second


def test_losses_count_until_rounding_has_grown():
    truth = [1.0] * (CHECKED_STEPS + 1)
    assert largest_difference([[*truth[:-1], 5.0]], truth) == 0
    assert largest_difference([truth, [1.5, *truth[1:]]], truth) == 0.5


def test_ranks_are_merged_into_slowest_busiest_and_mean():
    setup = Setup(nodes=2, ranks_per_node=2)
    everyone = [
        {"seconds": {"a": [float(rank)]}, "sent": {"a": [10 * rank]}, "losses": {"a": [float(rank)]}}
        for rank in range(4)
    ]
    # ranks 0 and 2 speak for their nodes
    assert _merge("a", everyone, setup) == {"seconds": [3.0], "sent": [20], "losses": [1.5]}


def test_the_report_marks_what_is_wrong():
    with Load() as load:
        pass
    result = table(a=measured(4.0), d=measured(2.0, losses=[*TRUTH[:4], 2.0]))
    runs = {str(LINK): {"a": {"fan_out_and_slices": []}, "s-locmoe": {"fan_out_and_slices": [["rank", 2]]}}}
    record = report(SETUP, [LINK], UPSTREAM, list(result.values()), load, TRUTH, runs, "command")
    assert f"Fan-out and slices that were chosen: {LINK}: s-locmoe rank 2." in record.notes
    text = record.table()
    assert "1.0e+00 WRONG, no speed" in text
    assert "0.0e+00" in text


@pytest.mark.parametrize(
    "variant", [variant for variant in VARIANTS.values() if variant.is_layout], ids=lambda v: v.name
)
@pytest.mark.parametrize("nodes, ranks_per_node", [(2, 2), (4, 2), (2, 8)])
def test_every_layout_covers_the_world(variant, nodes, ranks_per_node):
    config = variant.distributed_config(Setup(nodes=nodes, ranks_per_node=ranks_per_node))
    assert config.dp_size == nodes * ranks_per_node


def test_every_size_can_be_set():
    args = parse(["--hidden_size", "64", "--lr", "0.1", "--links", "1gbit", "--variants", "a", "d"])
    assert (args.hidden_size, args.lr, args.links, args.variants) == (64, 0.1, ["1gbit"], ["a", "d"])


def test_an_unknown_variant_is_refused():
    with pytest.raises(SystemExit):
        main(["--variants", "zzz"])
