# SPDX-License-Identifier: Apache-2.0
"""Trains LoRA adapters on a checkpoint's attention and on its experts.

Usage:

    python recipes/finetune_lora.py --model_name_or_path runs/tiny_cpu --train_file my.txt --output_dir runs/lora \\
        --merged_output_dir runs/lora_merged

Options are those of finetune.py and the ones below.
"""

from dataclasses import dataclass, field

from peft import LoraConfig, TaskType, get_peft_model
from transformers import PreTrainedModel, TrainingArguments, set_seed

import hf_locmoe  # noqa: F401  registers `model_type: locmoe`; nothing else of it is used here
from arguments import parse_recipe, prepare_output_dir, run_as_script
from finetune import FinetuneArguments, load_model, prepare_data
from text_data import DataArguments
from training_run import train_and_report


EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' experts interface


@dataclass
class LoraArguments:
    """The adapters."""

    lora_r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale, divided by the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on attention; experts' adapters have none."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers; q_proj k_proj v_proj o_proj when left out."}
    )
    lora_experts: bool = field(default=True, metadata={"help": "Whether the experts get adapters too."})
    merged_output_dir: str | None = field(
        default=None, metadata={"help": "Also save the model with the adapters merged into it."}
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise ValueError(f"`lora_r` ({self.lora_r}) must be 1 or more.")
        if self.lora_experts and self.lora_dropout:
            raise ValueError(
                f"`lora_dropout` ({self.lora_dropout}) must be 0 with `lora_experts`: PEFT has no dropout on parameters. "
                "Set it to 0, or pass `--lora_experts false`."
            )


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the experts' weights as `target_parameters` wants them, such as `experts.up_proj`."""
    names = {".".join(name.split(".")[-2:]) for name, _ in model.named_parameters()}
    return [f"experts.{name}" for name in EXPERT_PARAMETERS if f"experts.{name}" in names]


def add_adapters(model: PreTrainedModel, args: LoraArguments) -> PreTrainedModel:
    """Wraps a model with the adapters.

    Raises:
        ValueError: If `lora_experts` is set and the model has no experts.
    """
    targets = expert_parameters(model) if args.lora_experts else []
    if args.lora_experts and not targets:
        raise ValueError("`lora_experts` (True) needs a model with experts: pass `--lora_experts false`.")
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or ["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=targets or None,
    )
    adapted = get_peft_model(model, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    print(f"LoRA trains {trainable:,} of {total:,} parameters: {', '.join(sorted(config.target_modules) + targets)}")
    return adapted


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the recipe; returns what was measured, see `train_and_report`."""
    args, lora_args, data_args, training_args = parse_recipe(
        [FinetuneArguments, LoraArguments, DataArguments, TrainingArguments], argv, __doc__
    )
    prepare_output_dir(training_args, args.overwrite_output_dir)
    set_seed(training_args.seed)
    tokenizer, train, validation, collator = prepare_data(args, data_args, training_args)
    model = add_adapters(load_model(args), lora_args)
    if lora_args.merged_output_dir is not None and getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"`merged_output_dir` ({lora_args.merged_output_dir}) needs the whole model on one process, and it is spread over "
            "ranks: leave it out, and merge the saved adapter on one process."
        )
    metrics = train_and_report(model, tokenizer, train, validation, training_args, collator)
    if lora_args.merged_output_dir is not None and training_args.process_index == 0:
        model.merge_and_unload().save_pretrained(lora_args.merged_output_dir)
        tokenizer.save_pretrained(lora_args.merged_output_dir)
        print(f"merged model in {lora_args.merged_output_dir}")
    return metrics


if __name__ == "__main__":
    run_as_script(main)
