# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from hf_locmoe.training.placement import balanced_assignment


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 6])
def test_the_best_total_under_the_counts(num_nodes, ties):
    """Against scipy, which solves the same problem with a column for every place."""
    draw = np.random.default_rng(num_nodes)
    for _ in range(30):
        counts = draw.integers(0, 7, size=num_nodes)
        size = (counts.sum(), num_nodes)
        scores = draw.integers(0, 3, size=size).astype(float) if ties else draw.normal(size=size)
        node = balanced_assignment(scores, counts.tolist())
        assert np.bincount(node, minlength=num_nodes).tolist() == counts.tolist()
        places = np.repeat(np.arange(num_nodes), counts)
        rows, columns = linear_sum_assignment(-scores[:, places])
        assert scores[np.arange(size[0]), node].sum() == pytest.approx(scores[rows, places[columns]].sum())


def test_the_same_every_time():
    scores = np.random.default_rng(0).integers(0, 2, size=(64, 4))
    assert (balanced_assignment(scores, [16] * 4) == balanced_assignment(scores.copy(), [16] * 4)).all()


def test_what_cannot_be_dealt():
    with pytest.raises(ValueError, match=r"`counts` \(\[1, 1\]\) must be 2 numbers that add up to 3"):
        balanced_assignment(np.zeros((3, 2)), [1, 1])
    with pytest.raises(ValueError, match="NaN"):
        balanced_assignment(np.array([[np.nan, 1.0]]), [1, 0])
