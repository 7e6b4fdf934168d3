"""`structprune plan` takes each command line of `structprune prune`."""

import json
from argparse import SUPPRESS

import pytest
from helpers import error_line, save_desk, save_with_tokenizer, with_long
from models import real_text_model

from optimum_structprune.commands.cli import main
from optimum_structprune.commands.flags import COMMANDS


# Values for the flags of `prune` that need one, or that need another flag.
VALUES = {
    "--allocation": "sensitivity",
    "--answer-share": "0.5",
    "--arch": "own.yaml",
    "--attn-implementation": "eager",
    "--base-model": "ann/model",
    "--batch-size": "2",
    "--budget": "parameters=0.9",
    "--checkpoint-dir": "layers",
    "--config": "run.yaml",
    "--criterion": "wanda",
    "--device": "cuda",
    "--domain": "b=a.jsonl",
    "--dtype": "bfloat16",
    "--error-feedback": "0.1",
    "--general-share": "0",
    "--general-text": "builtin:prose",
    "--gguf": "q8_0",
    "--keep-tokens": "a",
    "--languages": "de,en",
    "--license": "mit",
    "--measure": "false",
    "--num-samples": "6",
    "--offload": "cpu",
    "--recovery": "tokens=2000",
    "--recovery-tokens": "2000",
    "--refit": "none",
    "--round-to": "8",
    "--rounds": "2",
    "--seed": "1",
    "--seq-length": "32",
    "--skip-layer": "0",
    "--sparsity": "0.2",
    "--speed-use": "encode",
    "--target": "mlp",
    "--tensor-parallel": "2",
    "--text": "a.jsonl",
    "--width": "mlp=24",
}
AMOUNTS = ("--budget", "--sparsity", "--width")
# Flags that are tested by `make test`. `make test-long` tests all of them.
FIRST = ("--device", "--gguf", "--json", "--offload", "--overwrite", "--recovery-tokens", "--resume")
# Flags of a pruned vocabulary.
TOKEN_FLAGS = ("--keep-tokens", "--languages")


class Flags:
    """A parser that records whether each shown flag of a command takes a value."""

    def __init__(self, name):
        self.takes_value = {}
        (command,) = [command for command in COMMANDS if command.name == name]
        command.declare(self)

    def add_argument_group(self, title):
        return self

    def add_argument(self, flag, action=None, help=None, **options):
        if flag.startswith("--") and help != SUPPRESS:
            self.takes_value[flag] = action != "store_true"

    def set_defaults(self, **values):
        pass


PRUNE_FLAGS = Flags("prune").takes_value


def test_plan_has_all_flags_of_prune():
    assert PRUNE_FLAGS.items() <= Flags("plan").takes_value.items()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = save_desk(tmp_path_factory.mktemp("plan"))
    model, tokenizer = real_text_model()
    save_with_tokenizer(model, folder / "text-model", tokenizer)
    (folder / "run.yaml").write_text("seq_length: 24\n")
    (folder / "own.yaml").write_text("[]")
    (folder / "OUT").mkdir()
    (folder / "OUT" / "mine.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("flag", with_long(PRUNE_FLAGS, FIRST))
def test_a_line_of_prune_runs_as_a_plan(flag, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    words = [flag]
    if PRUNE_FLAGS[flag] and flag != "--json":
        words.append(VALUES[flag])

    model = "text-model" if flag in TOKEN_FLAGS else "model"
    line = ["plan", model, "OUT", "--seq-length", "24", *words]
    if flag in TOKEN_FLAGS:
        line += ["--width", "vocab=320"]
    elif flag not in AMOUNTS:
        line += ["--sparsity", "0.2"]

    assert main(line) == 0, capsys.readouterr().err
    assert (desk / "OUT" / "mine.txt").read_text() == "mine"
    assert not list(desk.glob(".OUT*"))


def test_a_plan_refuses_what_the_pruning_would_refuse(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    line = ["plan", "model", "OUT", "--width", "mlp=24", "--seq-length", "24"]

    for words, message in [
        (["--offload", "cpu", "--recover"], "--offload cpu prunes a model that does not fit"),
        (["--offload", "cpu", "--gguf", "q8_0"], "--gguf takes a whole model in memory"),
    ]:
        assert main(line + words) == 2
        assert message in error_line(capsys)


def test_a_plan_of_another_device_counts_the_same_memory(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    sizes = []
    for device in ("cpu", "cuda"):
        assert main(["plan", "model", "--width", "mlp=24", "--seq-length", "24", "--json", "--device", device]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["parameters"])
    assert sizes[0] == sizes[1]
