# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's flat modelling code: how it is made, and that it runs where hf_locmoe cannot be imported."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM, remote_code
from hf_locmoe.remote_code import AUTO_MAP, flat_sources, write_remote_code
from tests.tolerances import assert_close


_PACKAGE = Path(remote_code.__file__).parent
_INPUT_IDS = torch.arange(14).view(2, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A causal LM with what has buffers and options of its own in the router."""
    config = LocMoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        gate_rotation=True,
        balance_bias_update_rate=0.01,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("remote") / "a-model.v1"  # a name that is no identifier
    LocMoeForCausalLM(config).save_pretrained(folder)
    return folder


class TestFlatSources:
    def test_transformers_finds_exactly_these_files(self, tmp_path):
        names = write_remote_code(tmp_path)
        assert {"configuration_locmoe.py", "modeling_locmoe.py"} <= set(names) == set(os.listdir(tmp_path))
        for entry in ("configuration_locmoe.py", "modeling_locmoe.py"):
            found = {Path(file).name for file in get_relative_import_files(tmp_path / entry)}
            assert found | {entry} == set(names)

    def test_only_imports_of_the_package_are_changed(self):
        sources = flat_sources(_PACKAGE)
        by_flat_name = {
            "_".join(file.relative_to(_PACKAGE).with_suffix("").parts) + ".py": file for file in _PACKAGE.rglob("*.py")
        }
        for name, text in sources.items():
            original = by_flat_name[name].read_text(encoding="utf-8")
            if "except ImportError" not in original:
                assert len(text.splitlines()) == len(original.splitlines())
            lines = {line.strip() for line in original.splitlines()}
            assert [line for line in text.splitlines() if line.strip() not in lines and "from ." not in line] == []

    def test_no_import_leads_outside_the_folder_or_to_the_package(self, tmp_path):
        names = write_remote_code(tmp_path)
        for name in names:
            for node in ast.walk(ast.parse((tmp_path / name).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1
                    assert f"{node.module}.py" in names
            assert "hf_locmoe" not in get_imports(tmp_path / name)

    def test_flattening_the_flat_files_changes_nothing(self, tmp_path):
        write_remote_code(tmp_path)
        assert flat_sources(tmp_path) == flat_sources(_PACKAGE)

    def test_unchanged_files_are_left_alone(self, tmp_path):
        names = write_remote_code(tmp_path)
        for name in names:
            os.utime(tmp_path / name, ns=(1, 1))
        (tmp_path / names[0]).write_text("changed")
        assert write_remote_code(str(tmp_path)) == names
        assert (tmp_path / names[0]).read_text(encoding="utf-8") == flat_sources(_PACKAGE)[names[0]]
        assert {(tmp_path / name).stat().st_mtime_ns for name in names[1:]} == {1}

    @pytest.mark.parametrize("auto_class, reference", AUTO_MAP.items())
    def test_auto_map_names_what_is_registered(self, auto_class, reference):
        module, name = reference.split(".")
        target = getattr(importlib.import_module(f"hf_locmoe.{module}"), name)
        if auto_class == "AutoConfig":
            assert target is LocMoeConfig
        else:
            assert getattr(transformers, auto_class)._model_mapping[LocMoeConfig] is target


class TestFlattening:
    @staticmethod
    def package(folder: Path, **files: str) -> Path:
        for name, text in files.items():
            file = folder / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        return folder

    def test_every_form_of_import(self, tmp_path):
        package = self.package(
            tmp_path,
            modeling_locmoe="""
            import os, hashlib
            from torch import nn
            from .one import first
            from hf_locmoe.moe.two import (
                second,  # from .one import first
            )
            text = "from .one import first"
            def later():
                from  .moe.three import third as drei
            """,
            one="first = 1",
            moe__two="from ..one import first\nfrom .three import third\nfrom . three import third",
            moe__three="third = 3",
        )
        sources = flat_sources(package)
        assert list(sources) == ["modeling_locmoe.py", "moe_three.py", "moe_two.py", "one.py"]
        assert "from .moe_two import (\n    second,  # from .one" in sources["modeling_locmoe.py"]
        assert "    from .moe_three import third as drei\n" in sources["modeling_locmoe.py"]
        assert 'text = "from .one import first"' in sources["modeling_locmoe.py"]
        assert sources["moe_two.py"].startswith("from .one import first\nfrom .moe_three import third\n")

    def test_what_a_checkpoint_does_without(self, tmp_path):
        package = self.package(
            tmp_path,
            modeling_locmoe="""
            try:
                from .distributed.run import Run
            except ImportError:

                class Run:
                    pass


            try:
                import numpy
            except ImportError:
                numpy = None
            from .one import first
            """,
            one="first = 1",
            distributed__run="Run = 1",
        )
        sources = flat_sources(package)
        assert list(sources) == ["modeling_locmoe.py", "one.py"]
        assert "class Run:\n    pass\n" in sources["modeling_locmoe.py"]
        assert "import numpy" in sources["modeling_locmoe.py"]

    @pytest.mark.parametrize(
        "line", ["from . import one", "from .moe import two", "import hf_locmoe.one", "from hf_locmoe import one"]
    )
    def test_modules_as_names_are_refused(self, tmp_path, line):
        package = self.package(tmp_path, modeling_locmoe=f"\n{line}", one="", moe____init__="", moe__two="")
        with pytest.raises(ValueError, match=rf"`{line}` \(.*modeling_locmoe.py, line 2\)"):
            flat_sources(package)

    def test_two_modules_of_one_flat_name_are_refused(self, tmp_path):
        package = self.package(
            tmp_path,
            modeling_locmoe="from .moe.two import a\nfrom .moe_two import b",
            moe_two="b = 1",
            moe__two="a = 1",
        )
        with pytest.raises(ValueError, match="would both become `moe_two.py`"):
            flat_sources(package)

    def test_missing_source(self, tmp_path):
        package = self.package(tmp_path, modeling_locmoe="from .absent import a")
        with pytest.raises(FileNotFoundError, match="`absent`"):
            flat_sources(package)


_COMMIT = "c" * 40
_WITHOUT_THE_PACKAGE = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_locmoe":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())

import torch, transformers
from safetensors.torch import save_file

first, again, config_only, results = sys.argv[1:]
input_ids = torch.arange(14).view(2, 7)
report, tensors = {}, {}

config = transformers.AutoConfig.from_pretrained(first, trust_remote_code=True)
report["config"] = type(config).__module__
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
    model = getattr(transformers, name).from_pretrained(first, trust_remote_code=True).eval()
    report[name] = [type(model).__module__, type(model).__name__]
    tensors[name] = model(input_ids)[0].detach().contiguous()
    if name == "AutoModelForCausalLM":
        causal = model

causal.save_pretrained(again)
resaved = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
tensors["again"] = resaved(input_ids).logits.detach()
report["generated"] = resaved.generate(input_ids, max_new_tokens=3, do_sample=False).shape[1]
resaved.train()
resaved(input_ids, labels=input_ids).loss.backward()
report["gradients"] = all(p.grad is not None and p.grad.isfinite().all().item() for p in resaved.parameters())

from_hub = transformers.AutoModelForCausalLM.from_pretrained("someone/a-model", trust_remote_code=True).eval()
tensors["from_hub"] = from_hub(input_ids).logits.detach()
report["from_hub"] = type(from_hub).__module__

config.save_pretrained(config_only)
config = transformers.AutoConfig.from_pretrained(config_only, trust_remote_code=True)
report["from_config"] = type(transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)).__name__

report["imported"] = [name for name in sys.modules if name.split(".")[0] == "hf_locmoe"]
save_file(tensors, results + ".safetensors")
with open(results + ".json", "w") as file:
    json.dump(report, file)
"""


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """The report, the tensors and the folder of one process in which hf_locmoe cannot be imported."""
    folder = tmp_path_factory.mktemp("without")
    snapshot = folder / "hub" / "models--someone--a-model" / "snapshots" / _COMMIT
    shutil.copytree(checkpoint, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(_COMMIT)
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    arguments = [str(checkpoint), *(str(folder / name) for name in ("again", "config_only", "results"))]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THE_PACKAGE, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text()), load_file(folder / "results.safetensors"), folder


class TestWithoutThePackage:
    def test_every_auto_class_runs_the_flat_code(self, run):
        report, _, _ = run
        assert report["imported"] == []
        assert report["config"].startswith("transformers_modules.")
        for auto_class, reference in AUTO_MAP.items():
            if auto_class != "AutoConfig":
                module, name = report[auto_class]
                assert module.startswith("transformers_modules.")
                assert f"{module.split('.')[-1]}.{name}" == reference

    def test_same_outputs_as_the_installed_package(self, run, checkpoint):
        _, tensors, _ = run
        model = LocMoeForCausalLM.from_pretrained(checkpoint).eval()
        assert_close(tensors["AutoModelForCausalLM"], model(_INPUT_IDS).logits.detach())
        assert_close(tensors["AutoModel"], model.model(_INPUT_IDS).last_hidden_state.detach())
        assert tensors["AutoModelForSequenceClassification"].shape == (2, 2)
        assert tensors["AutoModelForTokenClassification"].shape == (2, 7, 2)

    def test_it_trains_and_generates(self, run):
        report, _, _ = run
        assert report["gradients"] is True
        assert report["generated"] == 10

    def test_saved_again_it_loads_with_and_without_the_package(self, run):
        _, tensors, folder = run
        assert torch.equal(tensors["again"], tensors["AutoModelForCausalLM"])
        assert set(flat_sources(_PACKAGE)) <= set(os.listdir(folder / "again"))
        model = AutoModelForCausalLM.from_pretrained(folder / "again").eval()
        assert type(model) is LocMoeForCausalLM
        assert_close(model(_INPUT_IDS).logits.detach(), tensors["again"])

    def test_out_of_the_hubs_cache(self, run):
        report, tensors, _ = run
        assert _COMMIT in report["from_hub"]
        assert torch.equal(tensors["from_hub"], tensors["AutoModelForCausalLM"])

    def test_a_configuration_saved_alone_brings_the_model_along(self, run):
        report, _, folder = run
        assert report["from_config"] == "LocMoeForCausalLM"
        assert set(flat_sources(_PACKAGE)) <= set(os.listdir(folder / "config_only"))


class TestWithThePackage:
    @pytest.mark.parametrize("trust_remote_code", [None, False, True])
    def test_the_installed_classes_are_used(self, checkpoint, trust_remote_code):
        options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
        assert type(AutoConfig.from_pretrained(checkpoint, **options)) is LocMoeConfig
        assert type(AutoModelForCausalLM.from_pretrained(checkpoint, **options)) is LocMoeForCausalLM

    def test_the_checkpoint_names_the_flat_classes(self, checkpoint):
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        for reference in AUTO_MAP.values():
            assert (checkpoint / f"{reference.split('.')[0]}.py").is_file()
