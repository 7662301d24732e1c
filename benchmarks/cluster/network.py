# SPDX-License-Identifier: Apache-2.0
"""The namespaces, links and shaping of one emulated cluster."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .counters import Counters
from .links import Link
from .processes import NAMESPACES, end_processes


PREFIX = "locmoe"  # every namespace is called locmoe<pid of its owner>-<how many before>-<role>
SUBNET = "198.18.0"  # RFC 2544: for benchmarks, routed nowhere
TOOLS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "setpriv": "util-linux"}

# A machine's own choice may be BBR, whose probing stalls a busy flow for 200 ms now and then.
CHOOSE_TCP_CONTROL = (
    "for c in cubic reno; do echo $c 2>/dev/null >/proc/sys/net/ipv4/tcp_congestion_control && exit; done; exit 0"
)
# Run inside a node before the command: hostname, the names of all nodes, its own /sys. The mount and UTS namespaces
# that `unshare` makes keep all of it invisible outside.
ENTER_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && mount -t sysfs sysfs /sys && shift 2 && exec "$@"'

_serial = itertools.count()


class ClusterError(RuntimeError):
    """The machine cannot do it: no permission, a missing tool or a missing kernel feature."""


def configure(*argv: str, stdin: str | None = None) -> str:
    """Run a configuration command and return its output; on failure, say what it said."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        package = TOOLS.get(argv[0], "nftables" if "nft" in argv else argv[0])
        raise ClusterError(f"`{argv[0]}` is not installed: install {package}.") from None
    if done.returncode:
        raise ClusterError(f"`{' '.join(argv)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@functools.cache
def why_unavailable() -> str | None:
    """`None` where a cluster can be built, else the reason why not, in words for a skipped test."""
    if os.name != "posix" or os.uname().sysname != "Linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [f"{tool} ({package})" for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    try:
        with Cluster(nodes=2, link=Link(rate="200mbit")):
            return None
    except ClusterError as error:
        return str(error)


@functools.cache
def why_no_loss() -> str | None:
    """`None` where packets can be lost at random, else the reason why not."""
    if (reason := why_unavailable()) is not None:
        return reason
    try:
        with Cluster(nodes=1, link=Link(loss="1%")):
            return None
    except ClusterError as error:
        return str(error)


class Cluster:
    """Nodes on a switch. A context manager: leaving it ends every process inside and removes everything.

    Args:
        nodes: how many, from 1 to 200.
        link: what every node's link to the switch is like.
    """

    def __init__(self, nodes: int, link: Link | None = None):
        if not 1 <= nodes <= 200:
            raise ValueError(f"`nodes` ({nodes}) must be from 1 to 200: one /24 network holds no more.")
        self.nodes = nodes
        self.link = link or Link()
        self._tag = f"{PREFIX}{os.getpid()}-{next(_serial)}"
        self._switch = f"{self._tag}-switch"
        self._started: list[subprocess.Popen] = []

    @property
    def namespaces(self) -> list[str]:
        return [*(self._node(index) for index in range(self.nodes)), self._switch]

    def _node(self, index: int) -> str:
        return f"{self._tag}-node{index}"

    def address(self, index: int) -> str:
        return f"{SUBNET}.{index + 1}"

    def __enter__(self) -> Cluster:
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{self._tag}-"))
        try:
            self._build()
            self.shape(self.link)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        end_processes(self.namespaces)
        for process in self._started:  # one that had not entered its node yet was not found there
            process.kill()
        remove(self.namespaces)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _build(self) -> None:
        # the mapped form too: torch's store listens on IPv6 and looks its peers up as ::ffff:a.b.c.d
        names = [f"{form}{self.address(i)} node{i}" for i in range(self.nodes) for form in ("", "::ffff:")]
        (self._scratch / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *names, ""]))
        for namespace in self.namespaces:
            configure("ip", "netns", "add", namespace)
        # no IPv6 link-local addresses anywhere: their neighbour discovery would show in the counters
        self._ip(self._switch, "link add br0 type bridge stp_state 0 mcast_snooping 0")
        self._ip(self._switch, f"link set br0 mtu {self.link.mtu} addrgenmode none up")
        for index in range(self.nodes):
            node, port = self._node(index), f"port{index}"
            self._ip(node, f"link add eth0 type veth peer name {port} netns {self._switch}")
            self._ip(self._switch, f"link set {port} mtu {self.link.mtu} addrgenmode none master br0 up")
            self._ip(node, f"link set eth0 mtu {self.link.mtu} addrgenmode none up")
            self._ip(node, "link set lo up")
            self._ip(node, f"addr add {self.address(index)}/24 dev eth0")
            self._inside(node, "sh", "-c", CHOOSE_TCP_CONTROL)

    def _ip(self, namespace: str, words: str) -> str:
        return configure("ip", "-n", namespace, *words.split())

    def _inside(self, namespace: str, *argv: str, stdin: str | None = None) -> str:
        return configure("nsenter", f"--net={NAMESPACES / namespace}", *argv, stdin=stdin)

    def shape(self, link: Link) -> None:
        """Make every link like this one; possible while a run goes on."""
        if link.mtu != self.link.mtu:
            raise ValueError(f"`mtu` ({link.mtu}) must stay what it was ({self.link.mtu}): build another cluster.")
        shaped = bool(self.link.queueing_disciplines())
        for index in range(self.nodes):
            node = self._node(index)
            for namespace, device in ((node, "eth0"), (self._switch, f"port{index}")):
                present = configure("tc", "-n", namespace, "qdisc", "show", "dev", device)
                if shaped and "noqueue" not in present:
                    configure("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                for words in link.queueing_disciplines():
                    try:
                        configure("tc", "-n", namespace, "qdisc", "add", "dev", device, *words.split())
                    except ClusterError as error:
                        if "netem" in words and "unknown" in str(error):
                            raise ClusterError("this kernel has no sch_netem: leave `delay` out.") from None
                        raise
            if self.link.loss is not None and "table inet loss" in self._inside(node, "nft", "list", "tables"):
                self._inside(node, "nft", "delete table inet loss")
            if (rules := link.loss_rules("eth0")) is not None:
                self._inside(node, "nft", "-f", "-", stdin=rules)
        self.link = link

    def cut(self, index: int) -> None:
        """Pull a node's cable at the switch: packets vanish both ways, its connections are not told."""
        self._ip(self._switch, f"link set port{index} down")

    def mend(self, index: int) -> None:
        """Put the cable back."""
        self._ip(self._switch, f"link set port{index} up")

    def counters(self, index: int) -> Counters:
        """What a node counted since it was made."""
        node = self._node(index)
        texts = [self._inside(node, "cat", f"/proc/self/net/{name}") for name in ("dev", "snmp")]
        return Counters.parse(*texts)

    def start(self, index: int, argv: list[str], **popen) -> subprocess.Popen:
        """Start a command on a node. Should this process die, the command gets SIGTERM."""
        enter = ["setpriv", "--pdeathsig", "TERM", "nsenter", f"--net={NAMESPACES / self._node(index)}"]
        enter += ["unshare", "--mount", "--uts", "--", "sh", "-c", ENTER_NODE, "enter-node"]
        enter += [f"node{index}", str(self._scratch / "hosts")]
        process = subprocess.Popen([*enter, *argv], stdin=subprocess.DEVNULL, start_new_session=True, **popen)
        self._started.append(process)
        return process


def remove(namespaces: list[str]) -> None:
    """End what runs in these namespaces, then delete those that exist, and with them their links."""
    end_processes(namespaces)
    for namespace in namespaces:
        if (NAMESPACES / namespace).exists():
            configure("ip", "netns", "del", namespace)


def remove_orphans() -> list[str]:
    """Remove the clusters whose owner no longer exists (killed with SIGKILL); return the namespaces' names."""
    removed = []
    for line in configure("ip", "netns", "list").splitlines():
        name = line.split()[0]
        owner = re.fullmatch(rf"{PREFIX}(\d+)-\d+-(?:node\d+|switch)", name)
        if owner and not Path("/proc", owner[1]).exists():
            remove([name])
            for scratch in Path(tempfile.gettempdir()).glob(f"{PREFIX}{owner[1]}-*"):
                shutil.rmtree(scratch, ignore_errors=True)
            removed.append(name)
    return removed
