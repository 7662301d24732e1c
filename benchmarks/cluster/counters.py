# SPDX-License-Identifier: Apache-2.0
"""What a node's interfaces and TCP stack counted. Pure: parses text that the kernel wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Counters:
    """Bytes and packets since the node was made, or, as a difference, over a stretch of time.

    Bytes are those of Ethernet frames on `eth0`, the only way out of a node; a burst that the kernel hands over in one
    piece (segmentation offload) counts its headers once, so the overhead over the payload is a few per cent.
    """

    tx_bytes: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    rx_packets: int = 0
    lo_bytes: int = 0
    tcp_retransmits: int = 0

    def __sub__(self, earlier: Counters) -> Counters:
        before = asdict(earlier)
        return Counters(**{name: value - before[name] for name, value in asdict(self).items()})

    @classmethod
    def parse(cls, net_dev: str, snmp: str = "") -> Counters:
        """From the texts of `/proc/net/dev` and, for the retransmits, `/proc/net/snmp`."""
        columns = {}
        for line in net_dev.splitlines()[2:]:
            name, _, numbers = line.partition(":")
            columns[name.strip()] = [int(number) for number in numbers.split()]
        eth0, lo = columns.get("eth0", [0] * 16), columns.get("lo", [0] * 16)
        tcp = [line.split() for line in snmp.splitlines() if line.startswith("Tcp:")]
        retransmits = int(dict(zip(*tcp, strict=True))["RetransSegs"]) if tcp else 0
        return cls(
            tx_bytes=eth0[8],
            rx_bytes=eth0[0],
            tx_packets=eth0[9],
            rx_packets=eth0[1],
            lo_bytes=lo[8],
            tcp_retransmits=retransmits,
        )

    @classmethod
    def read(cls) -> Counters:
        """Of the node that this process runs on."""
        return cls.parse(Path("/proc/self/net/dev").read_text(), Path("/proc/self/net/snmp").read_text())
