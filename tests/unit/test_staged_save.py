# SPDX-License-Identifier: Apache-2.0
"""A save that fails, or is killed at any step, leaves a folder that loads as the earlier or as the new checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError

import hf_locmoe.staged_save as staged_save_module
from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from hf_locmoe.staged_save import staged_save


_SHARDED = {"max_shard_size": "12KB"}
_OTHERWISE_SHARDED = {"max_shard_size": "7KB"}
_WHOLE: dict = {}


@pytest.fixture(autouse=True)
def _one_file_of_code(monkeypatch):
    """The flat modelling code is another test's: one file of it stands for all, to keep the number of steps small."""
    write = lambda folder: Path(folder, "modeling_locmoe.py").write_bytes(b"# code")  # noqa: E731
    monkeypatch.setattr("hf_locmoe.configuration_locmoe.write_remote_code", write)


def make_model(seed: int, **overrides) -> LocMoeForCausalLM:
    torch.manual_seed(seed)
    shape = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=1)
    return LocMoeForCausalLM(LocMoeConfig(**{**shape, "num_experts": 4, **overrides}))


def fingerprint(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Killed(BaseException):
    """Stands for SIGKILL: from then on the process does nothing more to the file system."""


class Kill:
    """Ends the process at the n-th call of those that change a folder; counts them when n is None."""

    functions = (
        (os, "replace"),
        (os, "link"),
        (os, "unlink"),
        (os, "rmdir"),
        (shutil, "rmtree"),
        (Path, "write_text"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None):
        self.calls, self.at = 0, at
        for owner, name in self.functions:
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def wrapper(*args, **kwargs):
            if self.at is not None and self.calls >= self.at:
                raise Killed
            self.calls += 1
            return function(*args, **kwargs)

        return wrapper


class TestKilledAtAnyStep:
    @pytest.mark.parametrize(
        "before, after, overrides",
        [
            (_WHOLE, _WHOLE, {}),
            (_SHARDED, _OTHERWISE_SHARDED, {}),
            (_SHARDED, _WHOLE, {}),
            (_WHOLE, _SHARDED, {"num_experts": 6, "num_experts_per_tok": 2}),
            (_SHARDED, _SHARDED, {"num_experts_per_tok": 2}),  # the same names and shapes under another configuration
        ],
        ids=["whole", "resharded", "to-whole", "reconfigured", "same-shapes"],
    )
    def test_over_an_earlier_checkpoint(self, tmp_path, before, after, overrides):
        old, new = make_model(0), make_model(1, **overrides)
        old_state, new_state = fingerprint(old), fingerprint(new)
        old.save_pretrained(tmp_path / "earlier", **before)

        with pytest.MonkeyPatch.context() as monkeypatch:
            kill = Kill(monkeypatch)
            shutil.copytree(tmp_path / "earlier", tmp_path / "counted")
            new.save_pretrained(tmp_path / "counted", **after)
            num_steps = kill.calls
        assert num_steps > 7
        seen = set()
        for step in range(num_steps + 1):
            target = tmp_path / f"killed-{step}"
            shutil.copytree(tmp_path / "earlier", target)
            with pytest.MonkeyPatch.context() as monkeypatch:
                Kill(monkeypatch, at=step)
                try:
                    new.save_pretrained(target, **after)
                except Killed:
                    pass
            loaded = LocMoeForCausalLM.from_pretrained(target)
            is_new = is_same(loaded, new_state)
            assert is_new or is_same(loaded, old_state), f"a mixture after step {step}"
            per_token = new.config.num_experts_per_tok if is_new else old.config.num_experts_per_tok
            assert loaded.config.num_experts_per_tok == per_token
            seen.add(is_new)
            # a configuration saved over what is left neither loses the weights nor leaves the pieces
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(staged_save_module, "_is_running", lambda pid: False)
                loaded.config.save_pretrained(target)
            assert is_same(LocMoeForCausalLM.from_pretrained(target), new_state if is_new else old_state)
            assert not list(target.glob("_saving-*"))
            shutil.rmtree(target)
        assert seen == {False, True}

    def test_into_a_new_folder(self, tmp_path):
        new = make_model(1)
        state = fingerprint(new)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill = Kill(monkeypatch)
            new.save_pretrained(tmp_path / "counted", **_SHARDED)
        for step in range(kill.calls):
            target = tmp_path / f"killed-{step}"
            with pytest.MonkeyPatch.context() as monkeypatch:
                Kill(monkeypatch, at=step)
                with pytest.raises(Killed):
                    new.save_pretrained(target, **_SHARDED)
            if (target / "config.json").exists():
                assert is_same(LocMoeForCausalLM.from_pretrained(target), state)
            else:
                with pytest.raises(ValueError, match="no `config.json`"):
                    LocMoeForCausalLM.from_pretrained(target)
            new.save_pretrained(target, **_SHARDED)
            assert is_same(LocMoeForCausalLM.from_pretrained(target), state)
            shutil.rmtree(target)


class TestLayouts:
    def test_overwriting_leaves_the_files_of_the_last_layout_only(self, tmp_path):
        clean = {}
        for name, layout in (("whole", _WHOLE), ("sharded", _SHARDED), ("otherwise", _OTHERWISE_SHARDED)):
            make_model(0).save_pretrained(tmp_path / name, **layout)
            clean[name] = contents(tmp_path / name)
        target = tmp_path / "target"
        for name in ("sharded", "whole", "otherwise", "sharded", "whole", "whole"):
            layout = {"whole": _WHOLE, "sharded": _SHARDED, "otherwise": _OTHERWISE_SHARDED}[name]
            make_model(0).save_pretrained(target, **layout)
            assert contents(target) == clean[name]

    def test_other_files_and_variants_stay(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / "checkpoint-5").mkdir()
        (tmp_path / "checkpoint-5" / "model-00001-of-00002.safetensors").write_text("of another checkpoint")
        old, new = make_model(0), make_model(1)
        old.save_pretrained(tmp_path, variant="half", **_SHARDED)
        new.save_pretrained(tmp_path)
        assert is_same(LocMoeForCausalLM.from_pretrained(tmp_path, variant="half"), fingerprint(old))
        assert is_same(LocMoeForCausalLM.from_pretrained(tmp_path), fingerprint(new))
        new.save_pretrained(tmp_path, variant="half")
        assert (
            not list(tmp_path.glob("model.half-*")) and not (tmp_path / "model.safetensors.index.half.json").exists()
        )
        assert is_same(LocMoeForCausalLM.from_pretrained(tmp_path, variant="half"), fingerprint(new))
        assert (tmp_path / "tokenizer.json").exists()
        assert (tmp_path / "checkpoint-5" / "model-00001-of-00002.safetensors").exists()

    def test_without_hard_links(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise OSError(errno.EPERM, "no links here")

        make_model(0).save_pretrained(tmp_path)
        monkeypatch.setattr(os, "link", refuse)
        new = make_model(1)
        new.save_pretrained(tmp_path, **_SHARDED)
        assert is_same(LocMoeForCausalLM.from_pretrained(tmp_path), fingerprint(new))
        assert not list(tmp_path.glob("_saving-*"))

    def test_a_model_whose_weights_are_mapped_from_the_file_it_overwrites(self, tmp_path):
        make_model(0).save_pretrained(tmp_path)
        loaded = LocMoeForCausalLM.from_pretrained(tmp_path)
        state = fingerprint(loaded)
        loaded.save_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path, **_SHARDED)
        assert is_same(LocMoeForCausalLM.from_pretrained(tmp_path), state)


_STOPS = ["config.json", "generation_config.json", "modeling_locmoe.py", "index", "shard", "flush"]


class TestFailures:
    @staticmethod
    def fail_at(monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
        """The disk is full at one of the files."""
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def failing(*args, **kwargs):
            raise full

        if stop == "config.json":
            monkeypatch.setattr("transformers.PreTrainedConfig.to_json_file", failing)
        elif stop == "generation_config.json":
            monkeypatch.setattr("transformers.GenerationConfig.to_json_file", failing)
        elif stop == "modeling_locmoe.py":
            monkeypatch.setattr(Path, "write_bytes", failing)
        elif stop == "flush":
            monkeypatch.setattr(os, "fsync", failing)
        elif stop == "index":
            real_dumps = json.dumps

            def dumps(value, *args, **kwargs):
                if isinstance(value, dict) and "weight_map" in value:
                    raise full
                return real_dumps(value, *args, **kwargs)

            monkeypatch.setattr(json, "dumps", dumps)
        else:
            real_save, calls = transformers.modeling_utils.safe_save_file, []

            def third_fails(tensors, filename, metadata=None):
                calls.append(filename)
                if len(calls) == 3:
                    Path(filename).write_bytes(b"half")
                    raise SafetensorError("Error while serializing: I/O error: Os { code: 28, kind: StorageFull }")
                return real_save(tensors, filename, metadata=metadata)

            monkeypatch.setattr("transformers.modeling_utils.safe_save_file", third_fails)

    @pytest.mark.parametrize("stop", _STOPS)
    def test_a_full_disk_at_any_file_leaves_the_earlier_checkpoint(self, tmp_path, stop):
        target = tmp_path / "target"
        make_model(0).save_pretrained(target, **_SHARDED)
        earlier = contents(target)
        with pytest.MonkeyPatch.context() as monkeypatch:
            self.fail_at(monkeypatch, stop)
            with pytest.raises(
                OSError, match=r"`save_directory` \(.*target\).*No space left.*bytes are needed"
            ) as raised:
                make_model(1).save_pretrained(target, **_SHARDED)
        assert raised.value.errno == errno.ENOSPC
        assert contents(target) == earlier
        assert set(os.listdir(target)) == set(earlier)  # no empty temporary folder either

    @pytest.mark.parametrize("stop", _STOPS)
    def test_a_full_disk_leaves_no_new_folder(self, tmp_path, monkeypatch, stop):
        self.fail_at(monkeypatch, stop)
        with pytest.raises(OSError, match="No space left"):
            make_model(1).save_pretrained(tmp_path / "target", **_SHARDED)
        assert os.listdir(tmp_path) == []

    def test_too_small_a_disk_is_seen_beforehand(self, tmp_path, monkeypatch):
        model = make_model(0)
        needed = sum(parameter.numel() * 4 for parameter in model.parameters())
        usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(
            "transformers.PreTrainedConfig.to_json_file", lambda *args, **kwargs: pytest.fail("too late")
        )
        with pytest.raises(OSError, match=f"{needed:,} bytes are needed, {needed - 1:,} are free"):
            model.save_pretrained(tmp_path / "target")
        assert os.listdir(tmp_path) == []

    def test_a_file_in_the_place_of_the_folder(self, tmp_path):
        (tmp_path / "target").write_text("precious")
        with pytest.raises(OSError, match=r"`save_directory` \(.*target\)"):
            make_model(0).save_pretrained(tmp_path / "target")
        assert (tmp_path / "target").read_text() == "precious"

    def test_an_unwritable_place(self):
        with pytest.raises(OSError, match=r"`save_directory` \(/proc/locmoe\)"):
            make_model(0).save_pretrained("/proc/locmoe")

    def test_errors_of_another_kind_pass_and_leave_nothing(self, tmp_path):
        def fail():
            with staged_save(tmp_path / "target") as staging:
                Path(staging, "config.json").write_text("{}")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert os.listdir(tmp_path) == []

    def test_a_failure_after_the_switch_says_that_the_new_checkpoint_loads(self, tmp_path, monkeypatch):
        make_model(0).save_pretrained(tmp_path)
        new = make_model(1)
        real_unlink = os.unlink

        def refuse(path, *args, **kwargs):
            if Path(path).name == "model.safetensors":
                raise PermissionError(errno.EPERM, "immutable")
            real_unlink(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            with pytest.raises(OSError, match="whole and loads"):
                new.save_pretrained(tmp_path, **_SHARDED)
        assert is_same(LocMoeForCausalLM.from_pretrained(tmp_path), fingerprint(new))
        monkeypatch.setattr(staged_save_module, "_is_running", lambda pid: False)
        new.save_pretrained(tmp_path, **_SHARDED)
        assert not list(tmp_path.glob("_saving-*")) and not (tmp_path / "model.safetensors").exists()

    def test_what_a_running_process_and_other_hosts_write_is_left_alone(self, tmp_path):
        mine = tmp_path / f"_saving-{socket.gethostname()}-{os.getpid()}-abc"
        other = tmp_path / "_saving-some-other-host-1-abc"
        for folder in (mine, other):
            folder.mkdir()
        make_model(0).save_pretrained(tmp_path)
        assert mine.exists() and other.exists()


_SAVE_SCRIPT = """
import resource, signal, sys, torch
from hf_locmoe import LocMoeForCausalLM
target, limit = sys.argv[1], int(sys.argv[2])
model = LocMoeForCausalLM.from_pretrained(target)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1.0)
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("saving", flush=True)
while True:
    model.save_pretrained(target, max_shard_size="12KB")
"""


class TestRealProcesses:
    def test_a_file_size_limit(self, tmp_path):
        """The kernel refuses the write in the middle of a weight file, as it does on a full disk."""
        make_model(0).save_pretrained(tmp_path, **_SHARDED)
        earlier = contents(tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", _SAVE_SCRIPT, str(tmp_path), "10000"], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 1
        assert f"OSError: [Errno {errno.EFBIG}] Saving to `save_directory` ({tmp_path})" in done.stderr
        assert contents(tmp_path) == earlier

    def test_kill_9_in_the_middle(self, tmp_path):
        model = make_model(0)
        model.save_pretrained(tmp_path, **_SHARDED)
        states = [fingerprint(model)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        states.append(fingerprint(model))
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVE_SCRIPT, str(tmp_path), "0"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout.readline() == "saving\n"
            time.sleep(0.25)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        loaded = LocMoeForCausalLM.from_pretrained(tmp_path)
        assert any(is_same(loaded, state) for state in states)
        loaded.save_pretrained(tmp_path, **_SHARDED)
        assert not list(tmp_path.glob("_saving-*"))
