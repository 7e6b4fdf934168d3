"""The command that a run prints as the next one runs as it is printed, for every kind of model."""

import re
from shlex import split

import pytest
import torch
from helpers import save_with_tokenizer
from models import GROUPED, PLAIN, build, byte_level, random_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import optimum_structprune
from optimum_structprune import StructPruneConfig
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.record import view
from optimum_structprune.record.verdict import Level, Verdict


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS = {
    "decoder": (AutoModelForCausalLM, "llama", GROUPED),
    "encoder": (AutoModel, "bert", PLAIN),
    "encoder-decoder": (AutoModelForSeq2SeqLM, "t5", T5),
}
TRIM = ["--target", "vocab", "--budget", "parameters=0.9"]
NARROW = ["--width", "mlp=24"]
# The kind of model, the flags of its pruning, the level of its verdict, and the command that runs next.
CASES = [
    ("decoder", TRIM, Level.READY, "evaluate"),
    ("encoder", NARROW, Level.RECOVER, "recover"),
    ("decoder", NARROW, Level.READY, "evaluate"),
    ("decoder", NARROW, Level.RECOVER, "recover"),
    ("decoder", TRIM, Level.RECOVER, "recover"),
    ("decoder", NARROW + ["--recovery-tokens", "2000"], Level.READY, "evaluate"),
    ("decoder", NARROW + ["--skip-layer", "0"], Level.OWN_DOMAINS, "recover"),
    ("encoder", TRIM, Level.READY, "evaluate"),
    ("encoder-decoder", NARROW, Level.RECOVER, "evaluate"),
    ("encoder-decoder", TRIM, Level.READY, "evaluate"),
]
# Flags that shorten the printed command, and nothing that it needs.
SHORT = {"evaluate": ["--num-samples", "2"], "recover": ["--tokens", "2000", "--training", "disable_tqdm=true"]}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Save a model of each kind with 512 positions, and a tokenizer that reads any text."""
    folder = tmp_path_factory.mktemp("next")
    reader = byte_level(list(builtin_documents("prose"))[:50], 1200)
    for name, (auto, model_type, fields) in MODELS.items():
        sizes = fields | {"vocab_size": len(reader), "max_position_embeddings": 512, "pad_token_id": 0}
        save_with_tokenizer(random_model(auto, model_type, sizes), folder / name, reader)
    return folder


def next_line(printed):
    return re.search(r"^Next: structprune (.*)$", printed, re.M)[1]


def marks_of(case):
    """Return the marks of a case by its time."""
    kind, _, _, command = case
    if command == "recover" or kind == "encoder-decoder":
        return [pytest.mark.nightly]
    if case not in CASES[:2]:
        return [pytest.mark.slow]
    return []


@pytest.mark.parametrize(
    ("kind", "flags", "level", "command"), [pytest.param(*case, marks=marks_of(case)) for case in CASES]
)
def test_the_printed_next_command_runs(kind, flags, level, command, desk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(view, "judge", lambda report, answers: Verdict(level, ""))
    text = ["--domain", "prose=builtin:prose", "--num-samples", "6", "--device", "cpu"]
    assert main(["prune", kind, str(tmp_path / "out"), *flags, *text]) == 0, capsys.readouterr().err

    words = split(next_line(capsys.readouterr().out))
    assert words[0] == command
    assert main(words + SHORT[command]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()

    if command == "recover":
        words = split(next_line(printed.out))
        assert words[0] == "evaluate"
        assert main(words + SHORT["evaluate"]) == 0, capsys.readouterr().err
    elif flags == TRIM and kind == "decoder":
        assert re.search(r"warning: The samples are cut from 512 to \d+ tokens", printed.err)


def test_an_image_model_has_no_next_command_and_is_compared_by_size(tmp_path, capsys):
    build("vit").save_pretrained(tmp_path / "vit")
    assert main(["prune", str(tmp_path / "vit"), str(tmp_path / "out"), *NARROW]) == 2
    assert "Next:" not in capsys.readouterr().out

    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    result = optimum_structprune.prune(build("vit"), StructPruneConfig(widths={"mlp": 16}), inputs={"a": pixels})
    result.save(tmp_path / "out")
    assert main(["evaluate", str(tmp_path / "out"), "--against", str(tmp_path / "vit")]) == 0
