# SPDX-License-Identifier: Apache-2.0
"""
The experts, through transformers' experts interface, and one more implementation of it for capacity-limited batches.

Shapes: T tokens, d = hidden_size, f = moe_intermediate_size, n = num_experts, k = num_experts_per_tok, C = capacity.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .overflow import position_in_expert


try:
    from ..permute.layout_kernels import rows_by_capacity, rows_by_expert
    from ..permute.row_kernels import combine, combine_rows, gather, gather_rows, needs_operator
    from .kernels import ACTIVATIONS, activate, activate_backward, weighted_activation
except ImportError:  # no Triton
    ACTIVATIONS = {}

# by class, as other models' configurations name their activation in other fields
_KERNEL_OF_ACTIVATION = {type(ACT2FN[name]): kernel for name, kernel in ACTIVATIONS.items()}


@use_experts_implementation(has_gate=False)
class LocMoeExperts(nn.Module):
    """
    `W_out[i] act(W_in[i] x)` (arXiv 2401.13920, eq. 1): `up_proj` (n, f, d) and `down_proj` (n, d, f).

    `forward(hidden_states (T, d), top_k_index (T, k), top_k_weights (T, k)) -> (T, d)`. An assignment that was dropped has
    weight 0. `expert_capacity` and `assignments_are_limited` are set by the block before each call and read by
    `"capacity_bmm"` alone.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, config.moe_intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]
        self.expert_capacity: int | None = None
        self.assignments_are_limited = True

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return _loop_over_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_experts,
            lambda expert, tokens: self.act_fn(tokens @ self.up_proj[expert].T) @ self.down_proj[expert].T,
        )


