# SPDX-License-Identifier: Apache-2.0
"""What is built and installed: version, contents, dependencies, and that the wheel works where nothing else of ours is."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import hf_locmoe


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_ROOT = Path(__file__).resolve().parents[2]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made from it (so that a file missing from the sdist is missed)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(_ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    The interpreter of an environment that holds the wheel alone, and finds its dependencies where they are installed.

    The dependencies come from a `.pth` line: a folder reached so has its own `.pth` files ignored, so the checkout,
    which is installed there in editable mode, is not on the path.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(built[1]),
    ]
    subprocess.run(install, check=True, capture_output=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _run(*command: str | Path, cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    completed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environ)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout.strip()


def test_one_version_everywhere():
    assert hf_locmoe.__version__ == _PROJECT["version"]
    assert str(yaml.safe_load((_ROOT / "CITATION.cff").read_text())["version"]) == _PROJECT["version"]


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (_ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:])
    kinds = set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((_ROOT / "CITATION.cff").read_text())
    assert citation["authors"] == [{"name": "The hf_locmoe authors"}]
    assert citation["preferred-citation"]["url"].endswith("2401.13920")
    assert len(citation["preferred-citation"]["authors"]) == 9


@pytest.mark.parametrize(
    "group, name, target",
    [("scripts", name, target) for name, target in _PROJECT["scripts"].items()]
    + [(group, *entry) for group, entries in _PROJECT.get("entry-points", {}).items() for entry in entries.items()],
)
def test_every_entry_point_resolves(group, name, target):
    module, _, attribute = target.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute)), f"{group} {name} = {target}"


def test_the_wheel_holds_what_src_holds_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    sources = {path.relative_to(_ROOT / "src").as_posix() for path in (_ROOT / "src").rglob("*.py")}
    assert sources <= set(names)
    assert "hf_locmoe/py.typed" in names
    packages = {source.split("/")[0] for source in sources}
    assert {name.split("/")[0] for name in names} == packages | {f"hf_locmoe-{_PROJECT['version']}.dist-info"}


def test_the_sdist_builds_and_carries_its_licence(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/hf_locmoe/py.typed"} <= names


def test_installing_pulls_only_what_is_needed(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        headers = Parser().parsestr(wheel.read(metadata).decode())
    required = [line for line in headers.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line).group() for line in required} == {
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "numpy",
    }
    assert {"peft", "eval", "report", "dev"} == set(headers.get_all("Provides-Extra"))
    assert headers["License-Expression"] == "Apache-2.0"


def test_the_wheel_works_in_a_clean_environment(clean_python, tmp_path):
    program = (
        "import hf_locmoe, importlib.metadata, transformers\n"
        "config = hf_locmoe.LocMoeConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,\n"
        "                                num_attention_heads=2, num_experts=2)\n"
        "transformers.AutoModelForCausalLM.from_config(config)\n"
        "print(hf_locmoe.__file__, importlib.metadata.version('hf-locmoe'))"
    )
    file, version = _run(clean_python, "-c", program, cwd=tmp_path).splitlines()[-1].split()
    assert Path(file).is_relative_to(clean_python.parents[1])
    assert version == _PROJECT["version"]


def test_the_command_is_installed(clean_python, tmp_path):
    assert "usage" in _run(clean_python.parent / "locmoe", "--help", cwd=tmp_path).lower()
