# SPDX-License-Identifier: Apache-2.0
"""The recorded runs of `benchmarks/bench_step.py` on the emulated cluster, beside what the model needs to predict them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.step_variants import VARIANTS, Setup, model_config
from hf_locmoe.distributed.layouts import ModelSize, groups_of_config
from hf_locmoe.distributed.step_traffic import LayoutGroups, Workload
from hf_locmoe.distributed.topology import NodeTopology


RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
LINKS = {"1gbit": 125e6, "200mbit": 25e6}  # bytes a second and direction


class RecordedSteps:
    """One results file: `locmoe-hash`, whose load is even, or `olmoe`, whose router collapsed during the run."""

    def __init__(self, architecture: str) -> None:
        record = json.loads((RESULTS / f"step_{architecture}_top1_emulated-4core_202611.json").read_text())
        self.rows = {row["variant"]: row for row in record["rows"]}
        config = {key: value for key, value in record["config"].items() if key != "links"}
        self.setup = Setup(**config)
        self.topology = NodeTopology.from_ranks_per_node(self.setup.ranks_per_node, self.setup.world_size)

    @property
    def variants(self) -> list[str]:
        """Those that are layouts."""
        return [name for name in self.rows if VARIANTS[name].is_layout]

    @cached_property
    def size(self) -> ModelSize:
        with torch.device("meta"):
            return ModelSize.of(AutoModelForCausalLM.from_config(model_config(self.setup)))

    def groups(self, variant: str) -> LayoutGroups:
        return groups_of_config(variant, VARIANTS[variant].distributed_config(self.setup), self.topology)

    def work(self, variant: str) -> Workload:
        return Workload(
            tokens_per_rank=self.setup.sequences_per_rank * self.setup.sequence_length,
            wire_bytes_per_element={"float32": 4, "bfloat16": 2}[VARIANTS[variant].wire_dtype],
            reduce_scatter_passes=2,  # gloo
        )

    def seconds(self, variant: str, link: str) -> float:
        return self.rows[variant][f"seconds {link}"]["median"]

    def bytes_inter_node(self, variant: str, link: str = "unshaped") -> float:
        return self.rows[variant][f"sent {link}"] * 1e6
