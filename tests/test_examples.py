"""Every example runs on a tiny model and saves a checkpoint that reloads."""

import csv
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from distillation.test_attach import PRETEND_GPUS
from helpers import main_of, ran, same_weights, save_with_tokenizer, write_texts
from models import PLAIN, build, config, real_text_model, token_ids, tokenizer
from recovery.test_deepspeed import DEEPSPEED, deepspeed_environment
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from optimum_structprune import RunOptions, StructPruneConfig, StructPruner
from optimum_structprune.domains.load import given_domains
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.steps.data import batches_of


EXAMPLES = Path(__file__).parents[1] / "examples"


def width(folder) -> int:
    return AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Make a folder with a model and a text."""
    folder = tmp_path_factory.mktemp("examples")
    model, reader = real_text_model()
    save_with_tokenizer(model, folder / "model", reader)
    write_texts(folder / "notes.jsonl", islice(builtin_documents("math", 7), 400))
    return folder


def test_prune_with_flags(desk, capsys):
    flags = ["--model", str(desk / "model"), "--output", str(desk / "flags"), "--sparsity", "0.3"]
    flags += ["--domains", "prose=builtin:prose", f"notes={desk / 'notes.jsonl'}"]
    fields = {"num_samples": 6, "seq_length": 64, "targets": ["mlp"]}
    main_of("prune")(flags + ["--pruning", json.dumps(fields)])

    assert width(desk / "flags") < 1536
    assert "\nnotes " in capsys.readouterr().out


def test_prune_with_a_file(desk):
    fields = {"num_samples": 6, "seq_length": 64, "widths": {"mlp": 1024}}
    values = {"model": str(desk / "model"), "output": str(desk / "file"), "pruning": fields}
    (desk / "run.yaml").write_text(json.dumps(values))  # JSON is valid YAML.
    main_of("prune")([str(desk / "run.yaml")])

    assert width(desk / "file") == 1024


@pytest.mark.slow
def test_prune_and_recover(desk, capsys):
    out = desk / "recovered"
    flags = ["--tokens", "6144", "--rounds", "2", "--num-samples", "6"]
    main_of("prune_and_recover")([str(desk / "model"), str(out), *flags])

    assert width(out) < 1536
    assert "recovered" in capsys.readouterr().out


def accuracies(output: str) -> dict[str, float]:
    """Return the accuracies that a script has printed, by model."""
    values = {}
    for line in output.splitlines():
        if ": accuracy " in line:
            name, text = line.split(": accuracy ", 1)
            values[name] = float(text.split(",")[0])
    return values


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", pytest.param(None, marks=pytest.mark.nightly)])
def test_prune_bert_classifier(desk, kind, capsys):
    save_bert(desk)
    out = desk / f"classifier-{kind}"
    data_flags = []
    chance = 1 / 3
    if kind == "csv":
        write_labelled_texts(desk / "labelled.csv")
        data_flags = ["--data", str(desk / "labelled.csv")]
        chance = 1 / 2
    data_flags += ["--num_samples", "8", "--seq_length", "48"]

    flags = ["--model", str(desk / "bert"), "--output", str(out), "--learning_rate", "5e-3", "--sparsity", "0.4"]
    main_of("prune_bert_classifier")(flags + data_flags)
    values = accuracies(capsys.readouterr().out)
    assert list(values) == ["original", "pruned", "fine-tuned again"]
    assert min(values.values()) > 1.3 * chance
    pruned = AutoModelForSequenceClassification.from_pretrained(out)
    assert pruned.config.intermediate_size == 128
    assert pruned.config.label2id["math"] == 1

    # The result is a classifier already, so it can be pruned a second time without training.
    if kind == "csv":
        flags = ["--model", str(out), "--output", str(desk / "second"), "--epochs", "0", "--epochs_after", "0"]
        main_of("prune_bert_classifier")(flags + data_flags)
        second_values = accuracies(capsys.readouterr().out)
        assert list(second_values) == ["original", "pruned"]
        assert second_values["original"] == values["fine-tuned again"]


def save_bert(desk):
    """Save a random BERT. Its head has two labels, but the example has three by default."""
    reader = AutoTokenizer.from_pretrained(desk / "model")
    torch.manual_seed(0)
    sizes = PLAIN | {"vocab_size": len(reader), "intermediate_size": 256, "max_position_embeddings": 64}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **sizes))
    save_with_tokenizer(model, desk / "bert", reader)


def write_labelled_texts(path):
    """Write texts of two labels as a CSV file."""
    rows = [("text", "label")]
    for label in ("code", "math"):
        for text in islice(builtin_documents(label), 60):
            rows.append((text, label))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_every_example_prints_its_usage():
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("tools/*.py")]:
        text = path.read_text()
        name = path.relative_to(EXAMPLES)
        assert f"    python examples/{name}" in text or "make " in text, name

    process = subprocess.run(["bash", str(EXAMPLES / "distributed.sh")], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: bash examples/distributed.sh MODEL OUTPUT")


@pytest.mark.nightly
def test_two_processes_train_as_one_process_does(desk):
    weights = []
    for number in (1, 2):
        out = desk / f"trained-by-{number}"
        # Some CPUs train in bfloat16, whose rounding depends on the size of a batch.
        training = {"per_device_train_batch_size": 2 // number, "bf16": False}
        command = ["bash", str(EXAMPLES / "distributed.sh"), str(desk / "model"), str(out)]
        command += ["--tokens", "4100", "--num-samples", "6", "--training", json.dumps(training)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PROCESSES": str(number), "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
        output = ran(command, env=environment, timeout=300)

        assert "Recovery: 4,096 tokens" in output
        assert output.count("best checkpoint: step 16") == 1
        weights.append(load_file(out / "model.safetensors"))

    change = distance(weights[0], pruned_weights(desk / "model"))
    assert change > 0.01
    assert distance(weights[1], weights[0]) < 1e-4 * change


def pruned_weights(folder):
    """Return the weights that `distributed.sh` begins the training with."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    pruner = StructPruner(StructPruneConfig(sparsity=0.2, num_samples=6))
    return pruner.prune_model(model, reader).state_dict()