@use_experts_implementation
class LocMoeGatedExperts(nn.Module):
    """
    Gated experts, `W_out[i] (act(W_gate[i] x) * W_in[i] x)`: `gate_up_proj` (n, 2 f, d), gate rows first, and `down_proj`
    (n, d, f). Otherwise as [`LocMoeExperts`].
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]
        self.expert_capacity: int | None = None
        self.assignments_are_limited = True

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return _loop_over_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_experts,
            lambda expert, tokens: self._apply_gate(tokens @ self.gate_up_proj[expert].T) @ self.down_proj[expert].T,
        )


def without_adapters(experts: nn.Module) -> nn.Module:
    """The experts inside of what PEFT wraps around them, one wrapper for each parameter with LoRA."""
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return experts


def kernels_serve_here() -> bool:
    """Whether the kernels of `"capacity_bmm"` run on this machine: Triton and a CUDA device."""
    return bool(ACTIVATIONS) and torch.cuda.is_available()


def limits_assignments(experts: nn.Module) -> bool:
    """Whether these experts keep to `expert_capacity` by themselves, dropping what is over it."""
    return experts.config._experts_implementation == "capacity_bmm" and not getattr(
        experts, "_is_expert_parallel", False
    )


def _loop_over_experts(hidden_states, top_k_index, top_k_weights, num_experts, run_expert):
    """The reference: one expert after the other, on the tokens that chose it. Ids of `num_experts` and more are skipped."""
    output = torch.zeros_like(hidden_states)
    for expert in range(num_experts):
        token, slot = torch.where(top_k_index == expert)
        if token.numel():
            weighted = run_expert(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
    return output


class _ExpertLinear(torch.autograd.Function):
    """
    (R, in) rows laid out by expert times (n, out, in) weights to (R, out). Without `offsets` every expert has R / n rows;
    otherwise expert i's end at `offsets[i]`, and rows past the last are left as they are.

    torch's own gradient of a product with a transposed weight is transposed, too, and is copied into the parameter's
    layout when it is accumulated: a pass over all weights. Here it has the layout of the weight.
    """

    @staticmethod
    def forward(ctx, rows, weight, offsets):
        ctx.save_for_backward(rows, weight, offsets)
        return _by_expert(rows, weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, offsets = ctx.saved_tensors
        return *_linear_gradients(grad.contiguous(), rows, weight, offsets, *ctx.needs_input_grad[:2]), None


class _ResultToCome(torch.autograd.Function):
    """
    The experts in the graph before their last projection is computed: the result's shape with nothing in it, and the inputs
    of that projection, for [`_Result`]. What the gradient needs is saved here, so the recomputation of activation
    checkpointing, which ends once it has seen all that was saved, does not repeat the product.

    One function for the whole layer, since a function written in Python costs the host as much as several launches.
    """

    @staticmethod
    def forward(ctx, tokens, weights, first, last, row_of_choice, choice_of_row, offsets, activation, gated):
        rows = gather(tokens, choice_of_row, row_of_choice)
        inner = _by_expert(rows, first.transpose(1, 2), offsets)
        activated = activate(inner, weights, choice_of_row, activation, gated)
        ctx.save_for_backward(rows, inner, activated, weights, first, last, row_of_choice, choice_of_row, offsets)
        ctx.activation = activation, gated
        ctx.mark_non_differentiable(activated)
        ctx.set_materialize_grads(False)
        return tokens.new_empty(()).expand(tokens.shape[0], last.shape[1]), activated

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        rows, inner, activated, weights, first, last, row_of_choice, choice_of_row, offsets = ctx.saved_tensors
        for_tokens, for_weights, for_first, for_last = ctx.needs_input_grad[:4]
        for_inner = for_tokens or for_weights or for_first
        grad_tokens = grad_weights = grad_first = None
        grad = gather(grad, choice_of_row, row_of_choice)
        grad, grad_last = _linear_gradients(grad, activated, last, offsets, for_inner, for_last)
        if for_inner:
            grad, grad_weights = activate_backward(grad, inner, weights, choice_of_row, *ctx.activation)
            grad, grad_first = _linear_gradients(grad, rows, first, offsets, for_tokens, for_first)
        if for_tokens:
            grad_tokens = combine(grad, row_of_choice, choice_of_row)
        return grad_tokens, grad_weights, grad_first, grad_last, *[None] * 5


class _Result(torch.autograd.Function):
    """The values of a result to come, which takes the gradient as it is."""

    @staticmethod
    def forward(ctx, to_come, activated, last, row_of_choice, choice_of_row, offsets):
        return combine(_by_expert(activated, last.transpose(1, 2), offsets), row_of_choice, choice_of_row)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * 5


def _project(rows, weight, offsets):
    if not torch.is_grad_enabled():
        return _by_expert(rows, weight.transpose(1, 2), offsets)
    return _ExpertLinear.apply(rows, weight, offsets)


def _linear_gradients(grad, rows, weight, offsets, for_rows, for_weight):
    grad_rows = grad_weight = None
    if for_rows:
        grad_rows = _by_expert(grad, weight, offsets)
    if for_weight:
        if offsets is None:
            by_expert = (weight.shape[0], rows.shape[0] // weight.shape[0])
            grad_weight = torch.bmm(grad.unflatten(0, by_expert).transpose(1, 2), rows.unflatten(0, by_expert))
        else:
            grad_weight = torch.nn.functional.grouped_mm(grad.T, rows, offs=offsets)
    return grad_rows, grad_weight


def _by_expert(rows, weight, offsets):
    if offsets is None:
        num_experts = weight.shape[0]
        return torch.bmm(rows.unflatten(0, (num_experts, rows.shape[0] // num_experts)), weight).flatten(0, 1)
    return torch.nn.functional.grouped_mm(rows, weight, offs=offsets)


def capacity_bmm_experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_choices: int | None = None,
) -> torch.Tensor:
    """
    Experts implementation `"capacity_bmm"`: the tokens are laid out as `[n, C, d]` and each projection is one batched
    matrix product. Shapes depend on the number of tokens alone, so nothing is read back to the host.

    Uses `self.expert_capacity`. Without one (a dropless batch, or a model that knows no capacity) the rows of an expert
    are as many as its tokens and each projection is one grouped matrix product; likewise, where the kernels serve, with a
    capacity that leaves more room than there are assignments. Assignments past the capacity of their expert contribute
    nothing, nor do those to an expert id of `num_experts`, which stands for none. Those of weight 0 take no room: the caller
    has limited the assignments first (`moe.overflow.limit_to_capacity`), unless `self.assignments_are_limited` is False.

    On CUDA with Triton, layout, activation and weighting are kernels, `permute/` and `moe/kernels.py`, for transformers'
    experts of the same form as ours, too; elsewhere plain torch, and for dropless batches transformers' `"grouped_mm"`.

    Args:
        num_choices (`int`, *optional*):
            Of a dropless batch, how many ids name an expert of this module, at most; the others are `num_experts` and
            more. All of them when left out. See `takes_choices`.
    """
    capacity = getattr(self, "expert_capacity", None)
    dtype = _compute_dtype(self, hidden_states)
    if _can_fuse(self, hidden_states, dtype):
        return _fused_forward(self, hidden_states, top_k_index, top_k_weights, capacity, dtype, num_choices)
    top_k_weights = top_k_weights.to(hidden_states.dtype)
    if capacity is None:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    if self.has_bias or self.is_transposed or self.has_post_expert_norm:
        raise ValueError(
            "`experts_implementation` ('capacity_bmm') serves experts without biases, transposed weights or post-norm: "
            "use 'grouped_mm' for this model."
        )
    limited = top_k_weights if getattr(self, "assignments_are_limited", True) else None
    row_of_choice, choice_of_row = _rows_by_capacity(top_k_index, limited, self.num_experts, capacity)
    # -1 is the row of zeros at the end
    rows = _with_zero_row(hidden_states)[choice_of_row // top_k_index.shape[1]]
    rows = rows.view(self.num_experts, capacity, hidden_states.shape[-1])
    up_weight = _first_weight(self)
    inner = torch.bmm(rows.to(up_weight.dtype), up_weight.transpose(1, 2))
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outer = torch.bmm(inner, self.down_proj.transpose(1, 2)).flatten(0, 1)
    weighted = _with_zero_row(outer)[row_of_choice] * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _takes_choices(self: nn.Module, hidden_states: torch.Tensor) -> bool:
    """
    Whether a dropless batch may come with `num_choices`, most of its ids naming no expert of this module, and those take
    neither memory nor time. Expert parallelism asks this of an experts implementation.
    """
    dtype = _compute_dtype(self, hidden_states)
    return _can_fuse(self, hidden_states, dtype) and _can_group(self, hidden_states, dtype)


capacity_bmm_experts_forward.takes_choices = _takes_choices  # type: ignore[attr-defined]


def _fused_forward(self, hidden_states, top_k_index, top_k_weights, capacity, dtype, num_choices=None):
    limited = top_k_weights if getattr(self, "assignments_are_limited", True) else None
    offsets = None
    if capacity is None:
        row_of_choice, choice_of_row, offsets = rows_by_expert(top_k_index, self.num_experts)
        layout = row_of_choice, choice_of_row[:num_choices], offsets
    elif self.num_experts * capacity > top_k_index.numel() and _can_group(self, hidden_states, dtype):
        # more room than assignments: the rows that are taken, and no product of empty ones
        layout = rows_by_expert(top_k_index, self.num_experts, limited, capacity)
    else:
        layout = (*rows_by_capacity(top_k_index, limited, self.num_experts, capacity), None)
    row_of_choice, choice_of_row, offsets = layout
    tokens, first, last = hidden_states.to(dtype), _first_weight(self).to(dtype), self.down_proj.to(dtype)
    activation = _KERNEL_OF_ACTIVATION[type(self.act_fn)], self.has_gate
    if torch.is_grad_enabled() and not needs_operator(tokens):
        to_come, activated = _ResultToCome.apply(tokens, top_k_weights, first, last, *layout, *activation)
        output = _Result.apply(to_come, activated, last.detach(), *layout)
    else:  # the compiler decides by itself what to recompute
        rows = gather_rows(tokens, choice_of_row, row_of_choice)
        inner = _project(rows, first, offsets)
        inner = weighted_activation(inner, top_k_weights, choice_of_row, *activation)
        output = combine_rows(_project(inner, last, offsets), row_of_choice, choice_of_row)
    return output.to(hidden_states.dtype)


def _compute_dtype(self, hidden_states):
    """The dtype of the products: autocast's where it is on, which knows no grouped product, or the weights'."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return self.down_proj.dtype


