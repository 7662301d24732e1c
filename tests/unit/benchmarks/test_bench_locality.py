# SPDX-License-Identifier: Apache-2.0
"""The parts of `bench_locality` that need neither a cluster nor a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.locality_data import cut
from benchmarks.locality_jobs import compressed, pack, restored, steps_within, unpack
from benchmarks.locality_rows import AIMS, COSINE, MU, ROUTINGS, Routing, Setup, Topology, jobs
from benchmarks.locality_train import Nodes, TiersOfAllRanks, Training, load_cv
from hf_locmoe.moe.losses import locality_loss
from tests.tolerances import assert_close


TWO, FOUR = Topology(2, 2), Topology(4, 1)
SMALL = Setup(
    vocab_size=32,
    hidden_size=16,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    sequences=8,
    sequence_length=16,
    steps=6,
)


def text(seed: int = 0):
    """Two domains that share no token id."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(16 * d, 16 * d + 16, (16 * 24,), generator=draw, dtype=torch.int16) for d in (0, 1)]
    return {"train": cut({"a": ids[0], "b": ids[1]}, 16), "validation": cut({"a": ids[0][:64], "b": ids[1][:64]}, 16)}


def test_topology_from_text():
    assert Topology.parse("2x2") == TWO and str(FOUR) == "4x1" and TWO.world_size == 4
    for wrong in ("1x4", "2", "2x0", "axb"):
        with pytest.raises(ValueError, match="topology"):
            Topology.parse(wrong)


def test_rows_that_change_nothing_that_is_computed_share_a_training():
    rows = [ROUTINGS[name] for name in ("hash", "none", "batches", "experts", "loss + batches", "all local")]
    found = jobs(rows, [TWO, FOUR], [0, 1])
    names = [job.name for job in found if job.seed == 0]
    assert sorted(names) == sorted(
        ["hash seed 0", "none seed 0"]
        + [f"{name} {topology} seed 0" for name in ("loss + batches", "all local") for topology in ("2x2", "4x1")]
    )
    read = sorted((row.name, str(topology)) for job in found if job.seed == 1 for row, topology in job.rows)
    assert read == sorted((row.name, str(topology)) for row in rows for topology in (TWO, FOUR))
    assert [len(job.rows) for job in found] == sorted((len(job.rows) for job in found), reverse=True)


def test_every_row_has_a_name_of_its_own_and_the_aim_is_reached_at_full_weight():
    assert all(routing.name == name for name, routing in ROUTINGS.items())
    aimed = ROUTINGS["loss 0.1 to the aim + batches"]
    assert aimed.target_share(TWO) > AIMS[2] and aimed.target_share(FOUR) > AIMS[4]
    assert ROUTINGS["loss"].target_share(TWO) is None


def test_steps_follow_from_the_rates():
    assert steps_within([10.0, 10.0], num_jobs=4, num_workers=2, seconds=100, most=10_000) == 460
    assert steps_within([10.0, 10.0], 4, 2, 100, most=200) == 200
    assert steps_within([10.0, 10.0], 4, 2, 100, 10_000, validation_steps=60) == 400
    # the slowest one must be done with its first job
    assert steps_within([40.0, 1.0], 4, 2, 100, 10_000) == 90
    with pytest.raises(ValueError, match="budget_s"):
        steps_within([1.0], 10, 1, 20, 1000)


