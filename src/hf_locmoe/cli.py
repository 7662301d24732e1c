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
        description="Draws the paper's figures 6, 8, 9, 12 and 13 from a run of transformers' Trainer: PNG files and one"
        " page, routing.html, that opens offline.",
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


SUBCOMMANDS: tuple[Callable[..., None], ...] = (add_report, add_topology)


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