def distance(weights, others) -> float:
    """Return the Euclidean distance between two models."""
    squares = [(weights[name] - others[name]).double().square().sum() for name in weights]
    return torch.stack(squares).sum().sqrt().item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_recover_sft(desk, capsys):
    pytest.importorskip("trl", reason="TRL is not installed")
    pruned = desk / "pruned-for-sft"
    out = desk / "recovered-by-sft"
    fields = json.dumps({"num_samples": 6, "seq_length": 64})
    flags = ["--model", str(desk / "model"), "--output", str(pruned), "--sparsity", "0.6", "--pruning", fields]
    main_of("prune")(flags)

    flags = ["--teacher", str(desk / "model"), "--steps", "8", "--seq-length", "64", "--batch-size", "2"]
    flags += ["--accumulation", "2", "--learning-rate", "1e-3"]
    main_of("recover_sft")([str(pruned), str(out), *flags])

    first_loss, last_loss = re.findall(r"(\d+\.\d+) in the", capsys.readouterr().out)
    assert 0 < float(first_loss) < 10
    assert 0 < float(last_loss) < 10
    assert (out / "adapter_config.json").is_file()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]

    # The checkpoint of step 6 leads to the same adapter.
    weights = load_file(out / "adapter_model.safetensors")
    rmtree(out / "checkpoint-8")
    flags += ["--resume", "--attn-implementation", "eager"]
    flags += ["--eval-dataset", str(desk / "notes.jsonl"), "--eval-size", "8"]
    main_of("recover_sft")([str(pruned), str(out), *flags])
    resumed_weights = load_file(out / "adapter_model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(resumed_weights[name], weight, atol=1e-4, rtol=1e-3, msg=name)

    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "eval_kl" in log] == [8]


MANY_GPUS = EXAMPLES.parent / "docs" / "recovery_many_gpus.md"


def blocks(language: str) -> list[str]:
    """Return the blocks of a language in the page about many GPUs."""
    return re.findall(rf"^```{language}\n(.*?)^```", MANY_GPUS.read_text(), re.M | re.S)


def test_the_table_of_memory_is_the_output_of_its_script(capsys):
    main_of("training_memory")([])
    output = capsys.readouterr().out
    assert output in MANY_GPUS.read_text()
    assert output.count("\n") == 7

    main_of("training_memory")(["--gpus", "32"])
    last_row = capsys.readouterr().out.splitlines()[-1]
    assert f"all weights of the 70B model take {last_row.split(' | ')[3]}" in MANY_GPUS.read_text()


def test_the_table_for_one_gpu_is_the_output_of_its_script(capsys):
    main_of("training_memory")(["--teacher-file"])
    assert capsys.readouterr().out in MANY_GPUS.with_name("teacher_file.md").read_text()


def with_paths(script: str, paths: dict[str, Path]) -> str:
    """Put paths in place of the names in a script."""
    for name, path in paths.items():
        script = script.replace(name, str(path))
    return script


