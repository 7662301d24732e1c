# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes, on two ranks of which one is slower by a known time."""

import time

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers
from hf_locmoe.distributed.parallel_run import spread_every_model
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.telemetry import find_router_model
from hf_locmoe.training.traffic import TrafficStats
from tests.harness import run_ranks


pytestmark = pytest.mark.multiprocess

DELAY_S, LAYERS, STEPS = 0.1, 2, 2
CONFIG = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
CONFIG |= {"num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0}


def train(slices, fan_out="auto", top_k=1):
    """Experts of rank 1 take DELAY_S longer for every slice, in forward."""
    LocMoePlugin(layout="spread", backend="none", slices=slices, fan_out=fan_out).activate()
    spread_every_model()
    torch.manual_seed(0)
    config = LocMoeConfig(**CONFIG | {"num_experts_per_tok": top_k}, moe_intermediate_size=24)
    model = AutoModelForCausalLM.from_config(config).train()
    for layer in expert_parallel_layers(model):
        if dist.get_rank() == 1:
            quick = layer.experts_forward

            def slow(*args, quick=quick):
                time.sleep(DELAY_S / int(slices))
                return quick(*args)

            layer.experts_forward = slow
    traffic = TrafficStats()
    traffic.watch(model, find_router_model(model))
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(STEPS):
        traffic.begin_step()
        model(input_ids=ids, labels=ids).loss.backward()
        traffic.end_step()
        with torch.no_grad():  # between two steps: not timed
            model(input_ids=ids)
    metrics, _ = traffic.flush(torch.device("cpu"))
    assert "time/step_s" not in traffic.flush(torch.device("cpu"))[0]
    return metrics


def times_of(ranks):
    assert all(metrics == ranks[0] for metrics in ranks)
    times = {name.removeprefix("time/"): value for name, value in ranks[0].items() if name.startswith("time/")}
    assert times["step_s"] == pytest.approx(times["computation_s"] + times["exchange_s"] - times["overlap_s"])
    assert 0 <= times["idle_s"] <= times["exchange_s"] - times["overlap_s"]
    assert times["exchange_s"] <= times["step_s"]
    return times


def test_a_rank_that_waits_for_a_slower_one_is_idle():
    times = times_of(run_ranks(train, 2, "1", env={"LOCMOE_RANKS_PER_NODE": "1"}))
    delay = DELAY_S * LAYERS  # of a step, of one rank, for which the other waits
    assert delay < times["step_s"]
    assert times["idle_s"] > 0.8 * delay / 2
    # nothing is computed between start and wait of one slice
    assert times["overlap_s"] < 0.2 * delay


def test_with_two_slices_one_is_under_way_while_the_other_is_computed():
    times = times_of(run_ranks(train, 2, "2", env={"LOCMOE_RANKS_PER_NODE": "1"}))
    # the second slice's dispatch under the first one's delay, and the first one's combine under the second's
    assert times["overlap_s"] > 0.8 * DELAY_S * LAYERS / 2


def test_hops_inside_a_node_are_in_it():
    ranks = run_ranks(train, 4, "1", "node", 2, env={"LOCMOE_RANKS_PER_NODE": "2"})
    times = times_of(ranks)
    # three ranks wait for one
    assert times["idle_s"] > 0.8 * DELAY_S * LAYERS * 3 / 4
