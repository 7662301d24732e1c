# SPDX-License-Identifier: Apache-2.0
"""The paper's figures from a run, each a matplotlib `Figure`; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..moe.capacity import min_expert_capacity
from .probe import HISTOGRAM_BINS, Probe
from .run import ReportError, Run


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#22272e", "#68707c", "#e3e6ea"
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d9792b", "#3f8f5f", "#b5433c"
LINES = (BLUE, ORANGE, GREEN, RED, "#7a5aa6", "#8a6d4f", "#4d9db4", "#c2629b")


PARTS_OF_A_STEP = {"computation": BLUE, "overlap": GREEN, "communication": ORANGE, "idle": MUTED}
LARGEST_CAPACITY = 1e9  # tokens; the bound grows explosively, and no batch is larger
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


def _drawn(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the report's style, whatever the user's matplotlib settings are, and leaves those alone."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise ReportError("Figures need matplotlib, which is missing: `pip install hf-locmoe[report]`.") from error
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return drawn


def _figure(columns: int = 1, rows: int = 1, width: float = 7.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """An empty figure, and its axes in reading order. Not pyplot's: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@_drawn
def capacity_against_angle(facts: dict[str, Any], cosines: dict[int, float]) -> Figure:
    """
    Figure 6: the lower bound of the expert capacity against the angle of token and gate weight.

    Args:
        facts (`dict`): `hidden_size` and `num_experts`.
        cosines (`dict[int, float]`): The measured mean cosine of each layer; may be empty.
    """
    hidden_size, num_experts = facts["hidden_size"], facts["num_experts"]
    bound = functools.partial(min_expert_capacity, hidden_size=hidden_size, num_experts=num_experts)
    measured = {layer: min(max(cosine, 0.0), 1.0) for layer, cosine in cosines.items()}
    measured = {layer: cosine for layer, cosine in measured.items() if bound(cosine) <= LARGEST_CAPACITY}
    largest = min(max([4 / math.sqrt(hidden_size), *(1.25 * cosine for cosine in measured.values())]), 1.0)
    cosine = torch.linspace(0, largest, 400, dtype=torch.float64)
    cosine = cosine[bound(cosine) <= LARGEST_CAPACITY]
    figure, (axes,) = _figure()
    for form, label, color, style in (
        ("exact", r"exact, $1/(n\,p_\delta)$", BLUE, "-"),
        ("erfc", "erfc form", ORANGE, "--"),
        ("exp", "exponential lower bound", MUTED, ":"),
    ):
        heights = min_expert_capacity(cosine, hidden_size, num_experts, form)
        axes.plot(_degrees(cosine), heights, label=label, color=color, linestyle=style)
    if measured:
        x, heights = _degrees(torch.tensor(list(measured.values()))), bound(torch.tensor(list(measured.values())))
        axes.plot(x, heights, "o", color=RED, markersize=5, zorder=4, label="measured, one point a layer")
        extremes = min(measured.values()), max(measured.values())
        for (layer, value), at, height in zip(measured.items(), x.tolist(), heights.tolist()):
            if value in extremes:  # on either side of the curve, where they do not meet
                offset, side = ((5, 5), "left") if value == extremes[0] else ((-5, -11), "right")
                axes.annotate(
                    f"layer {layer}", (at, height), offset, textcoords="offset points", ha=side, fontsize=8, color=RED
                )
    axes.set_yscale("log")
    axes.set_xlabel("angle between token and gate weight, degrees")
    axes.set_ylabel("least capacity, tokens per expert")
    axes.set_title(f"hidden size {hidden_size}, {num_experts} experts")
    axes.legend()
    return figure


@_drawn
def token_similarity(probe: Probe) -> Figure:
    """Figure 8: cosine similarity of tokens of the same expert and of different experts."""
    figure, (by_layer, histogram) = _figure(columns=2)
    layers = [layer.layer for layer in probe.layers]
    for name, color in (("same", BLUE), ("different", ORANGE)):
        means = [getattr(layer, f"{name}_mean") for layer in probe.layers]
        by_layer.plot(layers, means, "o-", color=color, markersize=4, label=f"{name} expert")
    by_layer.set_xticks(layers)
    by_layer.set_xlabel("layer")
    by_layer.set_ylabel("mean cosine of two tokens")
    by_layer.set_title("mean over pairs")
    by_layer.legend()

    gaps = {layer.same_mean - layer.different_mean: layer for layer in probe.layers}
    gaps = {gap: layer for gap, layer in gaps.items() if math.isfinite(gap)}
    if gaps:
        widest = gaps[max(gaps)]
        edges = torch.linspace(-1, 1, HISTOGRAM_BINS + 1).numpy()
        used = torch.nonzero(widest.same + widest.different).flatten()
        for name, color in (("same", BLUE), ("different", ORANGE)):
            counts = getattr(widest, name)
            density = (counts / counts.sum().clamp_min(1) / (2 / HISTOGRAM_BINS)).numpy()
            histogram.stairs(density, edges, color=color, fill=True, alpha=0.35)
            histogram.stairs(density, edges, color=color, linewidth=1.2, label=f"{name} expert")
        if used.numel():
            histogram.set_xlim(edges[used[0]] - 0.02, edges[used[-1] + 1] + 0.02)
        histogram.set_title(f"layer {widest.layer}, where the two differ most")
    histogram.set_xlabel("cosine of two tokens")
    histogram.set_ylabel("density of pairs")
    histogram.margins(y=0.18)
    histogram.legend(ncols=2, loc="upper left")
    return figure


