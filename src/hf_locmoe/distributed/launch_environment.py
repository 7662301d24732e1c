# SPDX-License-Identifier: Apache-2.0
"""What the launcher's environment and the host say about nodes: torchrun, `accelerate launch`, SLURM, MPI. Pure
Python."""

from __future__ import annotations

import os
import re
import socket
import uuid
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate


RANKS_PER_NODE_VARIABLE = "LOCMOE_RANKS_PER_NODE"


@dataclass(frozen=True)
class Launch:
    """What a launcher says: its name, this rank's node, and the shape of the whole job where it can be known."""

    name: str
    num_ranks: int | None
    node: str | None = None
    node_sizes: tuple[int, ...] | None = None
    cyclic: bool = False

    def rank_to_node(self) -> tuple[int, ...]:
        assert self.node_sizes is not None
        if not self.cyclic:
            return tuple(node for node, size in enumerate(self.node_sizes) for _ in range(size))
        rounds = range(max(self.node_sizes))
        return tuple(node for turn in rounds for node, size in enumerate(self.node_sizes) if turn < size)


def read_launcher(env: Mapping[str, str]) -> Launch:
    if "RANK" in env and "WORLD_SIZE" in env:
        return _read_torchrun(env)
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE"))
        sizes = _expand_slurm(tasks) if tasks else None
        num_ranks = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        cyclic = env.get("SLURM_DISTRIBUTION", "block").startswith("cyclic")
        known = sizes is not None and sum(sizes) == num_ranks
        return Launch("slurm", num_ranks, env.get("SLURM_NODEID"), sizes if known else None, cyclic)
    for name, prefix in (("openmpi", "OMPI_COMM_WORLD"), ("mvapich", "MV2_COMM_WORLD")):
        if f"{prefix}_RANK" in env:
            names = (f"{prefix}_{field}" for field in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
            return _from_local_size(name, env, *names)
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        return _from_local_size("mpi", env, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return Launch("none", 1, None, (1,))


def _read_torchrun(env: Mapping[str, str]) -> Launch:
    num_ranks = int(env["WORLD_SIZE"])
    if "GROUP_RANK" not in env:
        return _from_local_size("torchrun", env, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    local, nodes = int(env.get("LOCAL_WORLD_SIZE", 0)), int(env.get("GROUP_WORLD_SIZE", 0))
    return Launch("torchrun", num_ranks, env["GROUP_RANK"], (local,) * nodes if local * nodes == num_ranks else None)


def _from_local_size(
    name: str, env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str
) -> Launch:
    """Launchers that name this node's ranks only: equal nodes, filled in order, if this rank's place fits that."""
    num_ranks = int(env[size])
    if num_ranks == 1:
        return Launch(name, 1, None, (1,))
    if local_rank not in env or local_size not in env:
        return Launch(name, num_ranks)
    local = int(env[local_size])
    if local < 1 or num_ranks % local or int(env[rank]) % local != int(env[local_rank]):
        return Launch(name, num_ranks)
    return Launch(name, num_ranks, None, (local,) * (num_ranks // local))


def _expand_slurm(text: str) -> tuple[int, ...]:
    """`2(x3),1` -> (2, 2, 2, 1)."""
    sizes: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return ()
        sizes.extend([int(match[1])] * int(match[2] or 1))
    return tuple(sizes)


def parse_sizes(value: int | str | Sequence[int], name: str) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        sizes = tuple(int(part) for part in parts)
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f'`{name}` ({value}) must be a positive number of ranks, or a list of them such as "4,2,2": give the '
            "ranks of one "
            "node, or of each."
        )
    return sizes


def node_key(rank: int, env: Mapping[str, str] | None = None) -> str:
    """
    What tells the node of this rank apart from the others: equal on ranks of one node, different between nodes. By
    hand (`LOCMOE_RANKS_PER_NODE`) first, then the launcher's word for it, then the host: its boot, its name and its
    network, as two network namespaces of one machine reach each other only over a link. `<source>:<name>`.

    Args:
        rank (`int`): this process's global rank.
    """
    env = os.environ if env is None else env
    launch = read_launcher(env)
    by_hand = env.get(RANKS_PER_NODE_VARIABLE)
    if by_hand is not None:
        sizes = parse_sizes(by_hand, RANKS_PER_NODE_VARIABLE)
        ends = list(accumulate(sizes))
        node = rank // sizes[0] if len(sizes) == 1 else bisect_right(ends, rank)
        return f"hand:{node}"
    if launch.node is not None:
        return f"{launch.name}:{launch.node}"
    return host_key()


def host_key() -> str:
    """What tells this host (and its network namespace) apart from all others, ending in its name."""

    def read(path: str, reader) -> str:
        try:
            return reader(path)
        except OSError:
            return ""

    def content(path: str) -> str:
        with open(path) as file:
            return file.read().strip()

    boot = read("/proc/sys/kernel/random/boot_id", content) or f"{uuid.getnode():x}"
    network = re.sub(r"\D", "", read("/proc/self/ns/net", os.readlink))
    return f"host:{boot}/{network}:{socket.gethostname()}"
