"""Every example runs, on a tiny model, and leaves a checkpoint that loads plainly."""

import csv
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import main_of, ran, same_weights, save_with_tokenizer, write_texts
from models import PLAIN, build, config, real_text_model, token_ids, tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from optimum_structprune import RunOptions, StructPruner
from optimum_structprune.domains.load import given_domains
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.sources.data import batches_of


EXAMPLES = Path(__file__).parents[1] / "examples"


def width(folder) -> int:
    return AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    for saved in real_text_model():
        saved.save_pretrained(folder / "model")
    write_texts(folder / "notes.jsonl", islice(builtin_documents("math", 7), 400))
    return folder


def test_prune_with_flags_and_with_a_file(desk, capsys):
    arguments = ["--model", str(desk / "model"), "--output", str(desk / "flags"), "--sparsity", "0.3"]
    more = {"num_samples": 6, "seq_length": 64, "targets": ["mlp"]}
    domains = ["--domains", "prose=builtin:prose", f"notes={desk / 'notes.jsonl'}"]
    main_of("prune")([*arguments, *domains, "--pruning", json.dumps(more)])
    assert width(desk / "flags") < 1536 and "\nnotes " in capsys.readouterr().out
    values = {"model": str(desk / "model"), "output": str(desk / "file")}
    fields = {"num_samples": 6, "seq_length": 64, "widths": {"mlp": 1024}}
    (desk / "run.yaml").write_text(json.dumps({**values, "pruning": fields}))  # YAML reads JSON too
    main_of("prune")([str(desk / "run.yaml")])
    assert width(desk / "file") == 1024


@pytest.mark.slow
def test_prune_and_recover(desk, capsys):
    out, small = desk / "recovered", ["--num-samples", "6"]
    main_of("prune_and_recover")([str(desk / "model"), str(out), "--tokens", "6144", "--rounds", "2", *small])
    assert width(out) < 1536 and "recovered" in capsys.readouterr().out


def accuracies(shown: str) -> dict[str, float]:
    lines = (line.partition(": accuracy ") for line in shown.splitlines() if ": accuracy " in line)
    return {name: float(rest.partition(",")[0]) for name, _, rest in lines}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", pytest.param(None, marks=pytest.mark.nightly)])
def test_prune_bert_classifier(desk, kind, capsys):
    reader, out = AutoTokenizer.from_pretrained(desk / "model"), desk / f"classifier-{kind}"
    torch.manual_seed(0)  # its head is for two labels, which is one label too few
    fields = {**PLAIN, "vocab_size": len(reader), "intermediate_size": 256, "max_position_embeddings": 64}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **fields))
    save_with_tokenizer(model, desk / "bert", reader)
    flags = ["--model", str(desk / "bert"), "--output", str(out), "--learning_rate", "5e-3", "--sparsity", "0.4"]
    small = ["--num_samples", "8", "--seq_length", "48"]
    if kind is not None:
        rows = [(text, label) for label in ("code", "math") for text in islice(builtin_documents(label), 60)]
        with open(desk / "labelled.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        flags += ["--data", str(desk / "labelled.csv")]
    main_of("prune_bert_classifier")([*flags, *small])
    shown = accuracies(capsys.readouterr().out)
    chance = 1 / (3 if kind is None else 2)
    assert [*shown] == ["dense", "pruned", "fine-tuned again"] and min(shown.values()) > 1.3 * chance
    pruned = AutoModelForSequenceClassification.from_pretrained(out)
    assert pruned.config.intermediate_size == 128 and pruned.config.label2id["math"] == 1
    if kind == "csv":  # a classifier as it is: nothing is trained, and the dense accuracy is the one of before
        again = ["--model", str(out), "--output", str(desk / "again"), "--epochs", "0", "--epochs_after", "0"]
        main_of("prune_bert_classifier")([*again, *flags[-2:], *small])
        later = accuracies(capsys.readouterr().out)
        assert [*later] == ["dense", "pruned"] and later["dense"] == shown["fine-tuned again"]


def test_every_example_says_how_to_call_it():
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("tools/*.py")):
        text, name = path.read_text(), path.relative_to(EXAMPLES)
        assert f"    python examples/{name}" in text or "make " in text, name
    bare = subprocess.run(["bash", str(EXAMPLES / "distributed.sh")], capture_output=True, text=True)
    assert bare.returncode == 2 and bare.stderr.startswith("usage: bash examples/distributed.sh MODEL OUTPUT")


@pytest.mark.nightly
def test_several_processes_train_what_one_does(desk):
    for number in (1, 2):
        command = ["bash", str(EXAMPLES / "distributed.sh"), str(desk / "model"), str(desk / f"of-{number}")]
        flags = ["--tokens", "4100", "--num-samples", "6", "--batch-size", str(2 // number)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PROCESSES": str(number), "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
        shown = ran([*command, *flags], env=environment, timeout=300)
        assert "recovery: 4,096 tokens" in shown and shown.count("; step 16 is kept") == 1
    alone, shared = (load_file(desk / f"of-{number}" / "model.safetensors") for number in (1, 2))
    torch.testing.assert_close(shared, alone, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_recover_sft(desk, capsys):
    pytest.importorskip("trl", reason="TRL is not installed")
    small = json.dumps({"num_samples": 6, "seq_length": 64})
    folders = ["--model", str(desk / "model"), "--output", str(desk / "pruned-for-sft")]
    main_of("prune")([*folders, "--sparsity", "0.6", "--pruning", small])
    flags = ["--teacher", str(desk / "model"), "--steps", "8", "--seq-length", "64", "--batch-size", "2"]
    pruned, out = str(desk / "pruned-for-sft"), str(desk / "recovered-by-sft")
    main_of("recover_sft")([pruned, out, *flags, "--accumulation", "2", "--learning-rate", "1e-3"])
    first, last = re.findall(r"(\d+\.\d+) in the", capsys.readouterr().out)
    assert 0 < float(last) < 10 and 0 < float(first) < 10
    assert (desk / "recovered-by-sft" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_trainer_callback(desk, capsys):
    main_of("trainer_callback")([str(desk / "model"), str(desk / "tuned"), "--steps", "20"])
    assert f"FFN width {width(desk / 'tuned')}" in capsys.readouterr().out
    assert width(desk / "tuned") == width(desk / "tuned" / "checkpoint-10") < 1536
    assert width(desk / "tuned") <= width(desk / "tuned" / "checkpoint-5") < 1536
    arguments = [str(desk / "model"), str(desk / "tuned"), "--steps", "24", "--resume"]
    main_of("trainer_callback")([*arguments, "--text", str(desk / "notes.jsonl")])
    assert width(desk / "tuned" / "checkpoint-24") == width(desk / "tuned")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, about old names of arguments
def test_sft_trl(desk):
    main_of("sft_trl")([str(desk / "model"), str(desk / "sft"), "--steps", "10"])
    assert width(desk / "sft") < 1536


def test_pruning_by_hand_gives_the_same_bits():
    by_hand, settings = import_module("prune_by_hand"), config(domains=None, widths={"mlp": 24})
    inputs = {name: token_ids(8, 24, seed) for seed, name in enumerate("ab")}
    pruner, model = StructPruner(settings), build("llama-tied")
    expected = pruner.prune_model(build("llama-tied"), tokenizer(), inputs=inputs)
    domains = given_domains(inputs, settings.holdout)
    batches = batches_of(domains, RunOptions().batch_size)
    by_hand.prune_by_hand_(model, batches, tuple(domain.weight for domain in domains), 24)
    assert same_weights(model, expected)
