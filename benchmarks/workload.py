# SPDX-License-Identifier: Apache-2.0
"""What the training benchmarks train: real text, a tokenizer made from it in memory, small models from a seed.

The text is the source of Python's own standard library, found by import, so nothing is downloaded and every machine
with the same Python has the same text.

Shapes: T = tokens in a sequence, B = sequences in a batch.
"""

from __future__ import annotations

import copy
import importlib.util
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.distributed import DistributedConfig

from hf_locmoe.distributed.layouts import with_spread_layout


# batched_mm copies the weights per token: gigabytes where this one takes megabytes
EXPERTS_IMPLEMENTATION = "grouped_mm"


MODULES = (
    "argparse ast asyncio.base_events calendar codecs collections configparser csv ctypes dataclasses datetime decimal "
    "difflib dis doctest email.message enum fractions ftplib functools gettext heapq http.client http.server imaplib "
    "inspect ipaddress json.decoder logging mailbox mimetypes multiprocessing.managers nntplib ntpath numbers optparse "
    "os pathlib pdb pickle pickletools platform plistlib poplib posixpath pprint pydoc random shutil smtplib socket ssl "
    "statistics string subprocess tarfile tempfile textwrap threading tokenize traceback turtle types typing unittest.case "
    "unittest.mock urllib.parse urllib.request uuid weakref xml.dom.minidom zipfile"
).split()


def standard_library_text(modules: tuple[str, ...] | list[str] = MODULES) -> list[str]:
    """Source texts of these modules, in order; a module that this Python does not have as a file is left out."""
    texts = []
    for name in modules:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            texts.append(Path(spec.origin).read_text(encoding="utf-8"))
    return texts


def token_stream(texts: list[str], vocab_size: int) -> torch.Tensor:
    """The texts as one stream of token ids, int64, of a byte-level BPE trained on the texts themselves."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    return torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])


def batches(stream: torch.Tensor, batch_size: int, sequence_length: int, count: int, seed: int) -> torch.Tensor:
    """(count, B, T) int64: `count` batches of sequences drawn from the stream without overlap, shuffled by the seed."""
    available = stream.numel() // sequence_length
    wanted = count * batch_size
    if available < wanted:
        raise ValueError(
            f"`count` x `batch_size` ({wanted}) must be at most the sequences in the text ({available}): take fewer "
            "steps or shorter sequences."
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    sequences = stream[: available * sequence_length].view(available, sequence_length)[order]
    return sequences.view(count, batch_size, sequence_length)


def build(config: PreTrainedConfig, seed: int, distributed: DistributedConfig | None = None) -> PreTrainedModel:
    """A causal language model from a seed, for training.

    Args:
        config: the architecture.
        seed: of the initial weights, which are the same however the model is distributed.
        distributed: who holds what; `None` for one process. All ranks call it together.
    """
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=EXPERTS_IMPLEMENTATION)
    if distributed is not None:
        # built whole and then sharded: built sharded, every rank would draw the same weights for its own experts
        model = with_spread_layout(type(model)).from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=model.state_dict(),
            distributed_config=distributed,
            experts_implementation=EXPERTS_IMPLEMENTATION,
        )
    return model.train()


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW with one parameter group per device mesh: a foreach kernel cannot span meshes (transformers' Trainer
    splits its groups for the same reason)."""
    by_mesh = defaultdict(list)
    for parameter in model.parameters():
        by_mesh[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return torch.optim.AdamW([{"params": group} for group in by_mesh.values()], lr=lr)
