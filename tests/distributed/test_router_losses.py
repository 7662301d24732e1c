# SPDX-License-Identifier: Apache-2.0
"""
Router losses over ranks: the gradient that data parallelism averages is that of one process on the whole batch.

Every rank returns the gradient after DDP's averaging; the reference is one process with the concatenated batch.
"""

import gc

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_locmoe.distributed.router_scope import RouterScope
from hf_locmoe.moe.losses import load_balancing_loss, locality_loss
from hf_locmoe.moe.routing import RouterStat
from tests.harness import run_ranks
from tests.tiny_models import gradients, random_ids, tiny_model
from tests.tolerances import assert_close


pytestmark = pytest.mark.multiprocess

SETTINGS = dict(gate_type="switch", router_aux_loss_coef=0.5, locality_loss_coef=0.5)
NEAR_OF_NODE = torch.tensor([[True, True, False, False], [False, False, True, True]])
WORLD_SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


def batch(num_rows, identical=False, padded=False):
    ids = random_ids(1, 12).expand(num_rows, 12).clone() if identical else random_ids(num_rows, 12)
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        for row in range(num_rows):
            start = 9 if identical else 6 + row % 5
            mask[row, start:], labels[row, start:] = 0, -100
    return ids, mask, labels


def vector(grads):
    return torch.cat([grad.double().flatten() for grad in grads.values()])


def rank_gradient(ids, mask, labels, settings, num_nodes, count_items, accumulation=1):
    """
    This rank's rows through DDP, in `accumulation` micro-batches, as Trainer would: with the step's number of targets,
    the loss scaled by the number of ranks, or without it, divided by the accumulation steps.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny_model(**settings).train()
    if num_nodes == 2:
        node = rank * 2 // world
        model.model.router_scope = RouterScope(num_nodes=2, node=node, node_local_experts=NEAR_OF_NODE[node])
    wrapped = DistributedDataParallel(model)
    total = (labels[:, 1:] != -100).sum()
    rows = torch.arange(len(ids)).view(accumulation, world, -1)[:, rank]
    for micro_batch in rows:
        kwargs = {"num_items_in_batch": total} if count_items else {}
        outputs = wrapped(ids[micro_batch], attention_mask=mask[micro_batch], labels=labels[micro_batch], **kwargs)
        (outputs.loss * world if count_items else outputs.loss / accumulation).backward()
    return vector(gradients(model)), outputs.router_aux_loss.detach()


def router_part_on_ranks(*args, **kwargs):
    """What the router losses add to the gradient, as every rank has it after the average."""
    *data, settings, num_nodes, count_items, accumulation = args
    off = {**settings, "router_aux_loss_coef": 0.0, "locality_loss_coef": 0.0}
    with_losses, aux = rank_gradient(*data, settings, num_nodes, count_items, accumulation)
    without, _ = rank_gradient(*data, off, num_nodes, count_items, accumulation)
    return with_losses - without, aux


def one_process(ids, mask, settings, num_nodes, world):
    """The router losses of the whole batch: load balance over all rows, locality over each node's."""
    model = tiny_model(**settings).train()
    whole = []
    hook = model.model.register_forward_hook(lambda module, args, output: whole.append(output.router_stats))
    model(ids, attention_mask=mask)
    sums = whole.pop()
    prob_sum, tokens = sums[:, RouterStat.PROB_SUM], sums[:, RouterStat.TOKENS]
    aux = load_balancing_loss(prob_sum, tokens, tokens.sum(-1)).mean()
    loss = settings["router_aux_loss_coef"] * aux
    if num_nodes == 2:
        for node, rows in enumerate(torch.arange(len(ids)).chunk(2)):
            model(ids[rows], attention_mask=mask[rows])
            prob_sum = whole.pop()[:, RouterStat.PROB_SUM]
            near = locality_loss(prob_sum, mask[rows].sum().expand(len(prob_sum)), NEAR_OF_NODE[node])
            loss = loss + settings["locality_loss_coef"] * near.mean() / 2  # DDP's mean over equally many ranks
    hook.remove()
    loss.backward()
    return vector(gradients(model)), aux.detach()


def ratio(actual, expected):
    assert expected.norm() > 0.05
    return ((actual @ expected) / (expected @ expected)).item()


