# SPDX-License-Identifier: Apache-2.0
"""What a result says about itself: hardware, versions, commit, load, repeats and spread; written as JSON and markdown.

A results file is `results/<theme>_<hardware>_<yyyymm>.json` with a `.md` of the same name for people. Both are made by
`Record.write`; nobody edits the JSON by hand, and a later run of the same theme, hardware and month replaces both.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "hf_locmoe")


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing: how many, the median, the quartiles and the extremes."""

    count: int
    median: float
    q1: float
    q3: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if not values:
            raise ValueError("`values` ([]) must hold at least one measurement.")
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(len(values), statistics.median(values), q1, q3, min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.q1:.3g}-{self.q3:.3g})"


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, kernel and accelerators of this machine; no name that would identify it."""
    cpu = platform.processor() or platform.machine()
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    memory_kib = int(meminfo.read_text().split()[1]) if meminfo.exists() else 0
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release().split("-")[0],
        "accelerators": [],
    }
    try:
        import torch
    except ImportError:
        return found
    if torch.cuda.is_available():
        found["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checkout, with `+changes` where tracked sources or benchmarks differ from that commit."""

    def git(*argv: str) -> str:
        return subprocess.run(
            ["git", *argv], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "-s", "-uno", "--", "../src", ".") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Load:
    """How busy others kept the machine during a stretch of time: `with Load() as load: ...; load.result()`.

    On a shared machine this says how far the times can be trusted. Processor time of this process and of the children
    that it has waited for counts as own, everything else as others'.
    """

    def __enter__(self) -> Load:
        self._load_before = os.getloadavg()[0]
        self._wall, self._busy, self._own = time.monotonic(), self._busy_s(), self._own_s()
        return self

    def __exit__(self, *_) -> None:
        wall, busy, own = time.monotonic() - self._wall, self._busy_s() - self._busy, self._own_s() - self._own
        self._others = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _busy_s() -> float:
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own_s() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    def result(self) -> dict[str, float]:
        """Load average before, the share of all cores that others used meanwhile, and this process's nice value."""
        return {
            "load_average_before": round(self._load_before, 2),
            "cpu_share_of_others": round(self._others, 3),
            "nice": os.nice(0),
        }


@dataclass
class Record:
    """One answered question.

    Args:
        theme: first part of the file's name.
        question: what was asked, one sentence.
        config: everything that was chosen: model, sizes, seed, links.
        command: how to repeat it.
        rows: one flat dict per row of the table; a `Spread` is a value like any other.
        columns: the table's columns, key to heading, in order; other keys are in the JSON only.
        notes: what a reader must know to judge the figures, negative results included.
        load: what `Load.result` said.
        extra: raw measurements, for the JSON only.
    """

    theme: str
    question: str
    config: dict[str, Any]
    command: str
    rows: list[dict[str, Any]]
    columns: dict[str, str]
    notes: list[str] = field(default_factory=list)
    load: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """The rows as a markdown table."""
        cells = [[_cell(row.get(key, "")) for key in self.columns] for row in self.rows]
        head = list(self.columns.values())
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])

    def markdown(self, about: dict[str, Any]) -> str:
        """The page for people, `about` being what `write` found out about machine and checkout."""
        machine = about["hardware"]
        parts = [
            f"# {self.theme.replace('_', ' ')}",
            self.question,
            self.table(),
            *(["\n".join(f"* {note}" for note in self.notes)] if self.notes else []),
            "## How it was measured",
            f"`{self.command}`, {about['date']}, commit {about['commit']}.",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}"
            + "".join(f", {name}" for name in machine["accelerators"])
            + "; "
            + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
            + ".",
            *(
                ["Load: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in self.load.items()) + "."]
                * bool(self.load)
            ),
            "Configuration: " + ", ".join(f"{k} {_cell(v)}" for k, v in self.config.items()) + ".",
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, hardware_name: str, directory: Path = RESULTS, about: dict[str, Any] | None = None) -> Path:
        """Write both files and return the markdown's path. `hardware_name` is short, like `4core-2x2`; `about` is what
        was found out where it was measured (`date`, `commit`, `hardware`, `versions`), if not here and now."""
        today = datetime.datetime.now(datetime.timezone.utc).date()
        about = about or {"date": str(today), "commit": commit(), "hardware": hardware(), "versions": versions()}
        stem = directory / f"{self.theme}_{hardware_name}_{today:%Y%m}"
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**about, **asdict(self)}, indent=1)
        stem.with_suffix(".json").write_text(text + "\n")
        stem.with_suffix(".md").write_text(self.markdown(about))
        return stem.with_suffix(".md")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return " / ".join(_cell(item) for item in value)
    return str(value)
