# SPDX-License-Identifier: Apache-2.0
import pytest

from hf_locmoe.distributed.launch_environment import host_key, node_key
from hf_locmoe.distributed.topology import NodeTopology


def torchrun(rank, local, nodes):
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(local * nodes),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_RANK": str(rank // local),
        "GROUP_WORLD_SIZE": str(nodes),
    }


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "2(x2),1"}


@pytest.mark.parametrize(
    "env, nodes",
    [
        ({}, (0,)),
        (torchrun(3, 2, 2), (0, 0, 1, 1)),
        (SLURM, (0, 0, 1, 1, 2)),
        (SLURM | {"SLURM_DISTRIBUTION": "cyclic"}, (0, 1, 2, 0, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, (0, 1)),
        # torchrun's word counts inside a SLURM allocation that started one agent a node
        (SLURM | torchrun(0, 4, 1), (0, 0, 0, 0)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (0, 0, 1, 1),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, (0, 0, 1, 1)),
        (torchrun(3, 2, 2) | {"LOCMOE_RANKS_PER_NODE": "1"}, (0, 1, 2, 3)),
        (torchrun(3, 4, 1) | {"LOCMOE_RANKS_PER_NODE": "3,1"}, (0, 0, 0, 1)),
    ],
)
def test_launchers(env, nodes):
    assert NodeTopology.from_environment(env).rank_to_node == nodes


def test_an_argument_goes_before_the_environment():
    env = torchrun(0, 4, 1) | {"LOCMOE_RANKS_PER_NODE": "1"}
    assert NodeTopology.from_environment(env, ranks_per_node=2).rank_to_node == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "env",
    [
        # uneven agents: this one runs 3 of 5 ranks
        torchrun(4, 2, 2) | {"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "3"},
        # started by hand
        {"RANK": "0", "WORLD_SIZE": "4"},
        # dealt to the hosts in turn
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
    ],
)
def test_what_one_rank_cannot_know_alone(env):
    assert NodeTopology.from_environment(env) is None


@pytest.mark.parametrize("rank, key", [(0, "hand:0"), (2, "hand:0"), (3, "hand:1"), (4, "hand:2")])
def test_node_key_by_hand(rank, key):
    assert node_key(rank, torchrun(rank, 5, 1) | {"LOCMOE_RANKS_PER_NODE": "3,1,1"}) == key


def test_node_key_of_a_launcher_and_of_a_host():
    assert node_key(3, torchrun(3, 2, 2)) == "torchrun:1"
    assert node_key(3, SLURM) == "slurm:1"
    assert node_key(0, {"RANK": "0", "WORLD_SIZE": "2"}) == host_key() == host_key()
    assert node_key(0, {"RANK": "0", "WORLD_SIZE": "2"}).startswith("host:")


def test_a_wrong_size_by_hand_names_the_variable():
    with pytest.raises(ValueError, match=r"`LOCMOE_RANKS_PER_NODE` \(two\)"):
        node_key(0, {"LOCMOE_RANKS_PER_NODE": "two"})
