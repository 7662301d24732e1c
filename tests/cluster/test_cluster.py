# SPDX-License-Identifier: Apache-2.0
"""The emulated cluster itself: what crosses is counted, links can be shaped, lossy or cut, nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster, ClusterError, Fault, Link, run_on_nodes, why_unavailable
from benchmarks.cluster.network import configure, remove_orphans, why_no_loss


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

MEGABYTE = 10**6

# Node 0 receives, the last node sends; with one node it talks to itself. A line per megabyte sent.
TRANSFER = """
import os, socket, sys, time
megabytes, node, nodes = int(sys.argv[1]), int(os.environ["NODE_RANK"]), int(os.environ["NNODES"])

def receive(server):
    connection, _ = server.accept()
    received = 0
    while chunk := connection.recv(1 << 16):
        received += len(chunk)
    print("received", received, flush=True)

def send():
    for _ in range(200):
        try:
            connection = socket.create_connection(("node0", 29500), timeout=60)
            break
        except OSError:
            time.sleep(0.05)
    for step in range(megabytes):
        print("step", step, flush=True)
        connection.sendall(bytes(10**6))
    connection.close()

if node == 0:
    server = socket.create_server(("0.0.0.0", 29500))
    if nodes == 1 and os.fork() == 0:
        send()
        os._exit(0)
    receive(server)
elif node == nodes - 1:
    send()
