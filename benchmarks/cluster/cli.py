# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.cluster run | check | clean`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from .faults import Fault
from .launch import RunResult, run_on_nodes
from .links import Link
from .network import Cluster, ClusterError, remove_orphans, why_no_loss, why_unavailable


RUN = """\
Builds the cluster, runs COMMAND once on every node at the same time, prints what crossed, removes the cluster.
COMMAND finds MASTER_ADDR, MASTER_PORT, NODE_RANK, NNODES and NPROC_PER_NODE in its environment, under torchrun's own
names too, so that `torchrun train.py` needs no argument. Exit status: 0 if COMMAND ended with 0 on every node, 124 past
--timeout, else the first failure (128 + signal)."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster", description="Several emulated nodes on one machine."
    )
    commands = top.add_subparsers(dest="subcommand", required=True)
    run = commands.add_parser(
        "run",
        description=RUN,
        help="run a command on every node",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("-n", "--nodes", type=int, default=2)
    run.add_argument("-m", "--ranks-per-node", type=int, default=1)
    run.add_argument("--rate", help="of every link, each way: 200mbit, 1gbit (default: unshaped)")
    run.add_argument("--delay", help="from node to node, one way: 500us, 2ms (needs sch_netem)")
    run.add_argument("--loss", help="share of the packets lost on arrival: 1%% (needs nftables)")
    run.add_argument("--mtu", type=int, default=1500)
    run.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:TARGET[:FACTOR]@WHEN[+DURATION]",
        help="cut a node's link, slow, stop or kill a rank: cut:1@/step 3/  slow:2:10@5s+20s (may be repeated)",
    )
    run.add_argument("--timeout", type=float, default=600, help="seconds before everything is ended")
    run.add_argument("--grace", type=float, default=10, help="seconds the others get once one node failed")
    run.add_argument("--show", choices=("first", "all", "none"), default="first", help="whose output to show")
    run.add_argument("--json", type=Path, help="write statuses and counters to this file")
    run.add_argument("command", nargs="+")
    commands.add_parser("check", help="can this machine do it?")
    commands.add_parser("clean", help="remove what a killed run left")
    return top


def run(args: argparse.Namespace) -> int:
    link = Link(args.rate, args.delay, args.loss, args.mtu)
    faults = [Fault.parse(text) for text in args.fault]
    shown = {"first": {"cluster", "node0"}, "none": {"cluster"}}.get(args.show)

    def show(where: str, line: str) -> None:
        if shown is None or where in shown:
            print(f"[{where}] {line}", flush=True)

    with Cluster(args.nodes, link) as cluster:
        result = run_on_nodes(
            cluster,
            args.command,
            args.ranks_per_node,
            faults=faults,
            timeout_s=args.timeout,
            grace_s=args.grace,
            on_line=show,
        )
    print(f"{args.nodes} nodes x {args.ranks_per_node} ranks, {link}, {result.seconds:.1f} s")
    print(table(result))
    if args.json:
        record = {**asdict(result), "nodes": args.nodes, "ranks_per_node": args.ranks_per_node, "link": asdict(link)}
        args.json.write_text(json.dumps({k: v for k, v in record.items() if k != "output"}, indent=1) + "\n")
    return result.status


def table(result: RunResult) -> str:
    """One row a node: its exit status and what its interface counted."""
    row = "{:>5} {:>8} {:>10} {:>12} {:>10} {:>12}".format
    lines = [row("node", "exit", "sent MB", "received MB", "on lo MB", "retransmits")]
    for index, (status, counted) in enumerate(zip(result.statuses, result.crossed, strict=True)):
        megabytes = [f"{count / 1e6:.3f}" for count in (counted.tx_bytes, counted.rx_bytes, counted.lo_bytes)]
        lines.append(row(index, "ended" if status is None else status, *megabytes, counted.tcp_retransmits))
    lines.append(f"crossed node boundaries: {sum(c.tx_bytes for c in result.crossed) / 1e6:.3f} MB")
    return "\n".join(lines)


def check() -> int:
    """One line for each thing that a run may need, tried for real; 0 if a shaped cluster can be built."""

    def delay() -> str | None:
        try:
            with Cluster(nodes=1, link=Link(delay="1ms")):
                return None
        except ClusterError as error:
            return str(error)

    reason = why_unavailable()
    print(f"cluster with --rate: {reason or 'works'}")
    if reason is None:
        print(f"--loss: {why_no_loss() or 'works'}")
        print(f"--delay: {delay() or 'works'}")
    return 0 if reason is None else 1


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # so that the context managers clean up after a SIGTERM as they do after Ctrl-C
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        if args.subcommand == "run":
            return run(args)
        if args.subcommand == "check":
            return check()
        print("\n".join(f"removed {name}" for name in remove_orphans()))
        return 0
    except (ClusterError, ValueError) as error:
        print(f"{args.subcommand}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
