# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of the LocMoE gate, from hidden states to experts, weights and router statistics.

The forward is one kernel, which reads the hidden states once; where statistics are wanted it leaves partial sums, which
another one adds in a fixed order, without atomics, so that the bits are the same every time. The backward is one kernel,
which reads the hidden states once.

`gate_kernels.py` calls them.

Shapes: T tokens, d = hidden_size, n = num_experts, k = num_experts_per_tok, S = len(RouterStat).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .router_kernels import sortable


@triton.jit
def _unknown_zero(T):
    """
    0, which the compiler does not know. Where it knows the range of experts it divides their block bounds in 16 bits, two at
    a time, and ptxas 12.8 gets such a packed sum wrong.
    """
    return tl.minimum(T, 0)


@triton.jit
def _blocks(expert, T, n: tl.constexpr, D: tl.constexpr):
    """First dimension and number of dimensions of each expert's block."""
    if D % n == 0:
        return expert * (D // n), tl.full(expert.shape, D // n, tl.int32)
    else:
        product = (expert + _unknown_zero(T)) * D
        start = product // n
        return start, (product + D) // n - start


@triton.jit
def _window_sums(
    hidden_row,
    window,
    T,
    n: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    NORM: tl.constexpr,
):
    """
    Block sums of WINDOW experts of one token, and the sum of their squares. Blocks that begin between two multiples of
    ALIGN are read from the one before to the one after, so that all loads are 16 bytes wide; what belongs to a neighbour
    is set to 0.
    """
    expert = window * WINDOW + tl.arange(0, WINDOW)
    within = tl.arange(0, SIZE_PAD)
    start, size = _blocks(expert, T, n, D)
    origin = start // ALIGN * ALIGN
    width = (start + size + ALIGN - 1) // ALIGN * ALIGN - origin
    inside = (within[None, :] < width[:, None]) & (expert < n)[:, None]
    x = tl.load(hidden_row + origin[:, None] + within[None, :], mask=inside, other=0.0).to(tl.float32)
    if D % n != 0 or (D // n) % ALIGN != 0:
        place = (within[None, :] - (start - origin)[:, None]).to(tl.uint32, bitcast=True)
        x = tl.where(place < size.to(tl.uint32, bitcast=True)[:, None], x, 0.0)
    square = 0.0
    if NORM:
        square = tl.sum(x * x)
    return tl.sum(x, axis=1), square


@triton.jit(do_not_specialize=["T", "SPAN", "STRIDE"])
def gate_kernel(
    hidden,
    bias,
    noise,
    counted,
    logits,
    weights,
    index,
    norm,
    partials,
    counts,
    T,
    SPAN,
    STRIDE,
    n: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    COSINE: tl.constexpr,
    RELU: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NOISY: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOWS: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    N_PAD: tl.constexpr,
):
    """
    SPAN tokens one after the other, by one warp where its registers suffice: reductions over experts then stay inside it,
    and the sums of statistics over tokens in its registers until the end.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, N_PAD)
    is_expert = expert < n
    slots = tl.arange(0, K_PAD)
    is_slot = slots < TOP_K
    lowest: tl.constexpr = -(2**31)
    _, size = _blocks(expert, T, n, D)
    # quotients once an expert or a token, products for all pairs
    of_size = 1 / size.to(tl.float32)
    of_root = 1 / tl.sqrt(size.to(tl.float32))
    if TOP_K > 0:
        shift = tl.load(bias + expert, mask=is_expert, other=0.0)
    if STATS:
        probabilities = tl.zeros((N_PAD,), tl.float32)
        tokens = tl.zeros((N_PAD,), tl.float32)
        entropies = tl.zeros((N_PAD,), tl.float32)
        cosine_sums = tl.zeros((N_PAD,), tl.float32)
        num_counted = 0.0
        num_sampled = 0.0
    first_token = program * SPAN
    for step in range(tl.minimum(SPAN, T - first_token)):
        token = first_token.to(tl.int64) + step
        place = token * n + expert
        square = 0.0
        # sums of few experts at a time meet where the logits go
        for window in tl.static_range(WINDOWS):
            of_window, square_of_window = _window_sums(
                hidden + token * D, window, T, n, D, WINDOW, SIZE_PAD, ALIGN, COSINE or STATS
            )
            in_window = window * WINDOW + tl.arange(0, WINDOW)
            tl.store(logits + token * n + in_window, of_window, mask=in_window < n)
            square += square_of_window
        tl.debug_barrier()
        total = tl.load(logits + place, mask=is_expert, other=0.0)
        # threads may hold copies of one element: none may write before all have read
        tl.debug_barrier()
        if COSINE or STATS:
            # a token of zeros has the cosines 0
            length = tl.sqrt(tl.where(square == 0, 1.0, square))
            cosines = total * of_root * (1 / length)
        if COSINE:
            tl.store(norm + token, length)
            affinity = cosines * D**0.5
        else:
            affinity = total * of_size
        if NOISY:
            affinity += tl.load(noise + place, mask=is_expert, other=0.0)
        value = affinity
        if RELU:
            value = tl.where(affinity < 0, 0.0, affinity)
        tl.store(logits + place, value, mask=is_expert)

        if TOP_K > 0:
            preference = tl.where(is_expert, sortable(affinity + shift), lowest)
            picked = tl.zeros((K_PAD,), tl.int32)
            first = 0
            for slot in tl.static_range(TOP_K):
                best = tl.min(tl.where(preference == tl.max(preference, axis=0), expert, N_PAD), axis=0)
                if slot == 0:
                    first = best
                picked = tl.where(slots == slot, best, picked)
                preference = tl.where(expert == best, lowest, preference)

            value = tl.where(is_expert, value, float("-inf"))
            greatest = tl.max(value, axis=0)
            value -= greatest
            exponential = tl.exp(value)
            denominator = tl.sum(exponential, axis=0)
            tl.store(index + token * TOP_K + slots, picked.to(tl.int64), mask=is_slot)
            # the chosen experts' logits once more, k together
            tl.debug_barrier()
            picked_logits = tl.load(logits + token * n + picked, mask=is_slot, other=float("-inf"))
            weight = tl.exp(picked_logits - greatest) / denominator
            if NORMALIZE:
                weight /= tl.maximum(tl.sum(weight, axis=0), 1.1754943508222875e-38)
            tl.store(weights + token * TOP_K + slots, weight, mask=is_slot)

            if STATS:
                count = 1.0
                if MASKED:
                    count = tl.load(counted + token).to(tl.float32)
                sampled = tl.where((first_token + step) % STRIDE == 0, count, 0.0)
                probability = exponential * (1 / denominator)
                surprise = tl.where(probability > 0, probability * (tl.log(denominator) - value), 0.0)
                entropy = tl.sum(surprise, axis=0)
                is_first = expert == first
                probabilities += probability * count
                # what was chosen is the lowest now
                tokens += tl.where((preference == lowest) & is_expert, count, 0.0)
                entropies += tl.where(is_first, entropy * count, 0.0)
                cosine_sums += tl.where(is_first, cosines * sampled, 0.0)
                num_counted += count
                num_sampled += sampled
    if STATS:
        out = partials + program * 4 * n + expert
        tl.store(out, probabilities, mask=is_expert)
        tl.store(out + n, tokens, mask=is_expert)
        tl.store(out + 2 * n, entropies, mask=is_expert)
        tl.store(out + 3 * n, cosine_sums, mask=is_expert)
        tl.store(counts + program * 2, num_counted)
        tl.store(counts + program * 2 + 1, num_sampled)


@triton.jit(do_not_specialize=["P", "C"])
def add_partials_kernel(partials, counts, stats, P, C, n: tl.constexpr, PARTS: tl.constexpr, EXPERTS: tl.constexpr):
    """
    One row of the statistics, a few experts; `RouterStat` names the rows, those not summed here are 0. C is the capacity, or
    less than 0.
    """
    row = tl.program_id(0)
    # drops follow from the assignments
    source = tl.where(row < 2, row, tl.where(row == 2, 1, row - 2))
    num_parts = tl.where((row < 2) | ((row == 2) & (C >= 0)) | (row == 4) | (row == 5), P, 0)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    mask = expert < n
    total = tl.zeros((PARTS, EXPERTS), tl.float32)
    num_counted = tl.zeros((PARTS,), tl.float32)
    num_sampled = tl.zeros((PARTS,), tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = part[:, None] * 4 * n + source * n + expert[None, :]
        total += tl.load(partials + place, mask=(part < P)[:, None] & mask[None, :], other=0.0)
        if row == 5:
            num_counted += tl.load(counts + part * 2, mask=part < P, other=0.0)
            num_sampled += tl.load(counts + part * 2 + 1, mask=part < P, other=0.0)
    value = tl.sum(total, axis=0)
    if row == 2:
        value = tl.where(C >= 0, tl.maximum(value - C, 0.0), 0.0)
    if row == 5:  # cosines of a sample of the tokens, for all of them
        value *= tl.sum(num_counted, axis=0) / tl.maximum(tl.sum(num_sampled, axis=0), 1.0)
    tl.store(stats + row * n + expert, value, mask=mask)


@triton.jit
def _spread_slopes(
    slopes,
    radial,
    hidden,
    grad_hidden,
    T,
    first_token,
    n: tl.constexpr,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """
    The gradient of a chunk of tokens: each dimension has its expert's slope, and for cosines what the norm takes off. WIDTH
    dimensions that are stored together are one expert's or two neighbours'.
    """
    for step in range(CHUNK // TOKENS):
        token = first_token + step * TOKENS + tl.arange(0, TOKENS)
        exists = (token < T)[:, None]
        if COSINE:
            along = tl.load(radial + token, mask=token < T, other=0.0)[:, None, None]
        for start in range(0, D // WIDTH, VECTORS):
            vector = start + tl.arange(0, VECTORS)
            dim = vector[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            mask = exists & (vector < D // WIDTH)[None, :]
            expert = (((vector + _unknown_zero(T)) * WIDTH + 1) * n - 1) // D
            of_expert = slopes + token[:, None] * n + expert[None, :]
            slope = tl.load(of_expert, mask=mask, other=0.0)[:, :, None]
            if WIDTH > 1 and (D % n != 0 or (D // n) % WIDTH != 0):
                next_slope = tl.load(of_expert + 1, mask=mask & (expert + 1 < n)[None, :], other=0.0)[:, :, None]
                slope = tl.where((dim < ((expert + 1) * D // n)[:, None])[None], slope, next_slope)
            place = token[:, None, None] * D + dim[None]
            if COSINE:
                x = tl.load(hidden + place, mask=mask[:, :, None], other=0.0).to(tl.float32)
                slope = slope - x * along
            else:
                slope = slope + tl.zeros((TOKENS, VECTORS, WIDTH), tl.float32)
            tl.store(grad_hidden + place, slope.to(grad_hidden.dtype.element_ty), mask=mask[:, :, None])


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    grad_logits,
    grad_weights,
    grad_stats,
    hidden,
    noise,
    counted,
    logits,
    index,
    norm,
    slopes,
    radial,
    grad_hidden,
    T,
    n: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    COSINE: tl.constexpr,
    RELU: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NOISY: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    FROM_STATS: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    N_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    first_token = tl.program_id(0).to(tl.int64) * CHUNK
    token = first_token + tl.arange(0, CHUNK)
    exists = token < T
    expert = tl.arange(0, N_PAD)
    place = token[:, None] * n + expert[None, :]
    inside = exists[:, None] & (expert < n)[None, :]
    value = tl.load(logits + place, mask=inside, other=0.0)
    slope = tl.zeros((CHUNK, N_PAD), tl.float32)
    if FROM_WEIGHTS or FROM_STATS:
        exponential = tl.where(
            inside, tl.exp(value - tl.max(tl.where(inside, value, float("-inf")), axis=1)[:, None]), 0.0
        )
        # a row past the last token has no expert
        probability = exponential * (1 / tl.maximum(tl.sum(exponential, axis=1), 1e-30))[:, None]
        if FROM_WEIGHTS:
            share = tl.full((CHUNK,), 1.0, tl.float32)
            if NORMALIZE:
                share = tl.zeros((CHUNK,), tl.float32)
                mean = tl.zeros((CHUNK,), tl.float32)
                for slot in tl.static_range(TOP_K):
                    picked = tl.load(index + token * TOP_K + slot, mask=exists, other=0)
                    weight = tl.sum(tl.where(expert[None, :] == picked[:, None], probability, 0.0), axis=1)
                    mean += weight * tl.load(grad_weights + token * TOP_K + slot, mask=exists, other=0.0)
                    share += weight
                share = tl.maximum(share, 1.1754943508222875e-38)
                mean /= share
            for slot in tl.static_range(TOP_K):
                picked = tl.load(index + token * TOP_K + slot, mask=exists, other=0)
                grad = tl.load(grad_weights + token * TOP_K + slot, mask=exists, other=0.0)
                if NORMALIZE:
                    grad = (grad - mean) / share
                slope += tl.where(expert[None, :] == picked[:, None], grad[:, None], 0.0)
        if FROM_STATS:
            # of the rows of statistics, the first alone carries a gradient
            row = tl.load(grad_stats + expert, mask=expert < n, other=0.0)[None, :]
            if MASKED:
                row = row * tl.load(counted + token, mask=exists, other=0).to(tl.float32)[:, None]
            slope += row
        slope = probability * (slope - tl.sum(probability * slope, axis=1)[:, None])
    if FROM_LOGITS:
        slope += tl.load(grad_logits + place, mask=inside, other=0.0)
    if RELU:
        slope = tl.where(value > 0, slope, 0.0)
    _, size = _blocks(expert, T, n, D)
    if COSINE:
        length = tl.load(norm + token, mask=exists, other=1.0)
        if NOISY:
            value -= tl.load(noise + place, mask=inside, other=0.0)
        # where the ReLU changed the value, the slope is 0
        tl.store(radial + token, tl.sum(slope * value, axis=1) / (length * length), mask=exists)
        slope = slope * (1 / tl.sqrt(size.to(tl.float32)))[None, :] * (D**0.5 / length)[:, None]
    else:
        slope = slope * (1 / size.to(tl.float32))[None, :]
    tl.store(slopes + place, slope, mask=inside)
    tl.debug_barrier()

    _spread_slopes(slopes, radial, hidden, grad_hidden, T, first_token, n, D, COSINE, CHUNK, TOKENS, VECTORS, WIDTH)


__all__ = ["add_partials_kernel", "gate_kernel", "route_backward_kernel"]
