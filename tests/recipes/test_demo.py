# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import pytest
import yaml

import demo

from .conftest import TINY_MODEL, TINY_RUN


def test_unigram_by_hand():
    """Counts 3, 1, 0 with one added each: probabilities 4/7, 2/7, 1/7. First tokens of a block are not predicted."""
    train = [{"input_ids": [0, 0]}, {"input_ids": [1, 0]}]
    validation = [{"input_ids": [1, 0, 2]}]
    on_train, on_validation = demo.unigram_perplexity(train, validation, 3)
    assert on_train == pytest.approx(7 / 4)
    assert on_validation == pytest.approx(math.sqrt(7 / 4 * 7))


def test_a_folder_of_the_user_is_not_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="did not make and will not delete"):
        demo.fresh_folder(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_of_an_earlier_demo_is_replaced(tmp_path):
    demo.fresh_folder(tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    demo.fresh_folder(tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "file").touch()
    for path, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(ValueError, match=message):
            demo.fresh_folder(path)


@pytest.mark.slow
def test_the_whole_demo(tmp_path, capfd):
    recipe = {**TINY_RUN, "model": TINY_MODEL, "max_steps": 30, "learning_rate": 1e-2, "disable_tqdm": False}
    recipe |= {"train_file": "given by the demo", "output_dir": "given by the demo"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    rows = demo.main(
        ["--output_dir", str(out), "--recipe_config", str(tmp_path / "tiny.yaml"), "--max_chars_per_domain", "20000"]
    )
    shown = capfd.readouterr().out
    assert [row[0].split(",")[0] for row in rows] == ["unigram of the same tokens", "dense", "LocMoE"]
    assert all(1 < perplexity < 600 for row in rows for perplexity in row[1:3])
    assert [row["model"] for row in json.loads((out / "perplexities.json").read_text())] == [row[0] for row in rows]
    for name in ("locmoe/model.safetensors", "locmoe/README.md", "locmoe/report/routing.html", "dense/config.json"):
        assert (out / name).is_file()
    assert list((out / "locmoe" / "report").glob("*.png"))
    assert demo.PROMPTS[0] in shown  # generated in the fresh process
    assert "next" in shown.splitlines()[-5]
