# SPDX-License-Identifier: Apache-2.0
"""A Trainer script that knows nothing of this package, through the launcher: on two ranks as on one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from hf_locmoe.launch import plugin_of
from tests.tolerances import assert_close


SCRIPT = """
import json, os, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoConfig, HfArgumentParser, Trainer, TrainingArguments, set_seed

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
set_seed(args.seed)
rows = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0)).tolist()
data = Dataset.from_dict({"input_ids": rows, "labels": rows})
source = os.environ["MODEL"]
if os.environ["FROM"] == "checkpoint":
    model = AutoModelForCausalLM.from_pretrained(source)
else:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data.select(range(30)))
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(args.output_dir)
if args.process_index == 0:
    log = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]
    json.dump({"log": log, "eval_loss": metrics["eval_loss"]}, open(os.path.join(args.output_dir, "result.json"), "w"))
"""

# LoRA of attention and experts, in the midst of it
ADAPTED = SCRIPT.replace(
    "trainer = Trainer",
    """from peft import LoraConfig, get_peft_model
experts = sorted({name.split("layers.0.")[1] for name, _ in model.named_parameters() if "layers.0.mlp.experts." in name})
model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], target_parameters=experts, r=2))
trainer = Trainer""",
)

# on one node the locality loss is zero, on two it is not: off, to compare
COMPARABLE = {"LOCMOE_LOCALITY_LOSS_COEF": "0", "LOCMOE_RANKS_PER_NODE": "1", "LOCMOE_LAYOUT": "spread"}

LOOP = """
import json, os, sys
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, TrainingArguments, get_scheduler

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
set_seed(args.seed)
rows = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in rows]
source = os.environ["MODEL"]
if os.environ["FROM"] == "checkpoint":
    model = AutoModelForCausalLM.from_pretrained(source)
else:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
loader = DataLoader(data, batch_size=args.per_device_train_batch_size)
eval_loader = DataLoader(data, batch_size=args.per_device_train_batch_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
scheduler = get_scheduler("constant", optimizer)
model, optimizer, loader, eval_loader, scheduler = accelerator.prepare(model, optimizer, loader, eval_loader, scheduler)
log, done = [], 0
if args.resume_from_checkpoint:
    accelerator.load_state(args.resume_from_checkpoint)
    done = int(args.resume_from_checkpoint.rpartition("_")[2])
model.train()
for batch in accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps):
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0) if accelerator.sync_gradients else None
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        done += 1
        log.append([accelerator.reduce(loss.detach(), "mean").item(), float(norm)])
        if done == 2:
            accelerator.save_state(os.path.join(args.output_dir, "step_2"))
    if done == args.max_steps:
        break
model.eval()
losses = []
for batch in eval_loader:
    with torch.no_grad():
        losses.append(accelerator.gather_for_metrics(model(**batch).loss.repeat(args.per_device_train_batch_size)))
accelerator.wait_for_everyone()
unwrapped = accelerator.unwrap_model(model)
unwrapped.save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
if accelerator.is_main_process:
    result = {"log": log, "eval_loss": torch.cat(losses).mean().item()}
    json.dump(result, open(os.path.join(args.output_dir, "result.json"), "w"))
