# SPDX-License-Identifier: Apache-2.0
"""Which plan is fastest for how many bytes: a latency and a rate per plan, measured once, alike on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


# Bytes that a rank sends in one measured exchange: small enough for the latency, large enough for the rate.
MEASURED_BYTES = (1 << 14, 1 << 20)
MEASUREMENTS = 7
# Another plan has to be worth it: its slowest time is held against this share of flat's fastest.
REQUIRED_GAIN = 0.9


@dataclass(frozen=True)
class PlanCost:
    """
    `alpha + beta * bytes`, the usual model of a message.

    Args:
        alpha_s (`float`): seconds for an empty exchange.
        beta_s_per_byte (`float`): seconds for every byte that a rank sends.
    """

    alpha_s: float
    beta_s_per_byte: float

    @classmethod
    def fit(cls, seconds: Mapping[int, float]) -> PlanCost:
        """From the seconds measured at two sizes (bytes -> seconds)."""
        (small, fast), (large, slow) = sorted(seconds.items())
        beta = max((slow - fast) / (large - small), 0.0)
        return cls(max(fast - beta * small, 0.0), beta)

    def seconds(self, num_bytes: int) -> float:
        return self.alpha_s + self.beta_s_per_byte * num_bytes


@dataclass(frozen=True)
class PlanTable:
    """The costs of all plans of a group, by name; `"flat"` is always among them."""

    costs: Mapping[str, PlanCost]

    @classmethod
    def from_seconds(cls, seconds: Mapping[str, Mapping[int, float]]) -> PlanTable:
        return cls({plan: PlanCost.fit(times) for plan, times in seconds.items()})

    def choose(self, num_bytes: int | None) -> str:
        """
        The plan to use.

        Args:
            num_bytes (`int`, *optional*): what every rank sends. `None` where that differs between ranks: then a plan
                is taken only if it is faster at every measured size, as all ranks must come to the same answer.
        """
        sizes = MEASURED_BYTES if num_bytes is None else (num_bytes,)
        flat = self.costs["flat"]
        best, best_gain = "flat", REQUIRED_GAIN
        for plan, cost in sorted(self.costs.items()):
            if plan == "flat":
                continue
            gain = max(cost.seconds(size) / max(flat.seconds(size), 1e-12) for size in sizes)
            if gain < best_gain:
                best, best_gain = plan, gain
        return best

    def to_json(self) -> str:
        return json.dumps({plan: asdict(cost) for plan, cost in self.costs.items()})

    @classmethod
    def from_json(cls, text: str) -> PlanTable:
        return cls({plan: PlanCost(**cost) for plan, cost in json.loads(text).items()})


def measure(plans: tuple[str, ...], run: Callable[[str, int], float]) -> dict[str, dict[int, float]]:
    """
    Seconds of every plan at every size: flat at its fastest, the others at their slowest, so that no disturbance of
    the measurement makes a slower plan the choice. The plans take turns.

    Args:
        run (`Callable`): `run(plan, num_bytes) -> seconds`, one exchange of that many bytes.
    """
    seconds: dict[str, dict[int, float]] = {plan: {} for plan in plans}
    for size in MEASURED_BYTES:
        for plan in plans:
            run(plan, size)
        rounds = [{plan: run(plan, size) for plan in plans} for _ in range(MEASUREMENTS)]
        for plan in plans:
            pick = min if plan == "flat" else max
            seconds[plan][size] = pick(times[plan] for times in rounds)
    return seconds