@_drawn
def gate_similarity(probe: Probe) -> Figure:
    """Figure 9: cosine between tokens and gate weights."""
    figure, (matrix, histogram) = _figure(columns=2, height=3.7)
    shown = probe.layers[len(probe.layers) // 2]
    limit = torch.nan_to_num(shown.by_expert).abs().max().clamp_min(1e-6).item()
    image = matrix.imshow(shown.by_expert.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    matrix.grid(False)
    matrix.set_xlabel("gate weight of expert")
    matrix.set_ylabel("tokens sent to expert")
    matrix.set_title(f"mean cosine, layer {shown.layer}")
    figure.colorbar(image, ax=matrix, shrink=0.85)

    chosen = torch.cat([layer.chosen for layer in probe.layers])
    others = torch.cat([layer.others for layer in probe.layers])
    low, high = torch.cat([chosen, others]).aminmax()
    for values, color, label in ((chosen, BLUE, "expert chosen"), (others, ORANGE, "other experts")):
        if values.numel():
            counts = torch.histc(values, bins=60, min=low.item(), max=high.item())
            density = (counts / counts.sum() / ((high - low).clamp_min(1e-9) / 60)).numpy()
            edges = torch.linspace(low.item(), high.item(), 61).numpy()
            histogram.stairs(density, edges, color=color, fill=True, alpha=0.35)
            histogram.stairs(density, edges, color=color, linewidth=1.2, label=label)
            histogram.axvline(values.mean().item(), color=color, linewidth=1, linestyle="--")
    histogram.set_xlabel("cosine of token and gate weight")
    histogram.set_ylabel("density")
    histogram.set_title("all layers; dashed: means")
    histogram.margins(y=0.22)
    histogram.legend(ncols=2, loc="upper left")
    return figure


@_drawn
def tokens_per_expert(run: Run) -> Figure:
    """Figure 12: the share of the tokens that each expert gets, over training."""
    records = run.training
    layers = [layer["layer"] for layer in records[0]["layers"]]
    num_experts = len(records[0]["layers"][0]["load"])
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    width = 3.2 + 1.9 * min(columns, 3) if columns > 1 else 5.6
    figure, axes = _figure(columns, rows, width=width, height=0.5 + 2.2 * rows)
    steps = [record["step"] for record in records]
    colors = _expert_colors(num_experts)
    largest = max(max(layer["load"]) for record in records for layer in record["layers"])
    for place, (layer, panel) in enumerate(zip(layers, axes)):
        for expert in range(num_experts):
            shares = [record["layers"][place]["load"][expert] for record in records]
            panel.plot(steps, shares, color=colors[expert], linewidth=1.1, marker="." if len(steps) < 3 else None)
        panel.axhline(1 / num_experts, color=INK, linewidth=0.9, linestyle="--")
        panel.set_ylim(0, 1.05 * largest)
        panel.set_title(f"layer {layer}")
        if place >= len(layers) - columns:
            panel.set_xlabel("step")
        if place % columns == 0:
            panel.set_ylabel("share of tokens")
        else:
            panel.tick_params(labelleft=False)
    for panel in axes[len(layers) :]:
        panel.set_visible(False)
    return figure


@_drawn
def validation_perplexity(runs: list[Run]) -> Figure:
    """Figure 13: validation perplexity over training, of one run or several."""
    figure, (axes,) = _figure()
    values: list[float] = []
    for index, run in enumerate(runs):
        if run.perplexities:
            steps, perplexities = zip(*run.perplexities, strict=True)
            values.extend(perplexities)
            axes.plot(steps, perplexities, "o-", color=LINES[index % len(LINES)], markersize=3.5, label=run.name)
    if max(values) > 3 * min(values):
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_ylabel("validation perplexity")
    if len(runs) > 1:
        axes.legend()
    return figure


@_drawn
def local_share(runs: list[Run]) -> Figure:
    """The share of the assignments that stay on their node, over training, of one run or several."""
    figure, (axes,) = _figure()
    for index, run in enumerate(runs):
        steps, shares = zip(*run.local_shares, strict=True)
        axes.plot(steps, shares, "o-", color=LINES[index % len(LINES)], markersize=3.5, label=run.name)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step")
    axes.set_ylabel("node-local share")
    if len(runs) > 1:
        axes.legend()
    return figure


@_drawn
def step_composition(runs: list[Run], as_shares: bool) -> Figure:
    """
    Figures 10 and 11: what the time of a step is made of.

    Args:
        runs (`list[Run]`): Those whose log has it.
        as_shares (`bool`): Shares of the step (figure 11) or seconds (figure 10).
    """
    figure, (axes,) = _figure(height=1.3 + 0.42 * len(runs))
    names = [run.name for run in runs]
    totals = [sum(run.step_parts.values()) if as_shares else 1.0 for run in runs]
    left = [0.0] * len(runs)
    for part, color in PARTS_OF_A_STEP.items():
        widths = [run.step_parts[part] / total for run, total in zip(runs, totals, strict=True)]
        axes.barh(names, widths, left=left, height=0.62, color=color, label=part)
        if as_shares:
            for place, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width >= 0.06:
                    axes.text(start + width / 2, place, f"{width:.0%}", ha="center", va="center", color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of an optimizer step" if as_shares else "seconds of an optimizer step")
    if as_shares:
        axes.set_xlim(0, 1)
    axes.legend(ncols=len(PARTS_OF_A_STEP), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _degrees(cosine: torch.Tensor) -> torch.Tensor:
    return torch.rad2deg(torch.acos(cosine))


def _expert_colors(num_experts: int) -> list:
    if num_experts <= len(LINES):
        return list(LINES[:num_experts])
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * expert / (num_experts - 1)) for expert in range(num_experts)]


__all__ = [
    "capacity_against_angle",
    "gate_similarity",
    "local_share",
    "step_composition",
    "token_similarity",
    "tokens_per_expert",
    "validation_perplexity",
]
