"""Test the command line through both of its names."""

import json
import subprocess
import sys
from shutil import copyfile

import pytest
from helpers import error_line, own_family, save_desk, save_with_tokenizer
from models import GROUPED, build
from optimum.commands.optimum_cli import main as optimum_main
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from optimum_structprune import StructPruner, disable_heterogeneous, enable_heterogeneous
from optimum_structprune.arch import family
from optimum_structprune.commands import register_structprune
from optimum_structprune.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("cli"))


def prune_command(folder, *flags, model_folder=None):
    """Return the arguments that prune `model` into `out`, both in `model_folder`, on the text of `folder`."""
    if model_folder is None:
        model_folder = folder
    paths = [str(model_folder / "model"), str(model_folder / "out")]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "24"]
    return ["prune"] + paths + text + ["--device", "cpu"] + list(flags)


def test_optimum_cli_runs_the_commands(folder, capsys, monkeypatch):
    """Other tests run the script `structprune`: `test_extending.py` and `test_docs.py`."""
    line = prune_command(folder, "--width", "mlp=24", "--criterion", "nope")
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "structprune"] + line)

    with pytest.raises(SystemExit) as end:
        optimum_main()

    assert end.value.code == 2
    assert "criterion" in error_line(capsys)


def test_an_encoder_keeps_its_model_class(folder, tmp_path, capsys):
    save_with_tokenizer(build("distilbert"), tmp_path / "model")

    assert main(prune_command(folder, "--width", "mlp=24", model_folder=tmp_path)) == 0

    assert "load it with DistilBertForMaskedLM.from_pretrained" in capsys.readouterr().out
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.hidden_dim == 24


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_flag_selects_the_attention(folder, name, capsys, monkeypatch):
    attentions = []
    prune = StructPruner.prune

    def record_attention(pruner, model, *args, **kwargs):
        attentions.append(model.config._attn_implementation)
        return prune(pruner, model, *args, **kwargs)

    monkeypatch.setattr(StructPruner, "prune", record_attention)
    assert main(prune_command(folder, "--width", "mlp=24", "--attn-implementation", name, "--overwrite")) == 0

    assert attentions == [name]


@pytest.mark.parametrize("number", ["x", "", "-1", "1.5"])
def test_variables_of_a_launcher_must_be_numbers(folder, number, capsys, monkeypatch):
    monkeypatch.setenv("RANK", number)
    assert main(["inspect", str(folder / "model")]) == 2
    assert f"The environment has RANK={number!r}, where a launcher sets a number" in error_line(capsys)

    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", number)
    assert main(prune_command(folder, "--width", "mlp=24", "--overwrite")) == 2
    assert f"The environment has WORLD_SIZE={number!r}" in error_line(capsys)


@pytest.mark.slow
def test_commands_read_a_non_uniform_model_of_a_user_family(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(family, "_USER_FAMILIES", {})
    family_file = tmp_path / "own.yaml"
    family_file.write_text(json.dumps([own_family("cwm", layer_class={"cwm": "CwmDecoderLayer"})]))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cwm", **GROUPED))
    save_with_tokenizer(model, tmp_path / "model")

    flags = ["--width", "mlp=24", "--skip-layer", "0", "--arch", str(family_file)]
    assert main(prune_command(folder, model_folder=tmp_path) + flags) == 0

    pruned = str(tmp_path / "out")
    evaluate = ["evaluate", pruned, "--against", str(tmp_path / "model"), "--num-samples", "2"]
    recover = ["recover", pruned, str(tmp_path / "recovered"), "--tokens", "48"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24"]
    for line in (evaluate, recover):
        # A new process has not read the file of the family yet.
        family._USER_FAMILIES.clear()
        disable_heterogeneous()
        enable_heterogeneous()
        line += text + ["--arch", str(family_file), "--device", "cpu"]
        assert main(line) == 0, capsys.readouterr().err


def test_optimum_cli_runs_with_two_copies_of_the_package_on_the_path(tmp_path):
    copy = tmp_path / "optimum" / "commands" / "register"
    copy.mkdir(parents=True)
    copyfile(register_structprune.__file__, copy / "register_structprune.py")

    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['optimum-cli', 'structprune', '--help']; "
        "from optimum.commands.optimum_cli import main; main()"
    )
    assert "commands:" in run_code(code)


def run_code(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_the_registration_imports_no_heavy_module():
    heavy = ("torch", "transformers", "huggingface_hub", "optimum_structprune.config")
    show = f"print([name for name in {heavy} if name in sys.modules])"
    import_optimum = f"import sys, optimum.commands.base; {show}"
    register = (
        "import sys; from argparse import ArgumentParser; "
        "import optimum.commands.register.register_structprune as r; "
        f"r.StructPruneCommand.parse_args(ArgumentParser()); {show}"
    )

    modules_of_optimum = run_code(import_optimum)
    assert modules_of_optimum
    assert run_code(register) == modules_of_optimum, "the registration imports a module that optimum does not import"


def test_a_run_without_measurements_prints_no_figures(folder, tmp_path, capsys):
    line = prune_command(folder, "--width", "mlp=24", "--measure", "false")
    line[2] = str(tmp_path / "out")
    assert main(line) == 0

    output = capsys.readouterr().out
    assert "FFN channels: 40 → 24" in output
    assert "The run measured no losses" in output
    for claim in ("Verdict", "test questions", "×"):
        assert claim not in output
