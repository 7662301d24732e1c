# SPDX-License-Identifier: Apache-2.0
"""
The text of `bench_locality`: eight plainly different domains that every machine with this environment has, identically mixed.

Seven come from the standard library (`recipes/corpus.py`), the eighth is torch's own C++ headers. Every sequence is cut
from one domain, and all sequences are shuffled together: no rank, node or step sees a mixture of its own.

Made once and kept as one small file, which can be carried to other machines: another Python has other text.

Shapes: S = sequences of a part, Q = tokens of a sequence.
"""

from __future__ import annotations

import io
import lzma
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer

from recipes.corpus import DOMAINS, Source, build_corpus


MAX_CHARS = 800_000  # of a domain


def headers() -> Iterator[Source]:
    """C++ headers that the torch wheel carries."""
    root = Path(torch.__file__).parent / "include"
    for path in sorted(root.rglob("*.h")):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="ignore")


@dataclass(frozen=True)
class Sequences:
    """
    One part of the data.

    Args:
        input_ids (`torch.Tensor` of shape `(S, Q)`): Int16 token ids, shuffled.
        domain (`torch.Tensor` of shape `(S,)`): Int8, which domain a sequence is from; for the row that is told.
        domains (`list[str]`): Their names.
    """

    input_ids: torch.Tensor
    domain: torch.Tensor
    domains: list[str]

    def batches(self, size: int, count: int, seed: int) -> torch.Tensor:
        """(count, size) int64 sequence numbers: epoch after epoch, each in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-count * size // len(self.input_ids))
        order = torch.cat([torch.randperm(len(self.input_ids), generator=generator) for _ in range(epochs)])
        return order[: count * size].view(count, size)


def prepare(path: Path, vocab_size: int, max_chars: int = MAX_CHARS) -> None:
    """Makes the file at `path`: the token ids of every domain, one stream for training and one for validation."""
    corpus = build_corpus(max_chars, domains={**DOMAINS, "headers": headers}, show_progress=False)
    tokenizer = ByteLevelBPETokenizer()
    texts = [document["text"] for document in corpus.train]
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    streams: dict[str, dict[str, torch.Tensor]] = {}
    for part in ("train", "validation"):
        ids: dict[str, list[int]] = defaultdict(list)
        for document in getattr(corpus, part):
            ids[document["domain"]] += tokenizer.encode(document["text"]).ids
        streams[part] = {name: torch.tensor(ids[name], dtype=torch.int16) for name in sorted(ids)}
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(streams, buffer)
    path.write_bytes(lzma.compress(buffer.getvalue()))


def load(path: Path, sequence_length: int) -> dict[str, Sequences]:
    """The parts `train` and `validation` of the file, cut into sequences."""
    streams = torch.load(io.BytesIO(lzma.decompress(path.read_bytes())))
    return {part: cut(ids, sequence_length) for part, ids in streams.items()}


def cut(streams: dict[str, torch.Tensor], sequence_length: int) -> Sequences:
    """Sequences of one domain each, all domains shuffled together; what is left over at a domain's end is dropped."""
    pieces = [
        ids[: len(ids) // sequence_length * sequence_length].view(-1, sequence_length) for ids in streams.values()
    ]
    domain = torch.cat([torch.full((len(ids),), index, dtype=torch.int8) for index, ids in enumerate(pieces)])
    order = torch.randperm(len(domain), generator=torch.Generator().manual_seed(0))
    return Sequences(torch.cat(pieces)[order], domain[order], list(streams))


__all__ = ["Sequences", "cut", "load", "prepare"]
