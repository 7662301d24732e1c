# SPDX-License-Identifier: Apache-2.0
"""Measures a checkpoint's perplexity on text, every token weighing the same.

Usage:

    python recipes/evaluate_perplexity.py --model_name_or_path runs/tiny_cpu --eval_file runs/corpus/validation.jsonl
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, default_data_collator

import hf_locmoe  # noqa: F401  registers `model_type: locmoe`; nothing else of it is used here
from arguments import parse_recipe, run_as_script
from text_data import DataArguments, domain_groups, load_documents, local_files, pack
from training_run import sequence_losses


METRIC = Path(__file__).parent / "metrics" / "perplexity"


@dataclass
class EvaluationArguments:
    """What to measure."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub name."})
    eval_file: list[str] | None = field(
        default=None, metadata={"help": "Local files, as `train_file` of pretrain.py."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "In place of files: a dataset of the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    eval_split: str = field(default="validation", metadata={"help": "Its split."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    domain_column: str | None = field(default=None, metadata={"help": "Column with each document's domain."})
    domain_groups: dict | str | None = field(default=None, metadata={"help": "Expert group of each domain."})
    block_size: int = field(default=1024, metadata={"help": "Tokens the model sees at a time."})
    batch_size: int = field(default=8, metadata={"help": "Blocks at a time."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most so many blocks."})
    streaming: bool = field(default=False, metadata={"help": "Read while measuring and keep nothing on disk."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    output_file: str | None = field(default=None, metadata={"help": "Also write the result here, as JSON."})


def evaluation_data(args: EvaluationArguments) -> DataArguments:
    """The same text as the data of a training run that holds nothing out.

    Raises:
        ValueError: If no source of text is given, or a file is missing.
    """
    if (args.eval_file is None) == (args.dataset_name is None):
        raise ValueError("Give either `eval_file` or `dataset_name`: one source of text is needed.")
    if args.eval_file is not None:
        local_files(args.eval_file, "eval_file")
    return DataArguments(
        train_file=args.eval_file,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_split=args.eval_split,
        validation_split="",
        validation_split_percentage=0,
        validation_documents=0,
        text_column=args.text_column,
        domain_column=args.domain_column,
        domain_groups=args.domain_groups,
        block_size=args.block_size,
        streaming=args.streaming,
    )


@torch.no_grad()
def measure(model: PreTrainedModel, blocks: Dataset, batch_size: int) -> dict[str, float]:
    """Perplexity of a model on blocks of token ids.

    Args:
        model (`PreTrainedModel`): A causal language model on its device.
        blocks (`Dataset`): Samples with `input_ids` and `labels`, all of one length.
        batch_size (`int`): Blocks at a time.

    Returns:
        `dict[str, float]`: `perplexity`, `loss` in nats a token, `num_tokens`.
    """
    metric = evaluate.load(str(METRIC))
    model.eval()
    for batch in tqdm(DataLoader(blocks, batch_size=batch_size, collate_fn=default_data_collator), desc="evaluate"):
        labels = batch.pop("labels").to(model.device)
        outputs = model(**{name: values.to(model.device) for name, values in batch.items()})
        losses, counts = sequence_losses(outputs.logits, labels).unbind(dim=1)
        metric.add_batch(predictions=losses.double().tolist(), references=counts.long().tolist())
    return metric.compute()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the recipe; returns what it prints."""
    (args,) = parse_recipe([EvaluationArguments], argv, __doc__)
    data_args = evaluation_data(args)
    documents, _ = load_documents(data_args)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    groups = domain_groups(documents, data_args)
    blocks = pack(documents, tokenizer, data_args, groups, args.max_eval_samples)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype).to(device)
    result = measure(model, blocks, args.batch_size)
    print(f"loss {result['loss']:.4f}  perplexity {result['perplexity']:.2f}  on {result['num_tokens']:,} tokens")
    if args.output_file is not None:
        Path(args.output_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    run_as_script(main)
