# SPDX-License-Identifier: Apache-2.0
"""What the traffic telemetry says of two ranks on two nodes is what their routing implies."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers
from hf_locmoe.distributed.parallel_run import spread_every_model
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.telemetry import find_router_model
from hf_locmoe.training.traffic import TrafficStats
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


pytestmark = pytest.mark.multiprocess

HIDDEN_SIZE, STEPS, MICRO_BATCHES = 16, 2, 2
# There with its weight and its expert's id, and back; in backward there, and back with the weight's gradient. What is behind
# the row is filled up to 16 bytes. Before them each rank tells the other one number of 8 bytes.
BYTES_OF_ROW = (4 * HIDDEN_SIZE + 16) + 4 * HIDDEN_SIZE + 4 * HIDDEN_SIZE + (4 * HIDDEN_SIZE + 16)


def config(family):
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN_SIZE, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0}
    if family == "olmoe":
        return OlmoeConfig(**sizes, eos_token_id=1, output_router_logits=False)
    return LocMoeConfig(**sizes, moe_intermediate_size=24)


def train(family):
    rank = torch.distributed.get_rank()
    LocMoePlugin(layout="spread", backend="locmoe", slices="1").activate()
    spread_every_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family)).train()
    layers = expert_parallel_layers(model)
    traffic = TrafficStats()
    traffic.watch(model, find_router_model(model))
    draw = torch.Generator().manual_seed(rank)
    routes = []
    for _ in range(STEPS):
        traffic.begin_step()
        for _ in range(MICRO_BATCHES):
            ids = torch.randint(1, 64, (2, 12), generator=draw)
            outputs = model(input_ids=ids, labels=ids)
            outputs.loss.backward()
            traffic.collect(getattr(outputs, "router_stats", None))
            routes.append(torch.stack([layer.newest_routes.flatten() for layer in layers]))
        traffic.end_step()
        with torch.no_grad():  # between two steps: not counted
            model(input_ids=ids)
    metrics, shares = traffic.flush(torch.device("cpu"))
    again = traffic.flush(torch.device("cpu"))
    homes = torch.tensor(layers[0].node_of_expert)
    return {"metrics": metrics, "shares": shares, "again": again, "near": homes[torch.stack(routes)] == rank}


@pytest.mark.parametrize("family", ["locmoe", "olmoe"])
def test_shares_and_bytes_are_those_of_the_routing(family):
    ranks = run_ranks(train, 2, family, env={"LOCMOE_RANKS_PER_NODE": "1"})
    near = torch.stack([result["near"] for result in ranks])  # (rank, forward, layer, token)
    num_remote, num_exchanges = int((~near).sum()), 2 * MICRO_BATCHES * near.size(2)  # of both ranks, in a step
    for result in ranks:
        assert result["again"] == ({}, [])
        metrics = result["metrics"]
        assert torch.allclose(
            torch.tensor(result["shares"]), near.float().mean((0, 1, 3)), **TOLERANCES[torch.float32]
        )
        assert metrics["routing/local_share"] == pytest.approx(near.float().mean().item())
        assert metrics["comm/bytes_inter_node"] == BYTES_OF_ROW * num_remote / STEPS + 8 * num_exchanges
        assert metrics["comm/messages_inter_node"] == 5 * num_exchanges
        assert metrics["comm/bytes_intra_node"] == metrics["comm/messages_intra_node"] == 0
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


def test_nothing_on_one_process():
    traffic = TrafficStats()
    traffic.watch(torch.nn.Linear(1, 1), None)
    traffic.begin_step()
    traffic.collect(None)
    traffic.end_step()
    assert traffic.flush(torch.device("cpu")) == ({}, [])
