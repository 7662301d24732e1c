# SPDX-License-Identifier: Apache-2.0
"""The loop written by hand: on two nodes as on one process, and from where it stopped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.conftest import RECIPES, options
from tests.tolerances import assert_close


pytestmark = pytest.mark.multiprocess


@pytest.fixture
def loop(checkpoint, text_dir, tmp_path):
    """Runs the recipe on so many ranks, each a node of its own; the losses by step, as printed by the first."""
    lines = (text_dir / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join(lines))

    def run(ranks: int, output_dir: Path, **settings) -> dict[int, float]:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        given = dict(batch_size=4 // ranks, accumulation_steps=2, block_size=16, max_steps=4, save_steps=2) | settings
        files = dict(model_name_or_path=checkpoint, train_file=tmp_path / "train.txt", output_dir=output_dir)
        done = subprocess.run(
            [*launcher, str(RECIPES / "accelerate_loop.py"), *options(**files, **given)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                "LOCMOE_LAYOUT": "spread",
                "LOCMOE_RANKS_PER_NODE": "1",
                "LOCMOE_LOCALITY_LOSS_COEF": "0",  # zero on one node, and not on two
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)  loss (\S+)", done.stdout)}

    return run


@pytest.mark.slow
def test_two_nodes_as_one_process_and_on_from_the_state(loop, tmp_path):
    alone = loop(1, tmp_path / "one")
    assert sorted(alone) == [1, 2, 3, 4]
    # two steps on two nodes, a third that is not saved, and on from the second
    first = loop(2, tmp_path / "two", max_steps=3)
    rest = loop(2, tmp_path / "two")
    assert sorted(rest) == [3, 4]
    assert rest[3] == first[3]
    assert_close(list((first | rest).values()), list(alone.values()))
    assert (tmp_path / "two" / "model.safetensors").is_file()


def test_a_short_text_is_named(loop, tmp_path):
    with pytest.raises(AssertionError, match=r"error: `train_file` .* tokens and a step takes 80000: give more text"):
        loop(1, tmp_path / "none", block_size=10000)
