# SPDX-License-Identifier: Apache-2.0
"""The report as a whole: which figures, what the page says and holds, what is missing and why."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from hf_locmoe.report import ReportError, write_report
from hf_locmoe.report import probe as probe_module
from tests.unit.report.run_folder import TIMES, make_run, tiny_model


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


def test_local_share_is_drawn_where_the_log_has_it(tmp_path):
    run = make_run(tmp_path / "run")
    assert "stay on their node" not in _page(write_report([run], use_model=False)[0].parent).text
    state = next(iter(sorted(run.rglob("trainer_state.json"))))
    content = json.loads(state.read_text())
    content["log_history"].append(
        {"step": 2, "loss": 1.0, "routing/local_share": 0.75, "comm/bytes_inter_node": 12345.0}
    )
    state.write_text(json.dumps(content))
    files = write_report([run], use_model=False)
    assert (run / "local_share.png") in files
    text = _page(run).text
    assert "stay on their node" in text and "75 %" in text and "12,345" in text


def test_what_a_step_is_made_of_is_drawn_where_the_log_has_it(tmp_path):
    runs = [make_run(tmp_path / "spread", times=TIMES), make_run(tmp_path / "alone")]
    files = write_report(runs, tmp_path / "report", use_model=False)
    assert {"fig10_step_time.png", "fig11_step_time_shares.png"} <= {path.name for path in files}
    text = _page(tmp_path / "report").text
    assert "figures 10 and 11" in text and "38 %" in text  # 3 of 8 seconds
    write_report(runs[1:], tmp_path / "other", use_model=False)
    assert "figures 10 and 11" not in _page(tmp_path / "other").text
