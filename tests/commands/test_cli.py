"""The command line, through both names, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_with_tokenizer
from models import GROUPED, build, documents, token_ids
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    DiffLlamaConfig,
    XGLMConfig,
)

from optimum_structprune import (
    StructPruneConfig,
    StructPruner,
    disable_heterogeneous,
    enable_heterogeneous,
)
from optimum_structprune.arch import families
from optimum_structprune.commands.cli import main


BIN = Path(sys.executable).parent
NAMES = {"structprune": [str(BIN / "structprune")], "optimum-cli": [str(BIN / "optimum-cli"), "structprune"]}


SHORT = ["--num-samples", "6", "--seq-length", "24"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_with_tokenizer(build("llama-tied"), folder / "model")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(80)))
    return folder


def command(folder, *extra):
    domain = f"a={folder / 'a.jsonl'}"
    return ["prune", str(folder / "model"), str(folder / "out"), "--domain", domain, *SHORT, "--device", "cpu", *extra]


def call(name, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*NAMES[name], *arguments], capture_output=True, text=True, env=environment, timeout=180)


@pytest.mark.slow
def test_prune_in_a_subprocess(folder):
    widths = ["--width", "mlp=24", "--width"]
    done = call("structprune", *command(folder, *widths, "attention=2", "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert "width mlp" in done.stdout and "perplexity a" in done.stdout and "from_pretrained" in done.stdout
    small = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (24, 2)
    assert torch.isfinite(small(token_ids()).logits).all()
    done = call("optimum-cli", *command(folder, *widths, "attention=3", "--overwrite"))
    assert done.returncode == 2
    assert "nearest legal choice is 2 or 4" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_architecture_from_stub_to_pruned(folder, tmp_path, capsys):
    config = DiffLlamaConfig(**GROUPED)
    model = AutoModelForCausalLM.from_config(config)
    save_with_tokenizer(model, tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 2
    assert "'diffllama' is not described" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "model"), "--stub"]) == 0
    text = capsys.readouterr().out
    assert "check every line" in text and "nearest family by names and shapes is llama" in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    assert main(["inspect", str(tmp_path / "model"), "--arch", str(mine)]) == 0
    assert "diffllama, 2 layers" in capsys.readouterr().out
    domain = f"a={folder / 'a.jsonl'}"
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--arch", str(mine), "--width", "mlp=24"]
    assert main(["prune", *arguments, "--domain", domain, *SHORT, "--device", "cpu"]) == 0
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.config.intermediate_size == 24


def test_encoders_load_as_what_they_were_saved_as(folder, tmp_path, capsys):
    save_with_tokenizer(build("distilbert"), tmp_path / "model")
    arguments = ["prune", str(tmp_path / "model"), str(tmp_path / "out"), "--domain", f"a={folder / 'a.jsonl'}"]
    assert main([*arguments, *SHORT, "--width", "mlp=24", "--device", "cpu"]) == 0
    assert "it loads with DistilBertForMaskedLM.from_pretrained" in capsys.readouterr().out
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.hidden_dim == 24


def test_settings_reach_the_run(folder, tmp_path):
    flags = "--criterion flap --damping 0.2 --error-feedback 0.3 --max-perplexity-ratio 9"
    rounds = "--rounds 2 --objective worst"
    arguments = command(
        folder, *flags.split(), *rounds.split(), "--checkpoint-dir", str(tmp_path), "--width", "mlp=24", "--overwrite"
    )
    assert main(arguments) == 0
    used = StructPruneConfig.from_pretrained(folder / "out")
    assert (used.criterion, used.damping, used.error_feedback) == ("flap", 0.2, 0.3)
    assert (used.objective, used.max_perplexity_ratio) == ("worst", 9)
    assert used.checkpoint_dir == str(tmp_path)


def test_bad_input(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StructPruner, "take_", None)
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    XGLMConfig(d_model=8, ffn_dim=8, num_layers=1, attention_heads=2, vocab_size=16).save_pretrained(tmp_path / "xglm")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "run.yaml").write_text("sparsiti: 0.2\n")
    model, out = str(folder / "model"), str(tmp_path / "out")
    cases = [
        (["prune", str(tmp_path / "missing"), out, "--sparsity", "0.2"], "missing"),
        (["prune", str(tmp_path / "bert"), out, "--sparsity", "0.2", "--target", "attention"], "bert"),
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
        (["prune", model, out, "--sparsity", "0.2", "--width", "mlp=3"], "exactly one of sparsity, widths and budget"),
        (
            ["prune", model, out, "--sparsity", "0.2", "--refit", "best"],
            "there is no refit 'best'. Did you mean 'bias'? Known: bias, least_squares, none",
        ),
        (["plan", model, "--width", "ffn=3"], "'ffn'"),
        (["plan", model, "--width", "mlp=wide"], "'wide'"),
        (["plan", model, "--sparsity", "0.2", "--rounds", "two"], "'rounds' expected int, got str (value: 'two')"),
        (["plan", model, "--budget", "parameters=9", "--budget", "bytes=9"], "budget names exactly one of"),
        (["prune", model, out, "--sparsity", "0.2", "--recovery", "token=9"], "Did you mean 'tokens'"),
        (["prune", model, out, "--sparsity", "0.2", "--recovery", "lora={rank: 4}"], "LoraConfig has no field 'rank'"),
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


def test_argparse_refuses_what_it_cannot_read(capsys):
    for flag, message in (
        (["--width", "mlp"], "argument --width: expected NAME=VALUE, got 'mlp'"),
        (["--domain", "wiki"], "argument --domain: expected NAME=SOURCE[@WEIGHT], got 'wiki'"),
        (["--recovery", "tokens=[1"], "argument --recovery: '[1' is not YAML"),
        (["--sparsty", "0.2"], "there is no flag --sparsty. Did you mean '--sparsity'? Known: "),
        (["--recovry=tokens=3"], "there is no flag --recovry. Did you mean '--recovery'? Known: "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["prune", "m", "o", *flag])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_plan_is_a_dry_run_and_inspect_says_what_there_is(folder, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "A dry run" in capsys.readouterr().out
    assert main(["plan", str(folder / "model"), "--width", "mlp=24"]) == 0
    assert "width mlp" in capsys.readouterr().out
    assert main(["inspect", str(folder / "model")]) == 0
    shown = capsys.readouterr().out
    assert "llama, 2 layers" in shown and "1-2, 4" in shown and "1-40" in shown


def test_a_non_uniform_model_of_ones_own_family(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(families, "_USER_FAMILIES", {})
    mlp = {"size": "intermediate_size", "out": {"mlp.gate_proj": "unit", "mlp.up_proj": "unit"}}
    mlp["in"] = {"mlp.down_proj": "unit"}
    family = {
        "model_types": ["cwm"],
        "layer_path": "layers",
        "layer_class": {"cwm": "CwmDecoderLayer"},
        "spaces": {"mlp": mlp},
    }
    (tmp_path / "own.yaml").write_text(json.dumps([family]))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cwm", **GROUPED))
    save_with_tokenizer(model, tmp_path / "model")
    small, arch = str(tmp_path / "small"), ["--arch", str(tmp_path / "own.yaml"), "--device", "cpu"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24"]
    pruning = ["--width", "mlp=24", "--skip-layer", "0", "--num-samples", "6"]
    assert main(["prune", str(tmp_path / "model"), small, *arch, *text, *pruning]) == 0
    for arguments in (
        ["evaluate", small, "--against", str(tmp_path / "model"), *text, "--num-samples", "2"],
        ["recover", small, str(tmp_path / "recovered"), *text, "--tokens", "48"],
    ):
        # As in a process that has not read the file.
        families._USER_FAMILIES.clear()
        disable_heterogeneous()
        enable_heterogeneous()
        assert main([*arguments, *arch]) == 0, capsys.readouterr().err


def test_the_registration_stays_light():
    heavy = ("torch", "transformers", "huggingface_hub", "optimum_structprune.config")
    show = f"print([name for name in {heavy} if name in sys.modules])"
    register = "from argparse import ArgumentParser; import optimum.commands.register.register_structprune as r; "
    code = f"import sys; {register}r.StructPruneCommand.parse_args(ArgumentParser()); {show}"
    before = f"import sys, optimum.commands.base; {show}"
    shown = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True).stdout for c in (before, code)]
    assert shown[0] and shown[0] == shown[1], "the registration imports what optimum itself does not"
