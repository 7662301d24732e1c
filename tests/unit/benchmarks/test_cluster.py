# SPDX-License-Identifier: Apache-2.0
"""The parts of the emulated cluster that touch nothing: text in, text or numbers out."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster, Counters, Fault, Link, RunResult
from benchmarks.cluster.cli import parser, table
from benchmarks.cluster.faults import FaultInjector
from benchmarks.cluster.launch import node_environment
from benchmarks.cluster.processes import slow_down


NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:    5000      50    0    0    0     0          0         0     5000      50    0    0    0     0       0          0
  eth0: 1111111     222    0    0    0     0          0         0  3333333     444    0    0    0     0       0          0
"""
SNMP = """\
Ip: Forwarding DefaultTTL
Ip: 2 64
Tcp: RtoAlgorithm RtoMin RetransSegs OutRsts
Tcp: 1 200 17 3
"""


def test_counters_are_read_from_what_the_kernel_writes():
    counters = Counters.parse(NET_DEV, SNMP)
    assert counters == Counters(
        tx_bytes=3333333, rx_bytes=1111111, tx_packets=444, rx_packets=222, lo_bytes=5000, tcp_retransmits=17
    )


def test_counters_of_a_namespace_without_interfaces_are_zero():
    assert Counters.parse("\n".join(NET_DEV.splitlines()[:2])) == Counters()


def test_counters_subtract_field_by_field():
    later = Counters(tx_bytes=10, rx_bytes=20, tx_packets=3, rx_packets=4, lo_bytes=50, tcp_retransmits=6)
    assert later - Counters(tx_bytes=1, lo_bytes=50) == Counters(9, 20, 3, 4, 0, 6)


@pytest.mark.parametrize(
    "rate, bytes_per_s", [("200mbit", 25e6), ("1gbit", 125e6), ("1.5mbit", 187500.0), ("8kbit", 1e3), (None, None)]
)
def test_rates(rate, bytes_per_s):
    assert Link(rate=rate).bytes_per_s == bytes_per_s


