# SPDX-License-Identifier: Apache-2.0
r"""The capacity theorem of LocMoE (arXiv 2401.13920, section 3.3) and the capacity rules made of it.

Legend: T = tokens of a batch, n = `num_experts`, k = `num_experts_per_tok`, d = `hidden_size`. The theorem's functions
are vectorised over the cosine, compute in float64 on the host and carry no gradient. The rules return plain integers,
tokens per expert; none exceeds T, because a token reaches an expert at most once.
"""

import math

import torch


CRITICAL_CONFIDENCE_FACTOR = math.log(100)
"""About 4.6. Where `min_expert_capacity` tokens hold one class-discriminative token *on average*, this many times more
hold at least one with 99 % probability: `(1 - p) ** (ln(100) / p) <= 0.01`."""

CAPACITY_MULTIPLE = 8
"""A capacity fitted to the measured loads is rounded up to it: tile-friendly, and stable from refresh to refresh."""

MIN_FITTED_FACTOR, MAX_FITTED_FACTOR = 1.0, 2.0
"""The range of the capacity factor that `capacity_for_drop_rate` may choose."""

_MAX_FRACTION_TERMS = 1_000  # about 60 are needed on this side of the symmetry point, whatever d


def tail_probability(cos_angle: torch.Tensor | float, hidden_size: int) -> torch.Tensor:
    r"""
    Probability that a token, uniform on the unit sphere, makes a cosine of at least `cos_angle` with a gate weight.

    Exact `p_delta` of LocMoE, arXiv 2401.13920, Lemma 3, eq. 8: \\(p_\delta = 1 - I_{\delta^2}(1/2, (d-1)/2)\\). As in
    the paper it counts **both** caps, `|cos| >= cos_angle`; the one-sided probability is half of it. Accurate to about
    1e-12 relative in the far tail too, down to the smallest float64.

    Args:
        cos_angle (`torch.Tensor` or `float`): The paper's delta, any shape, any dtype, every value in [0, 1].
        hidden_size (`int`): d, at least 2.

    Returns:
        `torch.Tensor`: float64 on the CPU, the shape of `cos_angle`, values in [0, 1].

    Raises:
        ValueError: A cosine outside [0, 1] or not finite, or `hidden_size` below 2.
    """
    return _log_tail_probability(_checked_cosine(cos_angle), _checked_hidden_size(hidden_size)).exp()


def min_expert_capacity(
    cos_angle: torch.Tensor | float, hidden_size: int, num_experts: int, form: str = "exact"
) -> torch.Tensor:
    r"""
    The least number of tokens with which one class-discriminative token is expected to reach an expert.

    LocMoE, arXiv 2401.13920, Theorem 1, eq. 9. It grows explosively with `cos_angle` (d = 4096, n = 16: 46 tokens at
    0.05, 8,600 at 0.07), so which cosine is taken, a mean or a quantile, decides the result, and a run has to
    clamp it: see [`critical_capacity`]. A one-sided reading of "belongs to" doubles it (see [`tail_probability`]).

    Args:
        cos_angle (`torch.Tensor` or `float`): The paper's delta, any shape, every value in [0, 1].
        hidden_size (`int`): d, at least 2.
        num_experts (`int`): n, at least 1.
        form (`str`, *optional*, defaults to `"exact"`):
            - `"exact"`: `1 / (n * p_delta)`.
            - `"erfc"`: the paper's large-d form, \\(1 / (n\,\mathrm{erfc}\sqrt{\delta^2 d / (2 - \delta^2)})\\).
              High by at most 1.5 % for d >= 512 and delta <= 3 / sqrt(d), by less than 1 % from d = 768 on; d - 3/2 in
              the place of d would bring it within 0.02 %, but then `"exact"` costs the same.
            - `"exp"`: the paper's lower bound, \\(\exp(\delta^2 d / (2 - \delta^2)) / n\\): 2 to 4 times lower there.

    Returns:
        `torch.Tensor`: float64 on the CPU, the shape of `cos_angle`, in tokens, not rounded; `inf` where the value
        leaves float64 (no batch can be that large).

    Raises:
        ValueError: A value outside its domain, or an unknown `form`.
    """
    cosine, width = _checked_cosine(cos_angle), _checked_hidden_size(hidden_size)
    _check_at_least_one("num_experts", num_experts)
    exponent = cosine.square() * width / (2 - cosine.square())
    if form == "exact":
        log_inverse_probability = -_log_tail_probability(cosine, width)
    elif form == "erfc":  # erfc(x) = erfcx(x) exp(-x^2) keeps the far tail finite
        log_inverse_probability = exponent - torch.special.erfcx(exponent.sqrt()).log()
    elif form == "exp":
        log_inverse_probability = exponent
    else:
        raise ValueError(f"`form` ({form!r}) must be one of 'exact', 'erfc' and 'exp'.")
    return (log_inverse_probability - math.log(num_experts)).exp()