"""


def transfer(cluster: Cluster, megabytes: int, **options):
    return run_on_nodes(cluster, [sys.executable, "-c", TRANSFER, str(megabytes)], timeout_s=90, **options)


def namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("locmoe*")}


def test_what_crosses_a_node_boundary_is_counted_on_both_ends():
    with Cluster(nodes=3) as cluster:
        result = transfer(cluster, 5)
    assert result.status == 0, result.text()
    assert result.output[0] == [f"received {5 * MEGABYTE}"]
    receiver, bystander, sender = result.crossed
    # frames' headers and acknowledgements on top of the payload
    assert 5 * MEGABYTE < sender.tx_bytes < 5.5 * MEGABYTE
    # the two are read one after the other, and the switch floods what it has not learned yet
    assert abs(receiver.rx_bytes - sender.tx_bytes) < 1000
    assert receiver.tx_bytes < 0.2 * MEGABYTE
    assert bystander.tx_bytes < 1000


def test_what_stays_on_a_node_is_not_counted_even_over_its_own_address():
    with Cluster(nodes=1) as cluster:
        result = transfer(cluster, 5)
    assert result.status == 0, result.text()
    assert result.crossed[0].tx_bytes < 1000
    assert result.crossed[0].lo_bytes > 5 * MEGABYTE


def test_nodes_have_their_own_names_and_know_each_other():
    with Cluster(nodes=2) as cluster:
        result = run_on_nodes(cluster, ["sh", "-c", "hostname; getent hosts node1 | cut -d' ' -f1; ls /sys/class/net"])
        address = cluster.address(1)
    assert [lines[0] for lines in result.output] == ["node0", "node1"]
    assert all(lines[1].endswith(address) for lines in result.output)
    assert all(set(lines[2:]) == {"lo", "eth0"} for lines in result.output)


def test_links_are_reshaped_while_the_cluster_stands():
    def disciplines(cluster):
        devices = [(cluster.namespaces[0], "eth0"), (cluster.namespaces[-1], "port0")]
        return [json.loads(configure("tc", "-n", n, "-j", "qdisc", "show", "dev", d)) for n, d in devices]

    with Cluster(nodes=2) as cluster:
        assert [[q["kind"] for q in end] for end in disciplines(cluster)] == [["noqueue"]] * 2
        for rate in ("200mbit", "1gbit"):
            cluster.shape(Link(rate=rate))
            shapers = disciplines(cluster)
            assert [[q["kind"] for q in end] for end in shapers] == [["tbf"]] * 2
            assert all(end[0]["options"]["rate"] == Link(rate=rate).bytes_per_s for end in shapers)
        assert transfer(cluster, 2).output[0] == [f"received {2 * MEGABYTE}"]
        cluster.shape(Link())
        assert [[q["kind"] for q in end] for end in disciplines(cluster)] == [["noqueue"]] * 2
        with pytest.raises(ValueError, match="`mtu`"):
            cluster.shape(Link(mtu=9000))


def test_lost_packets_are_sent_again_and_arrive():
    if (reason := why_no_loss()) is not None:
        pytest.skip(reason)
    with Cluster(nodes=2, link=Link(loss="5%")) as cluster:
        result = transfer(cluster, 5)
        cluster.shape(Link())
        clean = transfer(cluster, 5)
    assert result.status == clean.status == 0, result.text()
    assert result.output[0] == [f"received {5 * MEGABYTE}"]
    assert result.crossed[1].tcp_retransmits > clean.crossed[1].tcp_retransmits


def test_a_delay_works_or_says_what_the_kernel_lacks():
    cluster = Cluster(nodes=2, link=Link(delay="1ms", rate="1gbit"))
    try:
        cluster.__enter__()
    except ClusterError as error:
        pytest.skip(str(error))
    with contextlib.ExitStack() as stack:
        stack.push(cluster)
        assert transfer(cluster, 1).output[0] == [f"received {MEGABYTE}"]


def test_a_cut_link_delays_what_is_under_way_until_it_is_mended():
    with Cluster(nodes=2) as cluster:
        result = transfer(cluster, 20, faults=[Fault.parse("cut:1@/step 3/+1s")])
    assert result.status == 0, result.text()
    assert result.output[0] == [f"received {20 * MEGABYTE}"]
    assert result.events == ["fault: cut node 1", "mended: cut node 1"]
    assert result.crossed[1].tcp_retransmits > 0


def test_a_link_that_stays_cut_ends_in_the_timeout():
    with Cluster(nodes=2) as cluster:
        result = run_on_nodes(
            cluster,
            [sys.executable, "-c", TRANSFER, "2000"],
            faults=[Fault.parse("cut:1@/step 3/")],
            timeout_s=5,
        )
    assert result.statuses == [None, None]
    assert result.status == 124
    assert "received" not in result.text()


@pytest.mark.parametrize("fault, status", [("kill:1@/ready 1/", 128 + signal.SIGKILL), ("stop:1@/ready 1/", 124)])
def test_a_rank_is_found_by_its_number_and_not_its_children(fault, status):
    # node 1 plays rank 1 and waits for a child that inherits its environment
    script = "export RANK=$NODE_RANK; exec sh -c 'echo ready $RANK; sleep 2 & wait'"
    with Cluster(nodes=2) as cluster:
        result = run_on_nodes(cluster, ["sh", "-c", script], faults=[Fault.parse(fault)], timeout_s=4)
    assert result.statuses[0] == 0
    assert result.status == status


def test_one_failing_node_ends_the_others_after_the_grace():
    with Cluster(nodes=2) as cluster:
        result = run_on_nodes(cluster, ["sh", "-c", "test $NODE_RANK = 0 || exit 3; sleep 60"], grace_s=0.5)
    assert result.statuses == [None, 3]
    assert result.status == 3


def test_nothing_stays_behind():
    before = namespaces()
    with contextlib.suppress(ZeroDivisionError), Cluster(nodes=2) as cluster:
        process = cluster.start(0, ["sleep", "60"])
        assert namespaces() - before == set(cluster.namespaces)
        raise ZeroDivisionError
    assert process.wait(timeout=30) != 0
    assert namespaces() == before


def test_a_killed_owner_leaves_namespaces_that_clean_removes():
    script = "import os, signal, sys; from benchmarks.cluster import Cluster; c = Cluster(2).__enter__(); "
    script += "print(*c.namespaces, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    left = set(done.stdout.split())
    assert len(left) == 3
    assert left <= namespaces()
    assert left <= set(remove_orphans())
    assert not left & namespaces()


def test_the_command_line_runs_reports_and_passes_the_status_on(tmp_path):
    root, file = Path(__file__).parents[2], tmp_path / "run.json"
    argv = [sys.executable, "-m", "benchmarks.cluster", "run", "-n", "2", "--rate", "200mbit", "--json", str(file)]
    done = subprocess.run(
        [*argv, "--", "sh", "-c", "echo hello from $(hostname); exit 5"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert "[node0] hello from node0" in done.stdout
    assert "crossed node boundaries: 0.000 MB" in done.stdout
    assert json.loads(file.read_text())["link"]["rate"] == "200mbit"