@pytest.mark.parametrize(
    "field, value",
    [
        ("rate", "200"),
        ("rate", "fast"),
        ("rate", "0mbit"),
        ("rate", "200 mbit"),
        ("delay", "1h"),
        ("loss", "1"),
        ("loss", "0%"),
        ("loss", "100%"),
        ("mtu", 100),
    ],
)
def test_a_wrong_link_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` \({value}\) must"):
        Link(**{field: value})


def test_an_unshaped_link_has_no_queueing_discipline_and_loses_nothing():
    assert Link().queueing_disciplines() == []
    assert Link().loss_rules("eth0") is None


def test_a_shaper_lets_one_segmentation_burst_through_at_any_rate():
    words = Link(rate="1mbit").queueing_disciplines()[0].split()
    assert words[:6] == ["root", "handle", "1:", "tbf", "rate", "1mbit"]
    assert int(words[words.index("burst") + 1]) >= 65536
    fast = Link(rate="1gbit").queueing_disciplines()[0].split()
    assert int(fast[fast.index("burst") + 1]) == 125_000  # 1 ms


def test_half_of_the_delay_is_at_each_end_and_hangs_under_the_shaper():
    assert Link(delay="1ms").queueing_disciplines() == ["root netem delay 500us limit 100000"]
    shaped = Link(rate="1gbit", delay="2ms").queueing_disciplines()
    assert [words.split()[0] for words in shaped] == ["root", "parent"]
    assert "delay 1000us" in shaped[1]


def test_loss_is_a_share_of_the_packets_that_arrive():
    assert 'iifname "eth0" numgen random mod 1000000 < 15000' in Link(loss="1.5%").loss_rules("eth0")


@pytest.mark.parametrize("nodes", [0, 201, -1])
def test_a_cluster_has_one_to_two_hundred_nodes(nodes):
    with pytest.raises(ValueError, match=rf"`nodes` \({nodes}\) must be from 1 to 200"):
        Cluster(nodes)


def test_clusters_of_one_process_do_not_share_names():
    assert not set(Cluster(2).namespaces) & set(Cluster(2).namespaces)


def test_every_node_gets_the_rendezvous_and_its_own_rank():
    cluster = Cluster(2)
    first, second = (node_environment(cluster, index, 3) for index in range(2))
    assert {name for name in first if first[name] != second[name]} == {"NODE_RANK", "PET_NODE_RANK"}
    assert first["MASTER_ADDR"] == first["PET_MASTER_ADDR"] == cluster.address(0)
    assert (second["NODE_RANK"], second["NNODES"], second["NPROC_PER_NODE"]) == ("1", "2", "3")


@pytest.mark.parametrize(
    "text, fault",
    [
        ("cut:1@/step 3/", Fault("cut", 1, pattern="step 3")),
        ("cut:0@5s+2.5s", Fault("cut", 0, after_s=5.0, lasts_s=2.5)),
        ("slow:2:10@/loss \\d+@+/+20s", Fault("slow", 2, factor=10.0, pattern="loss \\d+@+", lasts_s=20.0)),
        ("kill:3@0.5s", Fault("kill", 3, after_s=0.5)),
        ("stop:0@/a/", Fault("stop", 0, pattern="a")),
    ],
)
def test_faults_are_parsed(text, fault):
    assert Fault.parse(text) == fault


@pytest.mark.parametrize("text", ["cut", "cut:1", "cut:x@5s", "burn:1@5s", "cut:1@5", "cut:1@//", "slow:1:2:3@5s"])
def test_a_wrong_fault_is_quoted(text):
    with pytest.raises(ValueError, match=r"`fault` \("):
        Fault.parse(text)


@pytest.mark.parametrize("text", ["slow:1@5s", "slow:1:1@5s", "cut:1:2@5s"])
def test_only_a_slow_rank_has_a_factor_and_it_is_above_one(text):
    with pytest.raises(ValueError, match="`factor`"):
        Fault.parse(text)


def test_a_killed_rank_is_not_mended():
    with pytest.raises(ValueError, match="`lasts_s`"):
        Fault.parse("kill:1@5s+1s")


class _RecordingCluster:
    """Stands in for a cluster: notes what is done to it."""

    def __init__(self):
        self.done = []
        self.mended = threading.Event()

    def cut(self, node):
        self.done.append(("cut", node))

    def mend(self, node):
        self.done.append(("mend", node))
        self.mended.set()


def test_a_pattern_sets_its_fault_off_once_and_the_fault_is_mended():
    cluster, told = _RecordingCluster(), []
    fault = Fault("cut", 1, pattern=r"step \d", lasts_s=0.01)
    with FaultInjector(cluster, [fault], told.append) as injector:
        injector.see("warming up")
        assert cluster.done == []
        injector.see("step 1")
        injector.see("step 2")
        assert cluster.mended.wait(5)
    assert cluster.done == [("cut", 1), ("mend", 1)]
    assert told == ["fault: cut node 1", "mended: cut node 1"]


def test_a_fault_whose_time_never_comes_does_not_happen():
    cluster = _RecordingCluster()
    with FaultInjector(cluster, [Fault("cut", 0, after_s=60.0)], print):
        pass
    assert cluster.done == []


def _state(pid: int) -> str:
    """R running, S sleeping, T stopped, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_slowed_process_is_stopped_now_and_then_and_runs_on_afterwards():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    over = threading.Event()
    slowed = threading.Thread(target=slow_down, args=(process.pid, 10.0, over))
    slowed.start()
    deadline = time.monotonic() + 30
    seen = set()
    while not {"T"} < seen and time.monotonic() < deadline:
        seen.add(_state(process.pid))
    over.set()
    slowed.join()
    process.communicate(b"\n", timeout=30)
    assert {"T"} < seen, "stopped, and something else too"
    assert process.returncode == 0


def test_slowing_a_process_that_is_gone_is_no_error():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    slow_down(process.pid, 2.0, threading.Event())


@pytest.mark.parametrize(
    "statuses, status", [([0, 0], 0), ([0, 3], 3), ([None, 0], 124), ([None, 7], 7), ([-9, 0], 137), ([0, None], 124)]
)
def test_the_status_of_a_run_is_its_first_failure(statuses, status):
    assert RunResult(statuses, 1.0, [], []).status == status


def test_the_table_has_a_row_per_node_and_the_sum():
    result = RunResult([0, None], 1.0, [Counters(tx_bytes=1_500_000), Counters(tx_bytes=500_000)], [["a"], ["b", "c"]])
    lines = table(result).splitlines()
    assert "1.500" in lines[1]
    assert "ended" in lines[2]
    assert lines[3] == "crossed node boundaries: 2.000 MB"
    assert result.text() == "[node0] a\n[node1] b\n[node1] c"


def test_the_command_line_of_the_readme():
    args = parser().parse_args(
        ["run", "-n", "2", "-m", "2", "--rate", "200mbit", "--", "torchrun", "train.py", "--lr", "1"]
    )
    assert (args.nodes, args.ranks_per_node, args.rate) == (2, 2, "200mbit")
    assert args.command == ["torchrun", "train.py", "--lr", "1"]