def expert_capacity(
    num_tokens: int, num_experts: int, num_experts_per_tok: int = 1, capacity_factor: float = 1.0
) -> int:
    """
    The usual rule, `ceil(T * k * capacity_factor / n)`, but at most T.

    LocMoE, arXiv 2401.13920, section 3.3 writes `ceil(batch_tokens * capacity_factor / (ep * n))` with n experts a
    rank; here `num_experts` counts all of them, as everywhere in this package. Integer arithmetic on millionths of the
    factor, so that 1.1 times 1,000 tokens is 1,100 and not 1,101, and so that a symbolic T of `torch.compile` passes.

    Args:
        num_tokens (`int`): T, over every rank that sends to the expert; 0 gives 0.
        num_experts (`int`): n.
        num_experts_per_tok (`int`, *optional*, defaults to 1): k.
        capacity_factor (`float`, *optional*, defaults to 1.0): 1.0 is the mean load; above 0.

    Returns:
        `int`: Tokens per expert.

    Raises:
        ValueError: A value outside its domain.
    """
    _check_batch(num_tokens, num_experts, num_experts_per_tok)
    if not 0 < capacity_factor < math.inf:
        raise ValueError(
            f"`capacity_factor` ({capacity_factor}) must be a finite number above 0: 1.0 is the mean load of an"
            " expert, 1.25 leaves a quarter of room."
        )
    millionths = max(1, round(capacity_factor * 1_000_000))
    return min(num_tokens, -(-num_tokens * num_experts_per_tok * millionths // (num_experts * 1_000_000)))


def effective_capacity_factor(
    expert_capacity: int, num_tokens: int, num_experts: int, num_experts_per_tok: int = 1
) -> float:
    """
    The capacity factor that a capacity amounts to, `n * expert_capacity / (T * k)`: [`expert_capacity`] inverted.

    Args:
        expert_capacity (`int`): Tokens per expert.
        num_tokens (`int`): T, at least 1.
        num_experts (`int`): n.
        num_experts_per_tok (`int`, *optional*, defaults to 1): k.

    Returns:
        `float`: 1.0 where every expert has room for exactly the mean load.

    Raises:
        ValueError: A value outside its domain.
    """
    _check_batch(num_tokens, num_experts, num_experts_per_tok)
    _check_at_least_one("num_tokens", num_tokens)
    return num_experts * expert_capacity / (num_tokens * num_experts_per_tok)


def capacity_for_drop_rate(
    load_shares: torch.Tensor, num_tokens: int, drop_rate: float, num_experts_per_tok: int = 1
) -> int:
    r"""
    The capacity at which a batch with the given mean loads drops about `drop_rate` of its assignments.

    Not in the paper. With A = T * k assignments, `C_tau` is the least C with
    \\(\sum_e \max(0, f_e A - C) \le \tau A\\); it gets the margin \\(1 + 2\sqrt{(n - 1) / A}\\), two standard
    deviations of a balanced expert's load in one batch, then its factor is clamped to [1, 2], then it is rounded up to
    a multiple of 8, so that shapes seldom change from one refresh to the next.

    Args:
        load_shares (`torch.Tensor`): Shape (n,), any float dtype: a running mean of each expert's share of the
            assignments over all ranks; not negative, summing to 1.
        num_tokens (`int`): T of the batches to come, over every rank that sends to the experts.
        drop_rate (`float`): tau, in [0, 1).
        num_experts_per_tok (`int`, *optional*, defaults to 1): k.

    Returns:
        `int`: Tokens per expert, at most T.

    Raises:
        ValueError: A value outside its domain.
    """
    shares = torch.as_tensor(load_shares).detach().cpu().double()
    if shares.dim() != 1:
        raise ValueError(f"`load_shares` must have the shape (num_experts,), it has {tuple(shares.shape)}.")
    _check_batch(num_tokens, shares.numel(), num_experts_per_tok)
    if not 0 <= drop_rate < 1:
        raise ValueError(f"`drop_rate` ({drop_rate}) must lie in [0, 1): 0.01 lets one assignment of a hundred go.")
    if not (bool((shares >= 0).all()) and abs(shares.sum().item() - 1) <= 1e-3):  # also false for NaN and inf
        raise ValueError(
            f"`load_shares` must be at least 0 and sum to 1, they span {shares.min().item():g} to"
            f" {shares.max().item():g} and sum to {shares.sum().item():g}: divide the counts by their total."
        )
    if num_tokens == 0:
        return 0
    assignments = num_tokens * num_experts_per_tok
    # The overflow is convex in C and equals its bound S_m - m C at the right m, S_m being the sum of the m greatest
    # loads, so the least admissible C is the greatest of the bounds' roots.
    num_overflowing = torch.arange(1, shares.numel() + 1, dtype=torch.float64)
    share_sums = shares.sort(descending=True).values.cumsum(dim=0)
    fitted_share = ((share_sums - drop_rate) / num_overflowing).max().item()
    margin = 1 + 2 * math.sqrt((shares.numel() - 1) / assignments)
    factor = min(max(shares.numel() * fitted_share * margin, MIN_FITTED_FACTOR), MAX_FITTED_FACTOR)
    capacity = expert_capacity(num_tokens, shares.numel(), num_experts_per_tok, factor)
    return min(num_tokens, math.ceil(capacity / CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE)


def critical_capacity(
    min_capacity: torch.Tensor | float, num_tokens: int, num_experts: int, num_experts_per_tok: int = 1
) -> int:
    """
    The capacity of `capacity_mode="critical"`: `min(T, max(ceil(ln(100) * min_capacity), ceil(T * k / n)))`.

    The bound of Theorem 1 is a floor of one discriminative token *on average*; times
    [`CRITICAL_CONFIDENCE_FACTOR`] it is one with 99 % probability. We differ from the paper, which uses the bound
    alone: less than the mean load `ceil(T * k / n)` would drop tokens from a perfectly balanced batch, and more than T
    no expert can get.

    Args:
        min_capacity (`torch.Tensor` or `float`): One value of [`min_expert_capacity`], in tokens; may be `inf`.
        num_tokens (`int`): T, over every rank that sends to the expert; 0 gives 0.
        num_experts (`int`): n.
        num_experts_per_tok (`int`, *optional*, defaults to 1): k.

    Returns:
        `int`: Tokens per expert.

    Raises:
        ValueError: A value outside its domain.
    """
    _check_batch(num_tokens, num_experts, num_experts_per_tok)
    floor = CRITICAL_CONFIDENCE_FACTOR * float(min_capacity)
    if not floor >= 0:  # also true for NaN
        raise ValueError(f"`min_capacity` ({float(min_capacity)}) must be a number of tokens, at least 0.")
    if floor >= num_tokens:
        return num_tokens
    return min(num_tokens, max(math.ceil(floor), -(-num_tokens * num_experts_per_tok // num_experts)))


def _log_tail_probability(cosine: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """log p_delta, float64: `log I_{1 - delta^2}((d-1)/2, 1/2)`, from whichever continued fraction converges fast."""
    a, b, x = 0.5, (hidden_size - 1) / 2, cosine.square()
    log_front = b * torch.log1p(-x) + a * x.log() - _log_beta_half(b)
    in_body = x < (a + 1) / (a + b + 2)
    # In the body p_delta is above 0.08, where one minus the complement loses no digits; the tail is computed directly.
    log_body = torch.log1p(-(log_front + _log_beta_fraction(a, b, torch.where(in_body, x, 0.0))).exp() / a)
    tail_x = torch.where(in_body, 0.0, (1 - cosine) * (1 + cosine))
    log_tail = log_front + _log_beta_fraction(b, a, tail_x) - math.log(b)
    return torch.where(in_body, log_body, log_tail)


def _log_beta_half(b: float) -> float:
    """log B(1/2, b). Large b takes the asymptotic series of the gamma ratio: the difference of two lgammas cancels."""
    if b < 30:
        log_ratio = math.lgamma(b + 0.5) - math.lgamma(b)
    else:
        log_ratio = 0.5 * math.log(b) - 1 / (8 * b) + 1 / (192 * b**3) - 1 / (640 * b**5) + 17 / (14336 * b**7)
    return 0.5 * math.log(math.pi) - log_ratio


def _log_beta_fraction(a: float, b: float, x: torch.Tensor) -> torch.Tensor:
    """Log of the continued fraction of the incomplete beta function (DLMF 8.17.22), by the modified Lentz method."""
    tiny, epsilon = torch.finfo(torch.float64).tiny, torch.finfo(torch.float64).eps

    def away_from_zero(value: torch.Tensor) -> torch.Tensor:
        return torch.where(value.abs() < tiny, tiny, value)

    numerator = torch.ones_like(x)
    inverse_denominator = 1 / away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = inverse_denominator
    converged = torch.zeros_like(x, dtype=torch.bool)
    for m in range(1, _MAX_FRACTION_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            inverse_denominator = 1 / away_from_zero(1 + coefficient * inverse_denominator)
            numerator = away_from_zero(1 + coefficient / numerator)
            step = numerator * inverse_denominator
            fraction = fraction * step
        # Kept per element: far behind its own convergence an element still jitters by a few units in the last place.
        converged = converged | ((step - 1).abs() <= 4 * epsilon)
        if bool(converged.all()):
            return fraction.log()
    raise RuntimeError(f"The incomplete beta function did not converge at a = {a}, b = {b}.")


def _checked_cosine(cos_angle: torch.Tensor | float) -> torch.Tensor:
    cosine = torch.as_tensor(cos_angle).detach().cpu().double()
    if not bool(((cosine >= 0) & (cosine <= 1)).all()):  # also false for NaN
        raise ValueError(
            f"`cos_angle` must lie in [0, 1], it spans {cosine.min().item():g} to {cosine.max().item():g}: clamp"
            " measured cosines with `cosines.clamp(0, 1)`."
        )
    return cosine


def _checked_hidden_size(hidden_size: int) -> int:
    if hidden_size < 2:
        raise ValueError(f"`hidden_size` ({hidden_size}) must be at least 2: on a line there is no angle.")
    return hidden_size


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` ({value}) must be at least 1.")


def _check_batch(num_tokens: int, num_experts: int, num_experts_per_tok: int) -> None:
    if num_tokens < 0:
        raise ValueError(f"`num_tokens` ({num_tokens}) must not be negative.")
    _check_at_least_one("num_experts", num_experts)
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(
            f"`num_experts_per_tok` ({num_experts_per_tok}) must lie between 1 and `num_experts` ({num_experts})."
        )
