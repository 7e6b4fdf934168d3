"""Test that commands check flags before they import torch, and configs before they read weights."""

import json
import sys
from shlex import split

import pytest
from helpers import put_into, ran, save_desk, save_with_tokenizer, with_tokens
from models import build, tokenizer
from transformers import XGLMConfig

from optimum_structprune.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write texts, configs and models without weights into a folder."""
    folder = save_desk(tmp_path_factory.mktemp("checks"))
    (folder / "model" / "model.safetensors").unlink()

    files = {
        "full/mine.txt": "mine",
        "own.yaml": "- model_types: 3\n",
        "run.yaml": "num_samples: many\n",
        "twice.yaml": "seed: 1\nrounds: 2\nseed: 3\n",
        "misspelt.yaml": "sparsiti: 0.2\n",
        "empty.txt": "",
        "columns.jsonl": '{"texts": "one two"}\n',
        "adapter/adapter_config.json": "{}",
        "parts/0_Transformer/config.json": "{}",
    }
    put_into(folder, files)

    # The same words have other ids in this model.
    ids = [0, 1, 2] + list(range(95, 2, -1))
    renumbered, reader = with_tokens(build("llama-tied"), tokenizer(), ids)
    save_with_tokenizer(renumbered, folder / "other", reader)
    (folder / "other" / "model.safetensors").unlink()
    XGLMConfig(d_model=8, num_layers=1, attention_heads=2).save_pretrained(folder / "other-kind")

    # A folder of sentence-transformers with one encoder for queries and another one for documents.
    router = [{"path": "", "type": "sentence_transformers.models.Router"}]
    files = {
        "modules.json": json.dumps(router),
        "query_0_SparseStaticEmbedding/config.json": "{}",
        "document_0_MLMTransformer/config.json": '{"model_type": "bert"}',
    }
    put_into(folder / "routed", files)

    return folder


PRUNE = "prune model out"
RECOVER = "recover model out"
SHARE = f"{PRUNE} --sparsity 0.2"
# Command lines with a wrong flag, and a part of the error message.
FLAG_ERRORS = [
    ("prune run.yaml out --sparsity 0.2", "'run.yaml' is a file. A model is a folder or an id, and GGUF files cannot"),
    ("prune /no/where out --sparsity 0.2", "'/no/where' cannot be loaded: there is no such folder"),
    ("prune full out --sparsity 0.2", "the folder holds no config.json."),
    ("prune parts out --sparsity 0.2", "the folder holds no config.json, and parts/0_Transformer does."),
    (
        "prune routed out --sparsity 0.2",
        "Prune one of them (document_0_MLMTransformer), and put the result in its place. Do not remove",
    ),
    ("evaluate model no/where", "'no/where' cannot be loaded"),
    (PRUNE, "how much to remove, got none. For example, budget={'parameters': 0.8} (--budget parameters=0.8) keeps"),
    (f"{SHARE} --budget bytes=0.8", "how much to remove, got sparsity=0.2, budget={'bytes': 0.8}"),
    (f"{PRUNE} --budget 0.8", "argument --budget: expected NAME=VALUE, such as mlp=1024 or parameters=0.8, got '0.8'"),
    (
        f"{PRUNE} --width mlp=9.5",
        "--width must be a mapping to a whole number or a list of a whole number or a mapping",
    ),
    (f"{PRUNE} --width mlp=24 --width mlp=8", "--width has two values for 'mlp', 24 and 8. Pass one."),
    (f"{SHARE} --seed=[]", "error: --seed must be a whole number, got []."),
    (f"{SHARE} --config twice.yaml", "twice.yaml cannot be read: the key 'seed' is in line 1 and again in line 3"),
    (f"{SHARE} --rouns 2", "there is no flag --rouns. Did you mean '--rounds'?"),
    (f"{SHARE} --refit ls", "error: --refit must be a registered refit, got 'ls'. "),
    (f"{SHARE} --config run.yaml", "error: run.yaml: `num_samples` must be a whole number, got 'many'."),
    (f"{SHARE} --general-text builtin:prose --general-share 0", "general_text='builtin:prose' has no effect"),
    (f"{SHARE} --recover --offload disk", "recovery trains it in memory. Leave out recovery"),
    (f"{SHARE} --text empty.txt", "The domain 'empty' is empty: empty.txt does not contain any text"),
    (f"{SHARE} --domain a=full/*.csv", "The domain 'a': the pattern 'full/*.csv' contains no file"),
    (f"{SHARE} --domain a=preset:nothing", "The preset 'nothing' does not exist"),
    (f"{SHARE} --domain a.jsonl", "expected NAME=SOURCE[@WEIGHT], such as a=a.jsonl, got 'a.jsonl'"),
    (f"{SHARE} --domain a=a.jsonl@0", "error: --domain `weight` must be greater than 0"),
    (
        f"{SHARE} --recovery 'domains=[{{name: 1, source: a.jsonl}}]'",
        "error: --domain `name` must be a string, got 1.",
    ),
    (f"{SHARE} --recovery tokens=[1", "argument --recovery: '[1' is not YAML"),
    (f"{PRUNE} --config misspelt.yaml", "Did you mean 'sparsity'"),
    (f"{SHARE} --base-model mine", "--base-model 'mine' is not an id on the Hub"),
    (f"{SHARE} --text https://x/a.txt", "https://x/a.txt is an address. Download it"),
    ("recover adapter out", "holds an adapter and no model. In Python, `peft.AutoPeft"),
    ("recover model out --teacher no/where", "'no/where' cannot be loaded"),
    ("prune model full --sparsity 0.2 --overwrite", "is not a result of structprune"),
    ("export model out", "Name a file OUT.gguf for llama.cpp, or a folder with --pad-uniform"),
    ("export model out.gguf --pad-uniform", "for runtimes that take one width"),
    ("export model out --pad-uniform --dtype q8_0", "Pass an output OUT.gguf"),
    ("plan model --sparsity 0.2 --json no/such/file", "cannot be written"),
    ("evaluate model --text a.jsonl none.txt", "the file or folder none.txt does not exist"),
    ("evaluate model --json /nowhere/x.json", "there is no folder /nowhere"),
    ("evaluate model --json run.yaml", "--json run.yaml exists. Choose another file, or replace it with"),
    ("evaluate model --answers none.jsonl", "There is no file none.jsonl"),
    (
        "evaluate model --domain a=a.jsonl --limit 0",
        "argument --limit: expected a whole number, 1 or more, got '0'",
    ),
]
# Command lines that contradict the config of the model, and a part of the error message.
CONFIG_ERRORS = [
    (f"{SHARE} --arch own.yaml", "own.yaml"),
    ("plan other-kind --width mlp=4", "'xglm' is not described"),
    (f"{PRUNE} --width mpl=24", "has no space 'mpl' to prune. Did you mean 'mlp'?"),
    (f"{PRUNE} --width vocab=2", "The tokenizer is of the kind WordLevel"),
    (f"{PRUNE} --budget bytes=75", "is a share below 1, such as 0.9, or a number of bytes, got 75"),
    (f"{PRUNE} --budget parameters=1.0", "is a share below 1, such as 0.9, or a number of parameters, got 1"),
    (f"{SHARE} --domain a=columns.jsonl", "(--domain '{name: a, source: columns.jsonl, text_column: …}'). Did"),
    (f"{SHARE} --seq-length 100000", "seq_length=100000 is longer than the model's"),
    (f"{SHARE} --num-samples 2", "`num_samples=2` is too small for 4 domains. Set it to at least 4."),
    (f"{SHARE} --num-samples 1000000000 --seq-length 24", "Use a smaller `num_samples`"),
    (f"{RECOVER} --teacher other --tokens 4800 --seq-length 24", "by the same ids they mean other tokens"),
    (f"{SHARE} --checkpoint-dir model", "model holds a model"),
    (f"{SHARE} --offload disk --target hidden", "changes weights of all layers"),
    (f"{SHARE} --device warp", "--device warp cannot be used"),
    (f"{SHARE} --attn-implementation fast", "'model' cannot use --attn-implementation fast: Specified `attn_impl"),
    (f"{RECOVER} --attn-implementation fast", "'model' cannot use --attn-implementation fast: Specified"),
    ("evaluate model --domain a=a.jsonl --attn-implementation fast", "'model' cannot use --attn-implementation fast"),
    (f"{RECOVER} --tokens 9000000 --seq-length 100000", "The recovery's seq_length=100000 is longer"),
    (f"{RECOVER} --tokens 3", "at least 96"),
    ("evaluate model --domain a=a.jsonl --seq-length 100000", "seq_length=100000 is longer than the model's"),
    ("evaluate model --speed --prompt 64", "prompt=64 is longer than the model's 64 positions (32 of them are taken)"),
    ("evaluate model --speed --device auto", "--device auto spreads a model"),
    ("evaluate model --html", "has no report.json"),
    ("evaluate model model --html", "--html writes the page of one result, and 2 models are named"),
]


@pytest.mark.parametrize(("line", "message"), CONFIG_ERRORS)
def test_an_error_in_the_config_is_reported_without_weights(folder, line, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = split(line)
    if "--seq-length" not in line:
        arguments += ["--seq-length", "24"]

    assert main(arguments) == 2

    output = capsys.readouterr().err.splitlines()
    errors = [text for text in output if text.startswith("structprune: error: ")]
    assert len(errors) == 1, output
    assert message in errors[0], output
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("file", "message"), [
    ("broken.jsonl", "line 2 is not JSON"),
    ("broken.csv", "line 3 has more fields"),
    ("broken.parquet", "cannot be read"),
])  # fmt: skip
def test_an_unreadable_file_is_reported_in_one_line(folder, file, message, capfd, monkeypatch):
    contents = {
        "broken.jsonl": '{"text": "a"}\n{"te',
        "broken.csv": "text\na\nb,c\n",
        "broken.parquet": "PAR1",
    }
    monkeypatch.chdir(folder)
    (folder / file).write_text(contents[file])

    assert main(split(f"{SHARE} --quiet --seq-length 24 --text {file}")) == 2

    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"structprune: error: The domain 'broken': {file} cannot be read: ")
    assert message in line


SCRIPT = """
import json, os, sys
from contextlib import redirect_stderr
from io import StringIO
from shlex import split
from optimum_structprune.commands.cli import main

HEAVY = {"torch", "transformers", "datasets"}

os.chdir(sys.argv[2])
outcomes = []
for line in json.loads(sys.argv[1]):
    errors = StringIO()
    with redirect_stderr(errors):
        try:
            code = main(split(line))
        except SystemExit as end:
            code = end.code
    outcomes.append([code, errors.getvalue(), sorted(HEAVY & set(sys.modules))])
print(json.dumps(outcomes))
"""


def test_wrong_flags_are_reported_without_torch(folder):
    lines = [line for line, _ in FLAG_ERRORS]
    outcomes = json.loads(ran([sys.executable, "-c", SCRIPT, json.dumps(lines), folder]))

    for (line, message), (code, output, heavy_imports) in zip(FLAG_ERRORS, outcomes, strict=True):
        assert code == 2, (line, output)
        assert message in output, (line, output)
        assert output.count("\n") <= 4, output
        assert "Validation error" not in output, output
        assert not heavy_imports, line
    assert not (folder / "out").exists()
