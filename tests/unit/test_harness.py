# SPDX-License-Identifier: Apache-2.0
"""The multi-process harness: what it returns, and what it says when a rank fails, dies or hangs."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, run_ranks


pytestmark = pytest.mark.multiprocess


def _sum_of_ranks(scale):
    total = scale * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "total": total, "threads": torch.get_num_threads()}


def _initialises_itself():
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (os.environ["LOCMOE_RANKS_PER_NODE"], os.environ["LOCAL_RANK"]))
    dist.destroy_process_group()
    return gathered


def _rank_one_raises():
    if dist.get_rank() == 1:
        raise ValueError("`num_experts` (10) is wrong")
    dist.barrier()


def _rank_one_hangs():
    if dist.get_rank() == 1:
        _stands_still()


def _stands_still():
    time.sleep(600)


def _rank_two_is_killed():
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _survives_the_death_of_rank_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError:
        return "noticed"
    return "not noticed"


def _starts_a_child_and_hangs(pid_file):
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    with open(pid_file, "w") as file:
        file.write(str(pid))
    time.sleep(600)


def _unpicklable():
    return lambda: None


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_back_by_value_in_the_order_of_the_ranks():
    scale = torch.tensor([1.0, 10.0])
    results = run_ranks(_sum_of_ranks, 3, scale)
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert [result["threads"] for result in results] == [1, 1, 1]
    for result in results:
        assert torch.equal(result["total"], torch.tensor([6.0, 60.0]))
    assert scale.tolist() == [1.0, 10.0]


def test_environment_for_all_ranks_and_per_rank():
    env = {"LOCMOE_RANKS_PER_NODE": "2", "LOCAL_RANK": ["0", "1", "0"]}
    assert run_ranks(_initialises_itself, 3, init=False, env=env) == [[("2", "0"), ("2", "1"), ("2", "0")]] * 3


def test_the_rank_that_raised_first_is_named_with_its_traceback():
    with pytest.raises(RankError, match=r"`num_experts` \(10\) is wrong") as caught:
        run_ranks(_rank_one_raises, 3)
    assert (caught.value.rank, caught.value.kind) == (1, "ValueError")
    assert "in _rank_one_raises" in str(caught.value)


def test_a_hang_ends_at_the_timeout_and_shows_where():
    with pytest.raises(RankError, match="did not finish within 3 s") as caught:
        run_ranks(_rank_one_hangs, 2, timeout_s=3)
    assert (caught.value.rank, caught.value.kind) == (1, "timeout")
    assert "_stands_still" in str(caught.value)


def test_the_whole_output_of_a_hang_is_kept_where_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCMOE_TEST_LOGS", str(tmp_path / "logs"))
    with pytest.raises(RankError):
        run_ranks(_rank_one_hangs, 2, timeout_s=3)
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("rank_one_hangs-")
    assert "_stands_still" in (folder / "rank1.log").read_text()


def test_a_killed_rank_is_the_cause_not_its_peers_errors():
    with pytest.raises(RankError, match="the process ended without a result") as caught:
        run_ranks(_rank_two_is_killed, 3)
    assert (caught.value.rank, caught.value.kind) == (2, "SIGKILL")


def test_a_rank_may_die_where_the_test_means_it():
    assert run_ranks(_survives_the_death_of_rank_one, 2, may_die={1}) == ["noticed", None]


def test_what_a_rank_started_ends_with_it(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(RankError, match="did not finish"):
        run_ranks(_starts_a_child_and_hangs, 1, str(pid_file), init=False, timeout_s=3)
    deadline = time.monotonic() + 10
    while _is_running(int(pid_file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(int(pid_file.read_text()))


def test_a_result_that_cannot_be_pickled_is_said_so():
    with pytest.raises(RankError, match=r"(?i)pickle|local object"):
        run_ranks(_unpicklable, 1, init=False)


@pytest.mark.many_ranks
def test_eight_ranks():
    results = run_ranks(_sum_of_ranks, 8, torch.ones(1))
    assert [result["total"].item() for result in results] == [36.0] * 8
