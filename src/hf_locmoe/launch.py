# SPDX-License-Identifier: Apache-2.0
"""
Any Trainer script with the plugin on, unedited.

    torchrun --nproc-per-node 8 -m hf_locmoe.launch run_clm.py --model_name_or_path ... (the script's own arguments)
    accelerate launch --multi_gpu --num_processes 8 -m hf_locmoe.launch run_clm.py ...
    python -m hf_locmoe.launch [--plugin plugin.yaml] (SCRIPT | -m MODULE) [ARGUMENTS ...]

The run's choices come from the YAML file and from `LOCMOE_*` variables, which win (see `LocMoePlugin`). The script is run as
`python SCRIPT` would run it, in this process, with its own arguments, tracebacks and exit code. Three things are replaced
for it, and said on the first rank: transformers' model classes spread over the ranks when the script builds one,
`transformers.Trainer` saves and resumes what is spread, and `accelerate.Accelerator` does so for a loop written by hand.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import accelerate
import torch
import transformers
import transformers.trainer

from . import LocMoeConfig  # noqa: F401  registers the architecture
from .distributed.launch_environment import read_launcher
from .distributed.parallel_run import leave_job, spread_every_model
from .training.accelerate_plugin import LocMoePlugin
from .training.accelerator import LocMoeAccelerator
from .training.checkpoint import LocMoeTrainer


def plugin_of(path: str | None) -> LocMoePlugin:
    """The plugin from a YAML file and the environment, whose variables win."""
    if path is None:
        return LocMoePlugin.from_environment()
    if not Path(path).is_file():
        raise ValueError(f"`--plugin` ({path}) is no file: give a YAML file with fields of `LocMoePlugin`.")
    from_file = LocMoePlugin.from_yaml(path).to_environment()
    return LocMoePlugin.from_environment({**from_file, **os.environ})


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hf_locmoe.launch", usage="%(prog)s [--plugin FILE] (SCRIPT | -m MODULE) [ARGUMENTS ...]"
    )
    parser.add_argument("--plugin", metavar="FILE", help="YAML file with fields of LocMoePlugin")
    parser.add_argument("-m", dest="is_module", action="store_true", help="run a module, as python -m does")
    parser.add_argument("script", help="script file, or module with -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    return parser.parse_args(argv)


def check_processes(env: Mapping[str, str]) -> None:
    """
    Refuses to be the one process of a job that was to have several: without MPI, `accelerate launch --cpu` starts one
    however many it is asked for, and a run on a part of its batch looks like any other.
    """
    started_by_accelerate = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= env.keys()
    if started_by_accelerate and read_launcher(env).name == "none":
        raise ValueError(
            "`--num_processes` of `accelerate launch` must be 1 for a single process, and this is the only one of several: "
            "on a CPU it starts the others with `--mpirun_hostfile` alone. Use `accelerate launch --multi_gpu "
            "--num_processes N -m hf_locmoe.launch ...`, which works without a GPU as well, or `torchrun --nproc-per-node "
            "N -m hf_locmoe.launch ...`."
        )


def prepare(plugin: LocMoePlugin) -> None:
    """Turns the plugin on for whatever is run next in this process."""
    if not torch.accelerator.is_available():
        # without it Accelerate believes every process of a CPU job to be alone
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    plugin.activate()
    spread_every_model()
    transformers.Trainer = transformers.trainer.Trainer = LocMoeTrainer
    accelerate.Accelerator = accelerate.accelerator.Accelerator = LocMoeAccelerator
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            "hf_locmoe.launch: models are spread over the ranks when they are built; transformers.Trainer is "
            "hf_locmoe.training.checkpoint.LocMoeTrainer, accelerate.Accelerator is "
            "hf_locmoe.training.accelerator.LocMoeAccelerator",
            file=sys.stderr,
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        check_processes(os.environ)
        plugin = plugin_of(args.plugin)
        if not args.is_module and not Path(args.script).exists():
            raise ValueError(
                f"`SCRIPT` ({args.script}) is not there: give a script file, or `-m` and a module's name."
            )
    except ValueError as error:
        raise SystemExit(f"hf_locmoe.launch: {error}") from error
    prepare(plugin)
    sys.argv = [args.script, *args.arguments]
    if args.is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args.script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(args.script).resolve().parent))
        runpy.run_path(args.script, run_name="__main__")
    leave_job()


if __name__ == "__main__":
    main()
