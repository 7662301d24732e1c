# SPDX-License-Identifier: Apache-2.0
"""An emulated cluster on one Linux machine: network namespaces as nodes, shaped links, the interfaces' own counters.

```
  node0: lo, eth0 198.18.0.1 ══ port0 ┐ switch ┌ port1 ══ eth0 198.18.0.2, lo :node1
               tbf RATE up ──►        └─ br0 ──┘        ──► tbf RATE down
```

Every node is a network namespace with its own interface, loopback, hostname and `/etc/hosts`; the nodes meet on a
bridge in one more namespace. Nothing is attached to the machine's own network, so no packet of a run leaves it.
Ranks of one node talk over that node's `lo`, even when they use the address of its `eth0`, because the kernel routes
a packet to an own address through `lo`: what `eth0` counts is exactly what crossed a node boundary.

`python -m benchmarks.cluster run -n 2 -m 2 --rate 200mbit -- torchrun train.py` is the command line; in Python:

```python
with Cluster(nodes=2, link=Link(rate="200mbit")) as cluster:
    result = run_on_nodes(cluster, ["torchrun", "train.py"], ranks_per_node=2)
    result.status, result.crossed[0].tx_bytes
```

Needs root, iproute2 and util-linux; packet loss needs nftables, delay a kernel with `sch_netem`.
"""

from .counters import Counters
from .faults import Fault
from .launch import RunResult, run_on_nodes
from .links import Link
from .network import Cluster, ClusterError, why_unavailable


__all__ = ["Cluster", "ClusterError", "Counters", "Fault", "Link", "RunResult", "run_on_nodes", "why_unavailable"]
