"""The command line, through both names, as a user calls it."""

import json
import subprocess
import sys

import pytest
from helpers import error_line, own_family, save_desk, save_with_tokenizer
from models import GROUPED, build
from optimum.commands.optimum_cli import main as optimum_main
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from optimum_structprune import StructPruner, disable_heterogeneous, enable_heterogeneous
from optimum_structprune.arch import family
from optimum_structprune.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("cli"))


def command(folder, *extra, at=None):
    """A pruning on the text of the folder; `at` is where the model lies and the result goes, by default the same."""
    paths = [str((at or folder) / name) for name in ("model", "out")]
    short = ["--num-samples", "6", "--seq-length", "24", "--device", "cpu"]
    return ["prune", *paths, "--domain", f"a={folder / 'a.jsonl'}", *short, *extra]


def test_by_the_other_name(folder, capsys, monkeypatch):
    """The script `structprune` runs in `test_extending.py`, in a process of its own, and on the pages of the docs."""
    line = command(folder, "--width", "mlp=24", "--criterion", "nope")
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "structprune", *line])
    with pytest.raises(SystemExit) as end:
        optimum_main()
    assert end.value.code == 2 and "criterion" in error_line(capsys)


def test_encoders_load_as_what_they_were_saved_as(folder, tmp_path, capsys):
    save_with_tokenizer(build("distilbert"), tmp_path / "model")
    assert main(command(folder, "--width", "mlp=24", at=tmp_path)) == 0
    assert "load it with DistilBertForMaskedLM.from_pretrained" in capsys.readouterr().out
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.hidden_dim == 24


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_of_a_flag_runs(folder, name, capsys, monkeypatch):
    used = []
    prune = StructPruner.prune

    def noting(pruner, model, *args, **kwargs):
        used.append(model.config._attn_implementation)
        return prune(pruner, model, *args, **kwargs)

    monkeypatch.setattr(StructPruner, "prune", noting)
    assert main(command(folder, "--width", "mlp=24", "--attn-implementation", name, "--overwrite")) == 0
    assert used == [name]


@pytest.mark.parametrize("number", ["x", "", "-1", "1.5"])
def test_a_launcher_sets_numbers(folder, number, capsys, monkeypatch):
    model = str(folder / "model")
    monkeypatch.setenv("RANK", number)
    assert main(["inspect", model]) == 2
    assert f"The environment has RANK={number!r}, where a launcher sets a number" in error_line(capsys)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", number)
    assert main(command(folder, "--width", "mlp=24", "--overwrite")) == 2
    assert f"The environment has WORLD_SIZE={number!r}" in error_line(capsys)


@pytest.mark.slow
def test_a_non_uniform_model_of_ones_own_family(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(family, "_USER_FAMILIES", {})
    (tmp_path / "own.yaml").write_text(json.dumps([own_family("cwm", layer_class={"cwm": "CwmDecoderLayer"})]))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cwm", **GROUPED))
    save_with_tokenizer(model, tmp_path / "model")
    small, arch = str(tmp_path / "out"), ["--arch", str(tmp_path / "own.yaml"), "--device", "cpu"]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24"]
    assert main(command(folder, *arch, "--width", "mlp=24", "--skip-layer", "0", at=tmp_path)) == 0
    for arguments in (
        ["evaluate", small, "--against", str(tmp_path / "model"), *text, "--num-samples", "2"],
        ["recover", small, str(tmp_path / "recovered"), *text, "--tokens", "48"],
    ):
        # As in a process that has not read the file.
        family._USER_FAMILIES.clear()
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
