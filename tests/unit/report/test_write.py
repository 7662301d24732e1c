# SPDX-License-Identifier: Apache-2.0
"""The report as a whole: which figures, what the page says and holds, what is missing and why."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest

from hf_locmoe.report import ReportError, write_report
from hf_locmoe.report import probe as probe_module
from hf_locmoe.report.figures import capacity_against_angle, tokens_per_expert, validation_perplexity
from hf_locmoe.report.run import read_run
from tests.unit.report.run_folder import LAYERS, NUM_EXPERTS, make_run, tiny_model


PNG = b"\x89PNG\r\n\x1a\n"
ALL_FIGURES = {
    "fig06_capacity_against_angle.png",
    "fig08_token_similarity.png",
    "fig09_gate_similarity.png",
    "fig12_tokens_per_expert.png",
    "fig13_validation_perplexity.png",
}


@pytest.fixture(autouse=True)
def _small_sample(monkeypatch):
    monkeypatch.setattr(probe_module, "NUM_TOKENS", 64)


class _Page(HTMLParser):
    """Tags that a browser would have to close for us, everything that would be fetched, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src" and value.startswith("data:image/png;base64,"):
                self.images.append(value)
            elif name in ("src", "href"):
                self.fetched.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _page(output_dir) -> _Page:
    html = (output_dir / "routing.html").read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert not re.search(r"url\(|@import|<script|<link", html)
    page = _Page(html)
    assert page.open == []
    assert page.fetched == []
    return page


def test_all_figures_of_one_run(tmp_path):
    folder = make_run(tmp_path / "run")
    tiny_model().save_pretrained(folder)
    files = write_report([folder], tmp_path / "report")
    assert files[0] == tmp_path / "report" / "routing.html"
    assert {path.name for path in files[1:]} == ALL_FIGURES
    assert all(path.read_bytes().startswith(PNG) for path in files[1:])
    page = _page(tmp_path / "report")
    assert len(page.images) == 5
    for number in ("figure 6", "figure 8", "figure 9", "figure 12", "figure 13"):
        assert number in page.text
    assert "7.39" in page.text  # exp(2.0)
    assert "text that the model sampled itself" in page.text


def test_by_default_into_the_runs_folder(tmp_path):
    folder = make_run(tmp_path / "run")
    assert write_report([str(folder)])[0] == folder / "routing.html"


def test_several_runs_are_compared(tmp_path):
    runs = [make_run(tmp_path / name, gate_type=name) for name in ("locmoe", "switch", "hash")]
    tiny_model(gate_type="hash").save_pretrained(runs[2])
    files = {path.name for path in write_report(runs, tmp_path / "report")}
    assert "fig13_validation_perplexity.png" in files
    assert {f"fig12_tokens_per_expert_{name}.png" for name in ("locmoe", "switch", "hash")} <= files
    assert "fig08_token_similarity_hash.png" in files
    assert "fig09_gate_similarity_hash.png" not in files
    text = _page(tmp_path / "report").text
    assert "Run switch" in text
    assert "A hash gate has no weights" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    files = {path.name for path in write_report(runs, tmp_path / "report")}
    assert {"fig12_tokens_per_expert_a-run.png", "fig12_tokens_per_expert_b-run.png"} <= files
    with pytest.raises(ReportError, match="given twice"):
        write_report([runs[0], runs[0]], tmp_path / "report")


def test_what_is_missing_is_said(tmp_path):
    folder = make_run(tmp_path / "run", state=False)
    assert {path.name for path in write_report([folder])} == {
        "routing.html",
        "fig06_capacity_against_angle.png",
        "fig12_tokens_per_expert.png",
    }
    text = _page(folder).text
    assert "No evaluation in the log" in text
    assert text.count("has no checkpoint") == 2
    tiny_model().save_pretrained(folder)
    write_report([folder], use_model=False)
    assert _page(folder).text.count("Left out on request") == 2


def test_a_log_without_routing(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "routing_stats.jsonl").unlink()
    assert {path.name for path in write_report([folder])} == {"routing.html", "fig13_validation_perplexity.png"}
    assert "No routing statistics of training" in _page(folder).text


def test_names_are_escaped(tmp_path):
    folder = make_run(tmp_path / "<b>&run")
    write_report([folder], tmp_path / "report")
    page = _page(tmp_path / "report")
    assert "b" not in page.open
    assert "<b>&run" in page.text


def test_without_matplotlib_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install hf-locmoe\[report\]"):
        write_report([make_run(tmp_path / "run")])


def test_no_run_at_all(tmp_path):
    with pytest.raises(ReportError, match="`RUN_DIR` is missing"):
        write_report([], tmp_path)


# --- what the figures hold ----------------------------------------------------------------------------------------------


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