def test_sequences_are_of_one_domain_and_mixed():
    part = text()["train"]
    assert part.input_ids.shape == (48, 16) and part.domains == ["a", "b"]
    assert torch.equal((part.input_ids // 16).amax(1).long(), part.domain.long())
    assert torch.equal((part.input_ids // 16).amin(1).long(), part.domain.long())
    assert len(set(part.domain[:16].tolist())) == 2
    batches = part.batches(8, 12, seed=3)
    assert torch.equal(batches, part.batches(8, 12, seed=3)) and not torch.equal(batches, part.batches(8, 12, seed=4))
    assert sorted(batches.flatten()[:48].tolist()) == list(range(48))  # epoch after epoch


def test_compression_keeps_experts_to_a_two_hundredth_of_their_row():
    draw = torch.Generator().manual_seed(0)
    state = {
        "experts": torch.randn(2, 3, 5, generator=draw),
        "embedding": torch.randn(4, 3, generator=draw),
        "norm": torch.randn(3, generator=draw),
        "table": torch.arange(6).view(6, 1),
    }
    state["experts"][0, 1] = 0
    found = restored(compressed(state))
    error = (found["experts"] - state["experts"]).abs().amax(-1)
    assert (error <= state["experts"].abs().amax(-1) / 200).all()
    torch.testing.assert_close(found["embedding"], state["embedding"], rtol=1e-2, atol=0)
    assert torch.equal(found["norm"], state["norm"]) and torch.equal(found["table"], state["table"])


def test_runs_of_one_training_are_packed_with_one_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.locality_jobs.FILE_BYTES", 300.0)
    (tmp_path / "scratch").mkdir()
    for name, training in (("2x2 none", "n"), ("2x2 batches", "n"), ("4x1 loss", "l")):
        run = {
            "training": training,
            "result": {"routing": name},
            "setup": {},
            "placement": {"table": {"counts": torch.ones(2)}},
            "state_dict": {"weight": torch.full((50,), float(len(training)))},
        }
        torch.save(run, tmp_path / "scratch" / f"{name}.pt")
    paths = pack(tmp_path / "scratch", tmp_path)
    assert len(paths) == 2  # the second training does not fit beside the first
    runs = unpack(tmp_path)
    assert set(runs) == {"2x2 none", "2x2 batches", "4x1 loss"}
    assert torch.equal(runs["2x2 batches"]["state_dict"]["weight"], torch.ones(50))


def test_load_cv_against_the_definition():
    places = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]).view(4, 1, 2)
    loads = torch.tensor([3.0, 2.0, 3.0, 0.0])
    assert load_cv(places, 4) == pytest.approx((loads.std(correction=0) / loads.mean()).item())


@pytest.mark.parametrize("topology", [TWO, FOUR])
def test_locality_loss_is_the_mean_of_the_nodes(topology):
    draw = torch.Generator().manual_seed(0)
    row = Nodes(SMALL, ROUTINGS["loss"], topology, num_domains=2)
    logits = torch.randn(2, 8 * 16, 8, generator=draw)
    node = torch.randperm(8, generator=draw) % topology.nodes
    node_of_token = node.repeat_interleave(16)
    expected = []
    for layer in range(2):
        for number in range(topology.nodes):
            prob = logits[layer, node_of_token == number].softmax(-1)
            near = row.node_of_expert[layer] == number
            expected.append(locality_loss(prob.sum(0), torch.tensor(float(len(prob))), near, 0.1))
    assert_close(row.locality_loss(logits, node), torch.stack(expected).mean())


def test_loss_eases_off_above_the_aim():
    row = Nodes(SMALL, ROUTINGS["loss 0.1 to the aim + batches"], TWO, num_domains=2)
    logits, node = torch.randn(2, 128, 8), torch.arange(8) // 4
    full = row.locality_loss(logits, node)
    row.running_share = torch.tensor([AIMS[2], AIMS[2] + 0.06])  # the second layer is there
    only_first = row.locality_loss(logits[:1].repeat(2, 1, 1), node)
    row.running_share = torch.tensor([0.5, 0.5])
    assert_close(row.locality_loss(logits, node), full)
    assert_close(only_first, row.locality_loss(logits[:1].repeat(2, 1, 1), node) / 2)


def test_share_and_load_know_where_the_experts_are():
    row = Nodes(SMALL, ROUTINGS["batches + experts"], TWO, num_domains=2)
    routes = torch.tensor([[[0], [4]], [[7], [1]]])  # (T, L, k)
    assert row.local_share(routes, torch.tensor([0, 1])).tolist() == [1.0, 0.0]
    row.node_of_expert[1] = row.node_of_expert[1].flip(0)
    assert row.local_share(routes, torch.tensor([0, 1])).tolist() == [1.0, 1.0]
    # layer 1: experts 4..7 on node 0, so 4 and 1 are the first expert of rank 0 and the second of rank 2
    expected = load_cv(torch.tensor([[[0], [0]], [[3], [2]]]), 4)
    assert row.rank_load_cv(routes) == pytest.approx(expected)


def test_tiers_of_all_ranks_keep_each_rank_below_its_ceiling():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 8, generator=draw)
    near = torch.arange(8) // 4 == torch.tensor([0, 0, 1, 1]).unsqueeze(1)
    tiers = TiersOfAllRanks(near, 0.5, tokens_per_rank=16)
    choice = logits.argmax(-1, keepdim=True)
    over = tiers.overflow(choice, logits)
    is_remote = ~tiers.node_local_experts.gather(1, choice)
    left = (is_remote & ~over).view(4, 16).sum(1)
    assert (left <= 4).all() and (left == is_remote.view(4, 16).sum(1).clamp_max(4)).all()


def test_a_training_learns_where_samples_belong():
    """A hash of token ids that no domain shares: dealing alone finds the nodes, and changes nothing that is computed."""
    hashed = Routing("by hand", (("gate_type", "hash"),), places_batches=True)
    plain = Routing("hash", (("gate_type", "hash"),))
    job = jobs([plain, hashed], [TWO], [0])[0]
    training = Training(job, SMALL, text(), "cpu")
    for block in training.model.sparse_blocks:
        block.gate.expert_of_token.copy_((torch.arange(32) // 4).unsqueeze(1))
    trained = training.run()
    read, dealt = trained.results
    assert read["routing"] == "hash" and dealt["routing"] == "by hand"
    assert dealt["local_share_by_layer"] == pytest.approx([dealt["local_share"]] * 2)
    assert dealt["local_share"] > read["local_share"] + 0.2
    assert read["validation_loss"] == dealt["validation_loss"]
    assert len(trained.placements) == 2 and trained.placements[1]["table"]["counts"].sum() > 0


def test_forced_all_local_keeps_every_token_on_its_node():
    routing = Routing("all local", COSINE, MU, True, 2, 0.0)
    job = jobs([routing], [FOUR], [0])[0]
    assert job.is_led
    result = Training(job, SMALL, text(), "cpu").run().results[0]
    assert result["local_share"] == 1.0 and result["rerouted"] > 0.3 and result["dropped"] == 0.0
