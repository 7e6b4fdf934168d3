"""A teacher under DeepSpeed ZeRO-3: two processes train like one process."""

import json
import os
from pathlib import Path

import pytest
import torch
from distillation.test_attach import labelled_rows
from helpers import on_one_rank, on_two_ranks
from models import build
from safetensors.torch import load_file

from optimum_structprune import write_teacher


BUILD = Path(__file__).parents[2] / "build"
DEEPSPEED = BUILD / "deepspeed"
# DeepSpeed compiles its operators once.
OPERATORS = BUILD / "deepspeed-operators"

# The arguments of a Trainer turn on ZeRO-3, and transformers then shards every model that it loads. Scripts load
# their student before or after them.
SCRIPT = """
import json, os, sys
import torch

torch.set_num_threads(1)
engine, case, lora, order, teacher, folder = sys.argv[1:]

from models import build
from peft import get_peft_model
from distillation.test_attach import LORA, labelled_rows, trainer_for
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer
from optimum_structprune import StructPruneError, attach_teacher

if engine == "zero3":
    # The Trainer does this on GPUs, before a model is loaded.
    import deepspeed

    deepspeed.init_distributed()

torch.manual_seed(0)
model = build(case)
if lora == "True":
    model = get_peft_model(model, LORA)

student_folder = f"{teacher}/student"
if order == "student in memory":
    teacher = AutoModelForCausalLM.from_pretrained(teacher)

def trainer_after_arguments(model, **options):
    # trainer_for builds the arguments before it calls this function.
    if order == "student after arguments":
        model = AutoModelForCausalLM.from_pretrained(student_folder)
    return Trainer(model=model, **options)

settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
if engine == "zero3":
    settings["per_device_train_batch_size"] = 2
    settings["deepspeed"] = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }

trainer = trainer_for(model, folder, labelled_rows(64), trainer_class=trainer_after_arguments, **settings)
if order == "student after arguments":
    try:
        attach_teacher(trainer, student_folder)
    except StructPruneError as error:
        assert "the same model" in str(error)
    else:
        raise AssertionError("a teacher with the weights of the student must be refused")
attach_teacher(trainer, teacher, task_weight=0.1)
trainer.train()
measured = trainer.evaluate()

weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
if trainer.accelerator.is_main_process:
    logs = [[log["loss"], log["kl"]] for log in trainer.state.log_history if "loss" in log]
    logs.append([measured["eval_loss"], measured["eval_kl"]])
    with open(f"{folder}/logs.json", "w") as file:
        json.dump({"logs": logs, "type": str(trainer.accelerator.distributed_type)}, file)
    save_file({name.removeprefix("module."): w.clone().contiguous() for name, w in weights.items()}, f"{folder}/w")
"""


def deepspeed_environment() -> dict[str, str]:
    """Return the variables of processes with DeepSpeed on CPUs."""
    paths = [str(DEEPSPEED), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(OPERATORS),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("case", "lora", "order"),
    [
        ("llama-tied", False, "student in memory"),
        ("llama-untied", True, "student in memory"),
        ("llama-untied", False, "student before arguments"),
        ("llama-untied", False, "student after arguments"),
        ("llama-untied", False, "teacher file"),
    ],
)
def test_two_processes_with_sharded_weights_train_like_one_process(case, lora, order, tmp_path, monkeypatch):
    if not DEEPSPEED.exists():
        pytest.skip("DeepSpeed is not installed: run `make deepspeed`")

    teacher = tmp_path / "teacher"
    build(case, seed=1).save_pretrained(teacher)
    build(case).save_pretrained(teacher / "student")
    if order == "teacher file":
        write_teacher(build(case, seed=1), labelled_rows(64), tmp_path / "file")
        teacher = tmp_path / "file"

    single = tmp_path / "single"
    single.mkdir()
    on_one_rank(SCRIPT, single, "none", case, lora, order, teacher, single)

    for name, value in deepspeed_environment().items():
        monkeypatch.setenv(name, value)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    on_two_ranks(SCRIPT, sharded, "zero3", case, lora, order, teacher, sharded)

    expected = json.loads((single / "logs.json").read_text())
    result = json.loads((sharded / "logs.json").read_text())
    assert "DEEPSPEED" in result["type"]
    torch.testing.assert_close(torch.tensor(result["logs"]), torch.tensor(expected["logs"]), atol=1e-5, rtol=0)

    expected_weights = load_file(single / "w")
    weights = load_file(sharded / "w")
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0)
