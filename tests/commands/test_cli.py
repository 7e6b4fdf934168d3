"""The command line, through both names, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import GROUPED, build, documents, token_ids, tokenizer
from transformers import ArceeConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertModel, XGLMConfig

from optimum_structprune import StructPruneConfig
from optimum_structprune.commands.cli import main
from optimum_structprune.commands.prune import config_from


BIN = Path(sys.executable).parent
NAMES = {"structprune": [str(BIN / "structprune")], "optimum-cli": [str(BIN / "optimum-cli"), "structprune"]}


SHORT = ["--num-samples", "6", "--seq-length", "24"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    build("llama-tied").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(80)))
    return folder


def command(folder, *extra):
    domain = f"a={folder / 'a.jsonl'}"
    return ["prune", str(folder / "model"), str(folder / "out"), "--domain", domain, *SHORT, "--device", "cpu", *extra]


def call(name, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*NAMES[name], *arguments], capture_output=True, text=True, env=environment, timeout=180)


@pytest.mark.parametrize("name", NAMES)
def test_prune_in_a_subprocess(name, folder):
    done = call(name, *command(folder, "--width", "mlp=24", "--width", "attention=2", "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert "width mlp" in done.stdout and "perplexity a" in done.stdout and "from_pretrained" in done.stdout
    small = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (24, 2)
    assert torch.isfinite(small(token_ids()).logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_users_mistake_is_one_line_and_exit_code_2(name, folder):
    done = call(name, *command(folder, "--width", "attention=3", "--overwrite"))
    assert done.returncode == 2
    assert "nearest legal choice is 2 or 4" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_help(name):
    assert call(name, "--help").returncode == 0


def test_inspect(folder, capsys):
    assert main(["inspect", str(folder / "model")]) == 0
    shown = capsys.readouterr().out
    assert "llama, 2 blocks" in shown and "1-2, 4" in shown and "1-40" in shown


def test_an_unknown_architecture_from_stub_to_pruned(folder, tmp_path, capsys):
    config = ArceeConfig(**GROUPED)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 2
    assert "'arcee' is not described" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "model"), "--stub"]) == 0
    text = capsys.readouterr().out
    assert "check every line" in text and "nearest family by names and shapes is nemotron" in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    assert main(["inspect", str(tmp_path / "model"), "--arch", str(mine)]) == 0
    assert "arcee, 2 blocks" in capsys.readouterr().out
    domain = f"a={folder / 'a.jsonl'}"
    widths = ["--width", "mlp=24", "--width", "attention=2"]
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--arch", str(mine), *widths]
    assert main(["prune", *arguments, "--domain", domain, *SHORT, "--device", "cpu"]) == 0
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (24, 2)


def test_a_stub_needs_a_tensor_parallel_plan(tmp_path, capsys):
    XGLMConfig(d_model=8, ffn_dim=8, num_layers=1, attention_heads=2, vocab_size=16).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--stub"]) == 2
    assert "no tensor-parallel plan for 'xglm'" in capsys.readouterr().err


def test_encoders_load_as_what_they_were_saved_as(folder, tmp_path):
    build("distilbert").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["prune", str(tmp_path / "model"), str(tmp_path / "out"), "--domain", f"a={folder / 'a.jsonl'}"]
    assert main([*arguments, *SHORT, "--width", "mlp=24", "--device", "cpu"]) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.hidden_dim == 24


def test_flags_override_the_file(tmp_path, folder):
    StructPruneConfig(sparsity=0.4, criterion="flap", rounds=3).to_yaml(tmp_path / "run.yaml")
    from argparse import ArgumentParser

    from optimum_structprune.commands import prune

    parser = ArgumentParser()
    prune.add_arguments(parser)
    arguments = ["m", "o", "--config", str(tmp_path / "run.yaml"), "--width", "mlp=8", "--rounds", "2"]
    config = config_from(
        parser.parse_args(
            [
                *arguments,
                "--domain",
                "a=x@y.txt@0.5",
                "--domain",
                "b=c@d.txt",
                "--domain",
                "m=self:math@2",
                "--select",
                "diverse",
            ]
        )
    )
    assert (config.sparsity, config.widths, config.rounds, config.criterion) == (None, {"mlp": 8}, 2, "flap")
    assert [(d.name, d.source, d.weight) for d in config.domains] == [
        ("a", "x@y.txt", 0.5),
        ("b", "c@d.txt", 1.0),
        ("m", "self:math", 2.0),
    ]
    assert config.select == "diverse"


def test_every_flag_of_the_rounds_is_a_field(folder, tmp_path, capsys):
    flags = "--criterion taylor --normalisation rank --aggregation max --damping 0.2 --error_feedback 0.3"
    rounds = "--rounds 2 --schedule linear --adaptive-rate 0.5 --objective worst --keep-rounds"
    floor = "--max-perplexity-ratio 9"
    arguments = command(
        folder, *flags.split(), *rounds.split(), *floor.split(), "--checkpoint-dir", str(tmp_path), "--width", "mlp=24"
    )
    assert main([*arguments, "--overwrite"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "round-1").config.intermediate_size == 32
    used = StructPruneConfig.from_pretrained(folder / "out")
    assert (used.criterion, used.normalisation, used.aggregation, used.damping) == ("taylor", "rank", "max", 0.2)
    assert used.error_feedback == 0.3
    assert (used.schedule, used.adaptive_rate, used.objective, used.max_perplexity_ratio) == (
        "linear",
        0.5,
        "worst",
        9,
    )
    assert used.keep_rounds and used.checkpoint_dir == str(tmp_path)


def test_bad_input(folder, tmp_path, capsys):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    XGLMConfig(d_model=8, ffn_dim=8, num_layers=1, attention_heads=2, vocab_size=16).save_pretrained(tmp_path / "xglm")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "run.yaml").write_text("sparsiti: 0.2\n")
    model, out = str(folder / "model"), str(tmp_path / "out")
    cases = [
        (["prune", str(tmp_path / "missing"), out, "--sparsity", "0.2"], "missing"),
        (["prune", str(tmp_path / "bert"), out, "--sparsity", "0.2"], "bert"),
        (["prune", model, out], "exactly one of sparsity, widths and budget"),
        (["prune", model, out, "--sparsity", "0"], "between 0 and 1"),
        (["prune", model, out, "--sparsity", "1"], "between 0 and 1"),
        (["prune", model, out, "--sparsity", "-0.5"], "between 0 and 1"),
        (["prune", model, out, "--config", str(tmp_path / "run.yaml")], "Did you mean 'sparsity'"),
        (["prune", model, out, "--config", str(tmp_path / "none.yaml")], "none.yaml cannot be read"),
        (
            ["prune", model, out, "--sparsity", "0.2", "--seq-length", "24", "--domain", f"a={tmp_path}/empty.txt"],
            "'a'",
        ),
        (["prune", model, out, "--sparsity", "0.2", "--dtype", "int4"], "--dtype int4 is not known"),
        (["prune", model, out, "--sparsity", "0.2", "--device", "warp"], "warp"),
        (["prune", model, str(folder), "--sparsity", "0.2"], "exists and is not empty"),
        (["inspect", str(tmp_path / "missing")], "missing"),
        (["inspect", str(tmp_path / "xglm")], "'xglm' is not described"),
        (["inspect", model, "--arch", str(tmp_path / "none.yaml")], "none.yaml cannot be read"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("structprune: error:")]
        assert len(lines) == 1 and message in lines[0], (arguments, captured.err)
        assert not Path(out).exists()


@pytest.mark.parametrize("flag", [["--width", "mlp"], ["--domain", "wiki"], ["--sparsity", "0.2", "--width", "mlp=3"]])
def test_argparse_refuses_what_it_cannot_read(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prune", "m", "o", *flag])
    assert stop.value.code == 2


def test_the_registration_stays_light():
    code = "import sys, optimum.commands.register.register_structprune; print('torch' in sys.modules)"
    before = "import sys, optimum.commands.base; print('torch' in sys.modules)"
    shown = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True).stdout for c in (before, code)]
    assert shown[0] == shown[1], "the registration imports torch, which optimum itself does not"
