# SPDX-License-Identifier: Apache-2.0
"""What the figures hold, read back from their axes."""

from __future__ import annotations

import pytest

from hf_locmoe.report.figures import (
    capacity_against_angle,
    step_composition,
    tokens_per_expert,
    validation_perplexity,
)
from hf_locmoe.report.run import read_run
from tests.unit.report.run_folder import LAYERS, NUM_EXPERTS, TIMES, make_run


def test_figure_12_has_a_line_for_each_expert_of_each_layer(tmp_path):
    figure = tokens_per_expert(read_run(make_run(tmp_path / "run")))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [panel.get_title("left") for panel in panels] == [f"layer {layer}" for layer in LAYERS]
    for panel in panels:
        *experts, equal_share = panel.get_lines()
        assert len(experts) == NUM_EXPERTS
        assert list(experts[0].get_xdata()) == [10, 20, 30]
        assert list(experts[0].get_ydata()) == pytest.approx([4 / 7, 4 / 8, 4 / 9])
        assert set(equal_share.get_ydata()) == {1 / NUM_EXPERTS}


def test_figure_13_has_a_line_for_each_run_that_was_evaluated(tmp_path):
    runs = [read_run(make_run(tmp_path / "one")), read_run(make_run(tmp_path / "two", eval_losses=[9.0, 1.0]))]
    (axes,) = validation_perplexity(runs).axes
    assert [line.get_label() for line in axes.get_lines()] == ["one", "two"]
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([20.0855, 12.1825, 7.38906], rel=1e-4)
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("cosines", [{}, {0: 0.03}, {0: -0.2, 1: 0.1, 2: 1.0}])
def test_figure_6_marks_the_measured_cosines_on_the_exact_curve(cosines):
    (axes,) = capacity_against_angle({"hidden_size": 1024, "num_experts": 16}, cosines).axes
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert len(curves) == 3 + bool(cosines)
    if cosines == {0: 0.03}:
        angle, bound = (values[0] for values in curves["measured, one point a layer"].get_data())
        assert angle == pytest.approx(88.2808, rel=1e-5)
        assert bound == pytest.approx(0.1854, rel=1e-2)  # 1 / (16 p), p = 0.3371 for a normal variable beyond 0.96


def test_figures_10_and_11_stack_up_to_the_step_without_the_first_event(tmp_path):
    run = read_run(make_run(tmp_path / "run", times=TIMES))
    assert run.step_parts == pytest.approx({"computation": 4.0, "overlap": 1.0, "communication": 2.5, "idle": 0.5})
    for as_shares, total in ((False, 8.0), (True, 1.0)):
        (axes,) = step_composition([run], as_shares).axes
        bars = axes.patches
        assert [bar.get_width() for bar in bars] == pytest.approx([total * part / 8 for part in (4.0, 1.0, 2.5, 0.5)])
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(total)


def test_of_a_single_event_the_first_is_taken(tmp_path):
    run = read_run(make_run(tmp_path / "run", eval_losses=[3.0], times=TIMES))
    assert sum(run.step_parts.values()) == pytest.approx(100.0)
