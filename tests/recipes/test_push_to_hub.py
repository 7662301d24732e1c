# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import socket

import pytest
from huggingface_hub import ModelCard

import push_to_hub

from .conftest import options


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def dry_run(folder, **others) -> list[str]:
    run = options(checkpoint_dir=folder, repo_id="me/tiny", dry_run="true", **others)
    return [path.as_posix() for path in push_to_hub.main(run)]


def test_dry_run_sends_nothing_and_lists_the_model(folder, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise AssertionError("the dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "model.safetensors").touch()
    (folder / "optimizer.pt").touch()
    files = dry_run(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert not [name for name in files if name.startswith("checkpoint-") or name.endswith((".pt", ".bin"))]
    assert "nothing was sent to me/tiny" in capsys.readouterr().out


def test_the_card_of_the_run_stays_and_takes_facts(folder):
    before = ModelCard.load(folder / "README.md")
    dry_run(folder, license="apache-2.0", language=["en", "code"], datasets=["some/text"])
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "code"]
    assert card.data.datasets == ["some/text"]
    assert card.text.strip() == before.text.strip()


def test_a_card_is_written_where_none_is(folder):
    (folder / "README.md").unlink()
    dry_run(folder, license="apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "config.json").unlink(), r"`checkpoint_dir` .* holds no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"`checkpoint_dir` .* holds no \*.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 100), "holds a damaged file"),
    ],
)
def test_incomplete_checkpoints(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        dry_run(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="holds a damaged file"):
        dry_run(folder)


@pytest.mark.parametrize("repo_id", ["a/b/c", "with space/x", "-x/y"])
def test_a_name_that_the_hub_refuses(folder, repo_id):
    with pytest.raises(ValueError, match="`repo_id`"):
        push_to_hub.main(options(checkpoint_dir=folder, dry_run="true") + [f"--repo_id={repo_id}"])


def test_pushing_creates_and_uploads(folder, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, *args, **kwargs):
            calls.append(("create", args, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload", (), kwargs))

    monkeypatch.setattr(push_to_hub, "HfApi", Api)
    files = push_to_hub.main(options(checkpoint_dir=folder, repo_id="me/tiny", private="true"))
    assert calls[0] == ("create", ("me/tiny",), {"private": True, "exist_ok": True})
    assert calls[1][2]["allow_patterns"] == [path.as_posix() for path in files]
    assert calls[1][2]["repo_id"] == "me/tiny"