def _can_fuse(self, hidden_states, dtype):
    if not _kernels_run_on(hidden_states) or not _has_our_form(self):
        return False
    if getattr(self, "expert_capacity", None) is not None:
        return dtype in (torch.bfloat16, torch.float16, torch.float32)
    return _can_group(self, hidden_states, dtype)


def _has_our_form(self):
    """Whether the experts compute what [`LocMoeExperts`] or [`LocMoeGatedExperts`] do, with weights that lie alike."""
    if (
        self.has_bias
        or self.is_transposed
        or self.has_post_expert_norm
        or type(self.act_fn) not in _KERNEL_OF_ACTIVATION
    ):
        return False
    if not self.has_gate:
        return True
    return self.is_concatenated and type(self)._apply_gate is LocMoeGatedExperts._apply_gate


def _can_group(self, hidden_states, dtype):
    # what torch's grouped product takes: bfloat16, and rows that begin at multiples of 16 bytes
    return dtype == torch.bfloat16 and hidden_states.shape[-1] % 8 == 0 and self.down_proj.shape[-1] % 8 == 0


def _kernels_run_on(hidden_states):
    return hidden_states.is_cuda


def _first_weight(self):
    return self.gate_up_proj if self.has_gate else self.up_proj


def _rows_by_capacity(top_k_index, top_k_weights, num_experts, capacity):
    """
    `row_of_choice` (T, k), -1 where an assignment has no room, and its inverse `choice_of_row` (n C,), -1 where a row is
    empty; expert i has the rows from i C.
    """
    num_tokens, top_k = top_k_index.shape
    expert = top_k_index
    if top_k_weights is not None:
        expert = torch.where((top_k_weights != 0) & (top_k_index < num_experts), top_k_index, num_experts)
    # first choices before second ones, as in `limit_to_capacity`
    position = position_in_expert(expert.T.reshape(-1), num_experts).view(top_k, num_tokens).T
    fits = (expert < num_experts) & (position < capacity)
    spare = num_experts * capacity
    row = torch.where(fits, expert * capacity + position, spare)
    choice = torch.arange(num_tokens * top_k, device=row.device)
    choice_of_row = choice.new_full((spare + 1,), -1).scatter_(0, row.reshape(-1), choice)[:-1]
    return row.masked_fill(~fits, -1), choice_of_row


def _with_zero_row(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


__all__ = [
    "LocMoeExperts",
    "LocMoeGatedExperts",
    "capacity_bmm_experts_forward",
    "limits_assignments",
    "without_adapters",
]