@pytest.mark.parametrize("world", WORLD_SIZES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count_items", [False, True])
def test_identical_rows_give_the_gradient_of_one_process(world, padded, count_items):
    ids, mask, labels = batch(4 * world, identical=True, padded=padded)
    expected, _ = one_process(ids, mask, SETTINGS, 1, 1)
    for accumulation in (1, 2, 4):
        args = (ids, mask, labels, SETTINGS, 1, count_items, accumulation)
        for actual, _ in run_ranks(router_part_on_ranks, world, *args):
            assert ratio(actual, expected) == pytest.approx(1.0, abs=5e-4)


@pytest.mark.parametrize("world", WORLD_SIZES)
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_global_scope_is_one_process_on_the_whole_batch(world, num_nodes):
    """Different rows, different padding."""
    ids, mask, labels = batch(2 * world, padded=True)
    expected, expected_aux = one_process(ids, mask, SETTINGS, num_nodes, world)
    # one micro-batch a rank: the shares of the ranks add up to one, so the item count changes nothing
    for actual, aux in run_ranks(router_part_on_ranks, world, ids, mask, labels, SETTINGS, num_nodes, False, 1):
        assert_close(aux, expected_aux)
        assert_close(actual, expected, torch.float32)
    if num_nodes == 1:
        for actual, _ in run_ranks(router_part_on_ranks, world, ids, mask, labels, SETTINGS, num_nodes, True, 1):
            assert_close(actual, expected, torch.float32)


def test_the_micro_batch_scope_is_the_mean_over_ranks():
    settings = {**SETTINGS, "router_loss_scope": "micro_batch"}
    ids, mask, labels = batch(4)
    per_rank = [one_process(ids[rows], mask[rows], settings, 1, 1) for rows in (slice(0, 2), slice(2, 4))]
    expected = (per_rank[0][0] + per_rank[1][0]) / 2
    results = run_ranks(router_part_on_ranks, 2, ids, mask, labels, settings, 1, False, 1)
    for rank, (actual, aux) in enumerate(results):
        assert_close(actual, expected, torch.float32)
        assert_close(aux, per_rank[rank][1])
    whole, _ = one_process(ids, mask, settings, 1, 1)
    assert not torch.allclose(whole, expected, rtol=1e-2)


def reduced(values):
    scope = RouterScope(num_nodes=2, node=dist.get_rank() // 2)
    local = values[dist.get_rank()].clone().requires_grad_()
    over_all, over_node = scope.reduce(local)
    weight = dist.get_rank() + 1.0
    (weight * (2 * over_all.sum() + 3 * over_node.sum())).backward()
    return over_all.detach(), over_node.detach(), local.grad, scope.num_ranks


@pytest.mark.slow
def test_reduce_sums_over_all_and_over_the_node_with_its_gradient():
    values = torch.randn(4, 3, 2)
    for rank, (over_all, over_node, grad, num_ranks) in enumerate(run_ranks(reduced, 4, values)):
        node = rank // 2
        assert num_ranks == 4
        assert_close(over_all, values.sum(0))
        assert_close(over_node, values[2 * node : 2 * node + 2].sum(0))
        # all ranks' losses: 2 (1 + 2 + 3 + 4) through the whole, 3 times the weights of the node's ranks
        assert_close(grad, torch.full((3, 2), 20.0 + 3 * (3 if node == 0 else 7)))


def trainer_gradient(ids, mask, labels, accumulation, coefficient, output_dir):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    gc.freeze()

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradient = vector(gradients(model))

    model = tiny_model(**{**SETTINGS, "router_aux_loss_coef": coefficient})
    keep = Keep()
    dataset = [dict(input_ids=i, attention_mask=m, labels=l) for i, m, l in zip(ids, mask, labels)]
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=len(ids) // accumulation // dist.get_world_size(),
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[keep]).train()
    return keep.gradient


def trainer_router_part(*args):
    *args, output_dir = args
    return trainer_gradient(*args, 0.5, output_dir) - trainer_gradient(*args, 0.0, output_dir)


@pytest.mark.parametrize("world", WORLD_SIZES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_through_trainer(tmp_path, world, accumulation):
    ids, mask, labels = batch(8, identical=True, padded=True)
    expected, _ = one_process(ids, mask, SETTINGS, 1, 1)
    args = (ids, mask, labels, accumulation, str(tmp_path))
    for actual in run_ranks(trainer_router_part, world, *args):
        assert ratio(actual, expected) == pytest.approx(1.0, abs=5e-4)
