# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json

import datasets
import numpy as np
import pytest

import text_data
from text_data import DataArguments, domain_groups, load_documents, local_files, pack, token_counts
from train_tokenizer import END_OF_TEXT, train_tokenizer

from .conftest import documents, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((row["text"] for row in documents(40, seed=0)), 300, show_progress=False)


def arguments(*paths, **others) -> DataArguments:
    return DataArguments(train_file=[str(path) for path in paths], **{"block_size": 16, **others})


def rows_of(dataset) -> list[dict]:
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in dataset]


def test_tokenizer_encodes_any_text(tokenizer):
    text = "wave  tide\tδέλτα\n\x00 🌊"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer(" harbour harbour")["input_ids"]) < len(" harbour harbour")  # merges were learned


def test_tokenizer_needs_all_bytes():
    with pytest.raises(ValueError, match=r"`vocab_size` \(100\) must be at least 258"):
        train_tokenizer(iter(["a"]), 100)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "jsonl.gz", "txt"])
def test_formats(tmp_path, suffix):
    texts = [row["text"] for row in documents(20, seed=0)]
    path = tmp_path / f"text.{suffix}"
    if suffix == "txt":
        path.write_text("\n".join(texts) + "\n")
    elif suffix == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    else:
        write = {"parquet": "to_parquet", "csv": "to_csv"}.get(suffix, "to_json")
        getattr(datasets.Dataset.from_dict({"text": texts}), write)(str(path))
    train, validation = load_documents(arguments(path, validation_split_percentage=20))
    assert len(validation) == 4
    assert sorted(text.rstrip("\n") for text in train["text"][:] + validation["text"][:]) == sorted(texts)


def test_held_out_documents_are_held_out(text_dir):
    args = arguments(text_dir / "train.jsonl", validation_split_percentage=10)
    train, validation = load_documents(args, seed=3)
    assert len(validation) == 6
    assert not set(train["text"]) & set(validation["text"])
    assert rows_of(load_documents(args, seed=3)[1]) == rows_of(validation)
    assert rows_of(load_documents(args, seed=4)[1]) != rows_of(validation)


def test_plain_text_holds_out_its_end_and_keeps_its_lines(tmp_path, tokenizer):
    text = "".join(f"line {number} of the text\n" for number in range(100))
    (tmp_path / "text.txt").write_text(text)
    args = arguments(tmp_path / "text.txt", validation_split_percentage=10)
    train, validation = load_documents(args)
    assert "".join(train["text"]) + "".join(validation["text"]) == text
    packed = np.concatenate(pack(train, tokenizer, args)["input_ids"])
    assert text.startswith(tokenizer.decode(packed))  # joined as they are, without a mark between lines


