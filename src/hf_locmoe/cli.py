# SPDX-License-Identifier: Apache-2.0
"""`locmoe`: the command line. Each subcommand is one function that adds its parser and names what runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def add_report(subcommands) -> None:
    """`locmoe report RUN_DIR ...`"""
    parser = subcommands.add_parser(
        "report",
        help="draw the routing of a training run",
        description="Draws the paper's figures 6, 8, 9, 12 and 13, of a run on several ranks 10 and 11 too, from a run of"
        " transformers' Trainer: PNG files and one page, routing.html, that opens offline.",
    )
    parser.add_argument(
        "run_dir", nargs="+", metavar="RUN_DIR", help="output_dir of a run; others are compared with the first"
    )
    parser.add_argument("--output", metavar="DIR", help="where to write (default: the first RUN_DIR)")
    parser.add_argument("--text", metavar="FILE", help="text for figures 8 and 9 (default: the model samples its own)")
    parser.add_argument("--no-model", action="store_true", help="load no checkpoint; leaves out figures 8 and 9")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from .report import write_report  # seconds, which `locmoe --help` need not take

    for path in write_report(args.run_dir, args.output, args.text, not args.no_model):
        print(path)


def add_topology(subcommands) -> None:
    """`locmoe topology`"""
    parser = subcommands.add_parser(
        "topology",
        help="show which rank is on which node and holds which experts",
        description="Prints ranks, nodes and experts: of the job that this process belongs to, or of one described by"
        " the options.",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks of the job (default: the launcher's)")
    parser.add_argument(
        "--ranks-per-node", metavar="N", help='"8", or of every node "8,4,4" (default: the launcher\'s)'
    )
    parser.add_argument("--experts", type=int, metavar="N", help="experts of the model (default: show ranks only)")
    parser.add_argument("--ep-size", type=int, metavar="N", help="ranks that share the experts (default: all)")
    parser.add_argument(
        "--placement", metavar="R,R,...", help="rank of every expert in its group (default: contiguous)"
    )
    parser.set_defaults(run=_topology)


def _topology(args: argparse.Namespace) -> None:
    from .distributed.topology import describe_job

    placement = None if args.placement is None else [int(rank) for rank in args.placement.split(",")]
    print(describe_job(args.ranks, args.ranks_per_node, args.experts, args.ep_size, placement))


def add_plan(subcommands) -> None:
    """`locmoe plan`"""
    parser = subcommands.add_parser(
        "plan",
        help="predict memory, traffic and step time of every layout, and recommend one",
        description="Predicts, on paper, memory, bytes inside and between nodes and step time of every layout with hash,"
        " switch and locmoe routing, says where one gets better than another, and recommends one. Quantities take units:"
        " 200gbit or 25GB (a second), 400T (operations a second), 80GB, 10us.",
    )
    parser.add_argument("--config", required=True, metavar="PATH", help="config.json of a MoE, or its folder")
    parser.add_argument("--nodes", required=True, type=int, metavar="N")
    parser.add_argument("--devices-per-node", required=True, type=int, metavar="N")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--bandwidth-inter", metavar="RATE", help="of a node to others, one direction")
    machine.add_argument("--bandwidth-intra", metavar="RATE", help="of a device inside its node, one direction")
    machine.add_argument("--latency-inter", metavar="TIME", help="of a message between nodes (default: 10us)")
    machine.add_argument("--latency-intra", metavar="TIME", help="of a message inside a node (default: 5us)")
    machine.add_argument("--flops", metavar="RATE", help="operations a second that a device sustains in training")
    machine.add_argument("--compute-seconds", metavar="TIME", help="instead: a step that one device takes alone")
    machine.add_argument("--memory", metavar="SIZE", help="of a device, for parameters, gradients, optimizer state")
    machine.add_argument(
        "--overlap", type=float, default=0.0, help="share of the shorter of computation and exchanges that is hidden"
    )
    machine.add_argument(
        "--calibrate", action="store_true", help="measure what is not given, under torchrun links too"
    )
    machine.add_argument("--utilization", type=float, help="share of a measured product's rate that training sustains")
    step = parser.add_argument_group("step")
    step.add_argument(
        "--tokens-per-rank", type=int, default=4096, metavar="N", help="in a micro-batch (default: 4096)"
    )
    step.add_argument("--accumulation-steps", type=int, default=1, metavar="N", help="micro-batches (default: 1)")
    step.add_argument("--checkpointing", action="store_true", help="activations are recomputed")
    step.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of parameters and gradients"
    )
    step.add_argument("--wire-dtype", choices=["float32", "bfloat16"], help="of tokens under way (default: --dtype)")
    step.add_argument("--gloo", action="store_true", help="count reduce-scatters as gloo sends them")
    routing = parser.add_argument_group("routing")
    routing.add_argument(
        "--local-share", type=float, help="of assignments that LocMoE keeps on their node (default: 0.7)"
    )
    routing.add_argument(
        "--load-cv", nargs="+", default=[], metavar="ROUTING=CV", help="variation of the experts' loads: locmoe=0.2"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from .plan import plan_from_options

    text = plan_from_options(vars(args))
    if text is not None:
        print(text)


SUBCOMMANDS: tuple[Callable[..., None], ...] = (add_report, add_topology, add_plan)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs one subcommand.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process if not given.

    Returns:
        `int`: 0, or 1 after an error of the user's or the machine's, which is told in one line on standard error.
    """
    parser = argparse.ArgumentParser(prog="locmoe", description="LocMoE for Hugging Face Transformers.")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in SUBCOMMANDS:
        add(subcommands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"locmoe {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