accelerator.end_training()
"""


def write_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "locmoe":
        fields = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = LocMoeConfig(**fields, num_attention_heads=2, num_experts=4, balance_bias_update_rate=0.02)
        LocMoeForCausalLM(config).save_pretrained(folder)
        return
    from transformers import OlmoeConfig, OlmoeForCausalLM

    fields = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1}
    OlmoeForCausalLM(
        OlmoeConfig(**fields, num_attention_heads=2, num_experts=4, num_experts_per_tok=2, **ids)
    ).save_pretrained(folder)


def run(
    folder: Path,
    ranks: int,
    model: Path,
    source: str,
    batch: int,
    code: str = SCRIPT,
    resume: Path | None = None,
    **env,
) -> dict:
    """Runs a script through the launcher on so many ranks; its results and final weights."""
    script, output = folder / "script.py", folder / f"out{ranks}"
    script.write_text(code)
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    arguments = (
        f"--output_dir {output} --max_steps 3 --logging_steps 1 --report_to none --save_strategy no --learning_rate 1e-2 "
        f"--lr_scheduler_type constant --disable_tqdm True --per_device_train_batch_size {batch} --per_device_eval_batch_size {batch} "
        f"--gradient_accumulation_steps 2 --use_cpu True" + (f" --resume_from_checkpoint {resume}" if resume else "")
    ).split()
    done = subprocess.run(
        [*launcher, "hf_locmoe.launch", str(script), *arguments],
        env={**os.environ, "MODEL": str(model), "FROM": source, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [weights] = output.glob("*model.safetensors")
    return json.loads((output / "result.json").read_text()) | {"weights": load_file(weights)}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("locmoe", "checkpoint"),
        pytest.param("locmoe", "config", marks=pytest.mark.slow),
        pytest.param("olmoe", "checkpoint", marks=pytest.mark.slow),
    ],
)
def test_two_nodes_train_as_one_process(tmp_path, kind, source):
    write_model(tmp_path / "model", kind)
    alone = run(tmp_path, 1, tmp_path / "model", source, batch=4, **COMPARABLE)
    spread = run(tmp_path, 2, tmp_path / "model", source, batch=2, **COMPARABLE)
    same_training(spread, alone)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["locmoe", "olmoe"])
def test_adapters_train_as_on_one_process(tmp_path, kind):
    write_model(tmp_path / "model", kind)
    alone = run(tmp_path, 1, tmp_path / "model", "checkpoint", batch=4, code=ADAPTED, **COMPARABLE)
    spread = run(tmp_path, 2, tmp_path / "model", "checkpoint", batch=2, code=ADAPTED, **COMPARABLE)
    assert {name.rpartition("lora_")[2] for name in alone["weights"]} == {"A.weight", "B.weight"}
    assert any(".experts." in name for name in alone["weights"])
    same_training(spread, alone)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "source"), [("locmoe", "config"), ("olmoe", "checkpoint")])
def test_a_loop_written_with_accelerate_trains_as_one_process(tmp_path, kind, source):
    write_model(tmp_path / "model", kind)
    alone = run(tmp_path, 1, tmp_path / "model", source, batch=4, code=LOOP, **COMPARABLE)
    spread = run(tmp_path, 2, tmp_path / "model", source, batch=2, code=LOOP, **COMPARABLE)
    same_training(spread, alone)
    # on with the third step, on one process, from what two ranks saved after the second
    state = tmp_path / "out2" / "step_2"
    rest = run(tmp_path, 1, tmp_path / "model", source, batch=4, code=LOOP, resume=state, **COMPARABLE)
    assert_close(torch.tensor(rest["log"]), torch.tensor(alone["log"][2:]))


def same_training(spread: dict, alone: dict) -> None:
    assert_close(torch.tensor(spread["log"]), torch.tensor(alone["log"]))
    assert_close(torch.tensor(spread["eval_loss"]), torch.tensor(alone["eval_loss"]))
    assert spread["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        # Adam's first steps are the sign of the gradient, whatever its size: rounding shows in weights of no consequence
        assert (spread["weights"][name] - weight).abs().float().mean() < 1e-4, name


def launch(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hf_locmoe.launch", *arguments],
        env={**os.environ, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_arguments_traceback_and_exit_code_are_the_scripts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom accelerate import Accelerator\nfrom transformers import Trainer\n"
        "print(sys.argv[1:], __name__)\nprint(Accelerator.__name__, Trainer.__name__)\n"
        "if sys.argv[1] == 'fail':\n    raise KeyError('named')\nsys.exit(7)\n"
    )
    done = launch(str(script), "go", "--plugin", "mine")
    assert done.returncode == 7
    assert "['go', '--plugin', 'mine'] __main__\nLocMoeAccelerator LocMoeTrainer\n" in done.stdout
    done = launch(str(script), "fail")
    assert done.returncode == 1
    assert re.search(r'script.py", line 7, in <module>\n.*\nKeyError: \'named\'', done.stderr)


def test_a_module_runs_as_one(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "script.py").write_text("import sys\nprint(sys.argv[1:], __name__, __package__)\n")
    done = launch("-m", "package.script", "--one", "-m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "['--one', '-m'] __main__ package" in done.stdout


def test_the_environment_goes_before_the_plugins_file(tmp_path, monkeypatch):
    file = tmp_path / "plugin.yaml"
    file.write_text("layout: spread\nslices: 2\n")
    monkeypatch.setenv("LOCMOE_SLICES", "4")
    plugin = plugin_of(str(file))
    assert (plugin.layout, plugin.slices) == ("spread", "4")


def test_what_is_missing_is_named():
    done = launch("nowhere.py")
    assert done.returncode == 1
    assert "`SCRIPT` (nowhere.py) is not there" in done.stderr
    done = launch("--plugin", "nowhere.yaml", "script.py")
    assert "`--plugin` (nowhere.yaml) is no file" in done.stderr


def test_the_only_process_of_a_job_of_several_is_refused(tmp_path):
    """What `accelerate launch --cpu --num_processes 2` starts where there is no MPI."""
    script = tmp_path / "script.py"
    script.write_text("print('ran')\n")
    of_accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = launch(str(script), **of_accelerate)
    assert done.returncode == 1
    assert "`--num_processes` of `accelerate launch` must be 1 for a single process" in done.stderr
    assert "ran" not in done.stdout
    assert "ran" in launch(str(script), ACCELERATE_MIXED_PRECISION="no").stdout