def environment_of_processes(**variables) -> dict[str, str]:
    """Return the environment for programs of `.venv` on CPUs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | variables


@pytest.mark.nightly
@pytest.mark.parametrize("offload", ["false", "true"])
def test_the_file_for_fsdp2_trains_and_its_checkpoints_merge(offload, desk, tmp_path):
    """The FSDP2 file of the page runs with two processes, and the commands after it make a model of a checkpoint."""
    (text,) = [block for block in blocks("yml") if "FSDP" in block]
    text = text.replace("fsdp_offload_params: false", f"fsdp_offload_params: {offload}")
    environment = environment_of_processes(OMP_NUM_THREADS="1")
    out = recover_with_file(desk, tmp_path, text, PRETEND_GPUS + UNPINNED, environment)

    (commands,) = [block for block in blocks("sh") if "merge-weights" in block]
    paths = {
        "OUTPUT/checkpoint-500": out / "checkpoint-4",
        "PRUNED": pruned_model(desk),
        "MERGED": tmp_path / "merged",
    }
    ran(["bash", "-euc", with_paths(commands, paths)], env=environment)

    saved = AutoModelForCausalLM.from_pretrained(out)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), saved)
    assert not same_weights(saved, AutoModelForCausalLM.from_pretrained(pruned_model(desk)))


@pytest.mark.nightly
def test_the_file_for_zero_3_trains(desk, tmp_path):
    if not DEEPSPEED.exists():
        pytest.skip("DeepSpeed is not installed: run `make deepspeed`")

    (text,) = [block for block in blocks("yml") if "DEEPSPEED" in block]
    environment = environment_of_processes(**deepspeed_environment())
    # The Trainer does this on GPUs, before a model is loaded.
    initialise = "import deepspeed\ndeepspeed.init_distributed()\n"
    out = recover_with_file(desk, tmp_path, text, initialise, environment)

    saved = AutoModelForCausalLM.from_pretrained(out)
    assert not same_weights(saved, AutoModelForCausalLM.from_pretrained(pruned_model(desk)))


# PyTorch pins the memory of offloaded weights, which needs a GPU.
UNPINNED = """
import torch

torch.Tensor.pin_memory = lambda tensor: tensor
"""


def recover_with_file(desk, folder, text, prelude, environment) -> Path:
    """Run `recover_sft.py` in two processes with a file for `accelerate launch`, and return the folder of the result.

    Each process executes `prelude` first.
    """
    (folder / "config.yaml").write_text(text.replace("num_processes: 8", "num_processes: 2"))
    run_script = "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    (folder / "script.py").write_text(prelude + run_script)

    out = folder / "out"
    command = ["accelerate", "launch", "--config_file", folder / "config.yaml", "--mixed_precision", "no"]
    command += [folder / "script.py", EXAMPLES / "recover_sft.py", pruned_model(desk), out]
    command += ["--teacher", desk / "model", "--full", "--steps", "4", "--seq-length", "64"]
    command += ["--batch-size", "1", "--accumulation", "1"]
    ran(command, env=environment, timeout=500)
    return out


def pruned_model(desk):
    """Return the folder of a pruned model, which is made once."""
    folder = desk / "pruned-for-processes"
    if not folder.exists():
        fields = json.dumps({"num_samples": 6, "seq_length": 64})
        flags = ["--model", str(desk / "model"), "--output", str(folder), "--sparsity", "0.6", "--pruning", fields]
        main_of("prune")(flags)
    return folder


SRUN = """#!/bin/bash
export SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=nodes
SLURM_NODEID=1 "$@" &
SLURM_NODEID=0 "$@" || { kill $!; exit 1; }
wait $!
"""


@pytest.mark.nightly
def test_the_script_for_slurm_trains_on_two_nodes(desk, tmp_path):
    """`srun` starts two processes of this machine as if they were nodes."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    (script,) = [block for block in blocks("sh") if "srun" in block]
    script = script.replace("examples/distributed.sh", str(EXAMPLES / "distributed.sh"))
    paths = {"PRUNED": pruned_model(desk), "OUTPUT": tmp_path / "out", "ORIGINAL": desk / "model"}
    script = with_paths(script, paths).rstrip() + " --steps 2 --seq-length 64 --batch-size 1 --accumulation 1\n"

    environment = environment_of_processes(PROCESSES="1", PORT="29517", OMP_NUM_THREADS="1")
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    output = ran(["bash", "-euc", script], env=environment, timeout=500)
    assert output.count("KL per token") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_trainer_callback(desk, capsys):
    out = desk / "tuned"
    main_of("trainer_callback")([str(desk / "model"), str(out), "--steps", "20"])

    final_width = width(out)
    assert f"FFN width {final_width}" in capsys.readouterr().out
    assert final_width == width(out / "checkpoint-10") < 1536
    assert final_width <= width(out / "checkpoint-5") < 1536

    flags = ["--steps", "24", "--resume", "--text", str(desk / "notes.jsonl")]
    main_of("trainer_callback")([str(desk / "model"), str(out), *flags])
    assert width(out / "checkpoint-24") == width(out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL warns about its own old names of arguments.
def test_sft_trl(desk):
    main_of("sft_trl")([str(desk / "model"), str(desk / "sft"), "--steps", "10"])
    assert width(desk / "sft") < 1536


def test_pruning_by_hand_computes_the_same_bits():
    settings = config(domains=None, widths={"mlp": 24})
    inputs = {"a": token_ids(8, 24, seed=0), "b": token_ids(8, 24, seed=1)}
    expected = StructPruner(settings).prune_model(build("llama-tied"), tokenizer(), inputs=inputs)

    model = build("llama-tied")
    domains = given_domains(inputs, settings.holdout)
    batches = batches_of(domains, RunOptions().batch_size)
    weights = tuple(domain.weight for domain in domains)
    import_module("prune_by_hand").prune_by_hand_(model, batches, weights, 24)
    assert same_weights(model, expected)
