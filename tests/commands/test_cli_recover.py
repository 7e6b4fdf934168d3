"""`structprune recover` and `structprune prune --recover`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import save_with_tokenizer
from models import build, config, documents, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_structprune import Recovery, StructPruner
from optimum_structprune.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "a.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(200)))
    save_with_tokenizer(build("llama-tied"), folder / "model")
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder / "pruned", tokenizer=tokenizer())
    return folder


def command(folder, *extra, output="out"):
    flags = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--tokens", "480", "--device", "cpu"]
    training = ["--training", "disable_tqdm=true", "--training", "learning_rate=1e-2", "--lora", "r=2"]
    # Random words teach little, and what most tests look at does not depend on it.
    return ["recover", str(folder / "pruned"), str(folder / output), *flags, *training, "--accept-worse", *extra]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_worse_model_does_not_take_the_place_of_a_better_one(folder, capsys, monkeypatch):
    monkeypatch.setattr("optimum_structprune.recovery.trainer.ROUNDING", -10.0)  # a training never brings as much
    strict = [flag for flag in command(folder, "--overwrite", output="bad") if flag != "--accept-worse"]
    assert main(strict) == 1
    shown = capsys.readouterr()
    assert "Recovery made the model worse" in shown.out and f"saved to {folder / 'bad.worse'}" in shown.out
    assert f"it is in {folder / 'bad.worse'}, and {folder / 'bad'} is as it was" in shown.err
    assert not (folder / "bad").exists() and (folder / "bad.checkpoints").exists()
    assert json.loads((folder / "bad.worse" / "recovery_report.json").read_text())["worse"] is True
    assert main([*strict, "--accept-worse"]) == 0
    good = files(folder / "bad")
    assert main(strict) == 1 and files(folder / "bad") == good
    assert AutoModelForCausalLM.from_pretrained(folder / "bad.worse").config.intermediate_size == 24


def test_prune_and_recover_keeps_the_pruned_model_where_training_makes_it_worse(folder, monkeypatch):
    monkeypatch.setattr("optimum_structprune.recovery.trainer.ROUNDING", -10.0)  # a training never brings as much
    arguments = ["prune", str(folder / "model"), str(folder / "kept"), "--width", "mlp=24", "--num-samples", "6"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu"]
    assert main([*arguments, *text]) == 0
    pruned = files(folder / "kept")["model.safetensors"]
    settings = "{tokens: 240, training: {disable_tqdm: true}}"
    (folder / "bad.yaml").write_text(f"recovery: {settings}\n")
    bad = [*arguments, *text, "--config", str(folder / "bad.yaml"), "--overwrite"]
    assert main(bad) == 1
    assert files(folder / "kept")["model.safetensors"] == pruned and "recovery_report.json" not in files(
        folder / "kept"
    )
    assert files(folder / "kept.worse")["model.safetensors"] != pruned
    assert main([*bad, "--accept-worse"]) == 0
    assert files(folder / "kept")["model.safetensors"] != pruned


def test_an_adapter_is_no_model_to_recover(folder, capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    line = command(folder, output="wrong")
    assert main([line[0], str(tmp_path), *line[2:]]) == 2
    assert "holds an adapter and no model. In Python, load_adapter(pruned_model" in capsys.readouterr().err


def test_every_round_of_the_pruning_is_no_matter_afterwards(folder):
    # 96 tokens are 4 samples, too few for each of 6 rounds.
    every = ["--tokens", "96", "--every-round"]
    pruned = folder / "rounds"
    pruned.mkdir()
    for name, content in files(folder / "pruned").items():
        (pruned / name).write_bytes(content)
    config_path = pruned / "structprune_config.json"
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "rounds": 6}))
    line = command(folder, *every, "--teacher", str(folder / "model"), output="parts")
    assert main([line[0], str(pruned), *line[2:]]) == 0


def test_recover(folder, capsys):
    assert main(command(folder, "--teacher", str(folder / "model"), "--overwrite")) == 0
    shown = capsys.readouterr().out
    assert "perplexity a" in shown and "recovered" in shown and "recovery: 480 tokens" in shown
    again = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert again.config.intermediate_size == 24
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"structprune_config.json", "pruning_plan.json", "recovery_report.json", "recovery_config.json"} <= names
    assert not (folder / "out.checkpoints").exists()


def test_the_adapter_alone(folder):
    assert main(command(folder, "--adapter", output="adapter")) == 0
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "adapter" / "model.safetensors").exists()


def test_interrupted_and_resumed(folder, capsys, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "recover_model", interrupt)
        assert main(command(folder, output="later")) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(command(folder, "--resume", output="later")) == 2
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.mark.nightly
def test_killed_and_resumed(folder, capsys):
    again = ["--overwrite", "--training", "save_steps=2"]
    line = command(folder, "--tokens", "4800", *again, output="killed")
    program = "from optimum_structprune.commands.cli import main; import sys; main(sys.argv[1:])"
    checkpoints = folder / "killed.checkpoints"
    with subprocess.Popen([sys.executable, "-c", program, *line], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -9 and not (folder / "killed").exists()
    assert main([*line, "--resume"]) == 0
    whole = command(folder, "--tokens", "4800", *again, output="whole")
    assert main(whole) == 0
    resumed, uncut = (load_file(folder / name / "model.safetensors") for name in ("killed", "whole"))
    torch.testing.assert_close(resumed, uncut)


def test_prune_and_recover(folder, capsys):
    arguments = ["prune", str(folder / "model"), str(folder / "both"), "--width", "mlp=24", "--num-samples", "6"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu", "--recovery-tokens", "240"]
    assert main([*arguments, *text, "--accept-worse"]) == 0
    shown = capsys.readouterr().out
    assert "width mlp" in shown and "recovery: 240 tokens" in shown
    assert AutoModelForCausalLM.from_pretrained(folder / "both").config.intermediate_size == 24
    assert json.loads(Path(folder / "both" / "recovery_report.json").read_text())["tokens"] == 240


def test_code_of_the_teacher_is_run_where_it_is_allowed(folder, monkeypatch, capsys):
    allowed = []

    def interrupt(self, *args, trust_remote_code=None, **kwargs):
        allowed.append(trust_remote_code)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recovery, "recover_model", interrupt)
    prune = ["prune", str(folder / "model"), str(folder / "trusted"), "--width", "mlp=24", "--num-samples", "6"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu", "--recovery-tokens", "240"]
    assert main([*prune, *text, "--trust-remote-code"]) == 130
    assert f"--teacher {folder / 'model'} --trust-remote-code --overwrite --resume" in capsys.readouterr().err
    assert main(command(folder, "--teacher", str(folder / "model"), output="distrusted")) == 130
    assert allowed == [True, False]


@pytest.mark.parametrize(("flags", "message"), [
    (["--tokens", "3"], "24 is enough"),
    (["--training", "learning_rat=1"], "Did you mean 'learning_rate'"),
    (["--teacher", "no/where"], "'no/where' cannot be loaded"),
    (["--kl-weight", "2"], "between 0 and 1"),
    (["--domain", "b=./gone.txt"], "gone.txt"),
])  # fmt: skip
def test_mistakes_are_one_line(folder, flags, message, capsys):
    assert main(command(folder, *flags, output="wrong")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("structprune: error:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (folder / "wrong").exists()