def test_packing_is_the_tokens_joined_by_the_end_of_text(tokenizer, text_dir):
    args = arguments(text_dir / "train.jsonl")
    train, _ = load_documents(args)
    joined = []
    for text in train["text"]:
        joined += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    blocks = pack(train, tokenizer, args)
    assert np.concatenate(blocks["input_ids"]).tolist() == joined[: len(joined) // 16 * 16]
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert set(blocks.column_names) == {"input_ids", "labels"}
    assert token_counts(blocks, 300).tolist() == np.bincount(joined[: len(joined) // 16 * 16], minlength=300).tolist()
    assert len(pack(train, tokenizer, args, max_samples=3)) == 3


def test_each_token_has_its_document_s_group(tokenizer, text_dir):
    args = arguments(text_dir / "train.jsonl", domain_column="domain")
    train, _ = load_documents(args)
    groups = domain_groups(train, args)
    assert groups == {"sea": 0, "wood": 1}
    expected = []
    for row in train:
        expected += [groups[row["domain"]]] * (len(tokenizer(row["text"])["input_ids"]) + 1)
    blocks = pack(train, tokenizer, args, groups)
    found = np.concatenate(blocks["domain_ids"]).tolist()
    assert found == expected[: len(found)]
    assert {0, 1} == set(found)


def test_domain_groups_are_taken_as_given(text_dir):
    given = {"sea": 1, "wood": 1, "sky": 0}
    args = arguments(text_dir / "train.jsonl", domain_column="domain", domain_groups=given)
    assert domain_groups(load_documents(args)[0], args) == given


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_streaming_equals_not_streaming(tokenizer, tmp_path, kind):
    path = tmp_path / f"text.{kind}"
    rows = documents(30, seed=2)
    if kind == "txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    else:
        write_jsonl(path, rows)
    blocks = []
    for streaming in (False, True):
        args = arguments(path, streaming=streaming, validation_split_percentage=0, validation_documents=0)
        train, validation = load_documents(args)
        assert validation is None
        assert isinstance(train, datasets.IterableDataset) == streaming
        blocks.append(rows_of(pack(train, tokenizer, args)))
    assert blocks[0] == blocks[1]
    assert len(blocks[0]) > 20


def test_a_stream_holds_out_its_head(text_dir):
    train, validation = load_documents(arguments(text_dir / "train.jsonl", streaming=True, validation_documents=4))
    texts = [row["text"] for row in documents(60, seed=0)]
    assert [row["text"] for row in validation] == texts[:4]
    assert [row["text"] for row in train] == texts[4:]
    with pytest.raises(ValueError, match=r"`validation_documents` \(60\) leaves no document"):
        load_documents(arguments(text_dir / "train.jsonl", streaming=True, validation_documents=60))


def test_texts_that_are_missing_are_skipped(tokenizer, tmp_path):
    rows = [{"text": "wave tide reef " * 20}, {"text": None}, {"text": ""}, {"text": "moss fern root " * 20}]
    args = arguments(write_jsonl(tmp_path / "t.jsonl", rows), validation_split_percentage=0)
    ids = np.concatenate(pack(load_documents(args)[0], tokenizer, args)["input_ids"])
    assert (ids == tokenizer.eos_token_id).sum() <= 2


def test_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, documents(2, seed=0))
    assert local_files([str(tmp_path / "*.jsonl")], "train_file") == (
        "json",
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, r"either `train_file` or `dataset_name` \(neither given\)"),
        ({"train_file": ["a"], "dataset_name": "b"}, r"either `train_file` or `dataset_name` \(both given\)"),
        ({"train_file": ["a"], "block_size": 1}, r"`block_size` \(1\)"),
        ({"train_file": ["a"], "validation_split_percentage": 100}, r"`validation_split_percentage` \(100\)"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings)


def test_one_file_in_a_configuration_needs_no_list():
    assert DataArguments(train_file="a.txt").train_file == ["a.txt"]


def test_wrong_files(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    write_jsonl(tmp_path / "good.jsonl", documents(2, seed=0))
    (tmp_path / "one.txt").write_text("one line\n")
    for paths, others, message in (
        (["missing.txt"], {}, r"`train_file` \(.*missing.txt\) matches no file"),
        (["empty.jsonl"], {}, r"`train_file` \(.*empty.jsonl\) is empty"),
        (["notes.doc"], {}, r"must be files of one format among .txt, .json"),
        (["good.jsonl", "one.txt"], {}, "must be files of one format"),
        (["broken.jsonl"], {}, "cannot be read as json"),
        (["good.jsonl"], {"validation_file": [str(tmp_path / "one.txt")]}, r"`validation_file` \(text\)"),
        (["good.jsonl"], {"text_column": "body"}, r"`text_column` \(body\) .* among text, domain"),
        (["good.jsonl"], {"domain_column": "topic"}, r"`domain_column` \(topic\) is not a column"),
        (["one.txt"], {}, "single document"),
    ):
        with pytest.raises(ValueError, match=message):
            load_documents(arguments(*(tmp_path / path for path in paths), **others))


def test_a_column_of_numbers_is_no_text(tmp_path):
    path = write_jsonl(tmp_path / "numbers.jsonl", [{"text": 1}, {"text": 2}])
    with pytest.raises(ValueError, match=r"`text_column` \(text\) holds int"):
        load_documents(arguments(path))


def test_too_little_text_for_a_block(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "short.jsonl", [{"text": "wave"}, {"text": "tide"}])
    args = arguments(path, block_size=512, validation_split_percentage=0)
    for streaming in (False, True):
        args.streaming, args.validation_documents = streaming, 0
        with pytest.raises(ValueError, match=r"`block_size` \(512\) is more than the tokens"):
            pack(load_documents(args)[0], tokenizer, args)


def test_domains_that_nobody_listed(tokenizer, text_dir):
    args = arguments(text_dir / "train.jsonl", domain_column="domain", streaming=True, validation_documents=2)
    train, _ = load_documents(args)
    with pytest.raises(ValueError, match="`domain_groups` must list the domains of a stream"):
        domain_groups(train, args)
    with pytest.raises(ValueError, match=r"`domain_groups` \(sea\) lacks the domain 'wood'"):
        pack(train, tokenizer, args, {"sea": 0})


def test_splits_of_the_hub(monkeypatch):
    """Names go to `load_dataset` as given; a split that is not there is named."""
    asked = []

    def load_dataset(name, config, streaming):
        asked.append((name, config, streaming))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(documents(10, seed=0))})

    monkeypatch.setattr(text_data, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"`train_split` \(train\) is not a split of some/name: choose among test"):
        load_documents(DataArguments(dataset_name="some/name", dataset_config_name="small"))
    train, validation = load_documents(DataArguments(dataset_name="some/name", train_split="test"))
    assert (len(train), len(validation)) == (9, 1)
    assert asked == [("some/name", "small", False), ("some/name", None, False)]
