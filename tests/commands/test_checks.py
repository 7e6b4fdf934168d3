"""What flags show to be wrong is refused before torch is imported, what a config shows, before weights are read."""

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
    """A text, and a model of which all is there but the weights."""
    folder = save_desk(tmp_path_factory.mktemp("checks"))
    (folder / "model" / "model.safetensors").unlink()
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "own.yaml").write_text("- model_types: 3\n")
    (folder / "empty.txt").touch()
    (folder / "columns.jsonl").write_text('{"texts": "one two"}\n')
    other, reader = with_tokens(build("llama-tied"), tokenizer(), [0, 1, 2, *range(95, 2, -1)])
    save_with_tokenizer(other, folder / "other", reader)
    (folder / "other" / "model.safetensors").unlink()
    XGLMConfig(d_model=8, num_layers=1, attention_heads=2).save_pretrained(folder / "other-kind")
    for name in ("adapter/adapter_config.json", "outside/config.json", "parts/0_Transformer/config.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    router = [{"path": "", "type": "sentence_transformers.models.Router"}]
    for name in ("query_0_SparseStaticEmbedding", "document_0_MLMTransformer"):
        model_type = {"model_type": "bert"} if name.startswith("document") else {}
        put_into(folder / "routed" / name, {"config.json": json.dumps(model_type)})
    put_into(folder / "routed", {"modules.json": json.dumps(router)})
    index = {"weight_map": {"a": "a.safetensors", "b": "../elsewhere.safetensors"}}
    (folder / "outside" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "run.yaml").write_text("num_samples: many\n")
    (folder / "twice.yaml").write_text("seed: 1\nrounds: 2\nseed: 3\n")
    (folder / "huge.yaml").write_text("[" * 300_000)
    (folder / "misspelt.yaml").write_text("sparsiti: 0.2\n")
    return folder


PRUNE, RECOVER = "prune model out", "recover model out"
SHARE = f"{PRUNE} --sparsity 0.2"
FLAGS = [
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
    (
        f"{SHARE} --recovery-tokens 999999999999999999999",
        "error: --recovery `tokens` must be at most 1,000,000,000,000",
    ),
    (f"{SHARE} --config twice.yaml", "twice.yaml cannot be read: the key 'seed' is in line 1 and again in line 3"),
    (f"{SHARE} --rouns 2", "there is no flag --rouns. Did you mean '--rounds'?"),
    (f"{SHARE} --refit ls", "error: --refit must be a registered refit, got 'ls'. "),
    (f"{SHARE} --config run.yaml", "error: run.yaml: `num_samples` must be a whole number, got 'many'."),
    (f"{SHARE} --config huge.yaml", "huge.yaml cannot be read: it is nested too deeply"),
    (f"{SHARE} --general-text builtin:prose --general-share 0", "general_text='builtin:prose' has no effect"),
    (f"{SHARE} --recover --offload disk", "recovery trains it in memory; leave out recovery"),
    (f"{SHARE} --arch own.yaml", "own.yaml"),
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
    ("prune model caf\udce9 --sparsity 0.2", "cannot be written: its path is not text in UTF-8"),
    (f"{SHARE} --text caf\udce9.txt", "--domain `source` must be text in UTF-8, got 'caf\\udce9.txt'"),
    (f"{SHARE} --text https://x/a.txt", "https://x/a.txt is an address. Download it"),
    ("plan outside --sparsity 0.2", "names '../elsewhere.safetensors', which is not a file in its folder"),
    ("recover adapter out", "holds an adapter and no model. In Python, `peft.AutoPeft"),
    ("recover model out --teacher no/where", "'no/where' cannot be loaded"),
    ("recover model out --teacher outside", "names '../elsewhere.safetensors', which is not a file in its folder"),
    ("prune model full --sparsity 0.2 --overwrite", "is not a result of structprune"),
    ("export model out", "Name a file OUT.gguf for llama.cpp, or a folder with --pad-uniform"),
    ("export model out.gguf --pad-uniform", "for runtimes that take one width"),
    ("export model out --pad-uniform --dtype q8_0", "Pass an output OUT.gguf"),
    ("plan model --sparsity 0.2 --json no/such/file", "cannot be written"),
    ("evaluate model --text a.jsonl none.txt", "the file or folder none.txt does not exist"),
    ("evaluate model --json /nowhere/x.json", "there is no folder /nowhere"),
    ("evaluate model --json run.yaml", "--json run.yaml exists; name another file, or replace it with"),
    ("evaluate model --answers none.jsonl", "There is no file none.jsonl"),
    (
        "evaluate model --domain a=a.jsonl --limit 0",
        "argument --limit: expected a whole number from 1 to 10**12, got '0'",
    ),
]
# What the model's config shows.
MODEL = [
    ("plan model --width mlp=24 --offload disk", "`--offload` changes the memory that `--cost` counts. Add `--cost`"),
    ("plan other-kind --width mlp=4", "'xglm' is not described"),
    (f"{PRUNE} --width mpl=24", "has no space 'mpl' to prune. Did you mean 'mlp'?"),
    (f"{PRUNE} --width vocab=2", "The tokenizer is of the kind WordLevel"),
    (f"{PRUNE} --budget bytes=75", "a share of the dense model lies below 1"),
    (f"{SHARE} --domain a=columns.jsonl", "(--domain '{name: a, source: columns.jsonl, text_column: …}'). Did"),
    (f"{SHARE} --seq-length 100000", "seq_length=100000 is longer than the model's"),
    (f"{SHARE} --num-samples 2", "`num_samples=2` is too small for 4 domains. Set it to at least 4."),
    (f"{SHARE} --num-samples 1000000000 --seq-length 24", "num_samples below 1000000000"),
    (f"{SHARE} --text a.jsonl --num-samples 200 --seq-length 24", "The domain 'a' has "),
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


@pytest.mark.parametrize(("line", "message"), MODEL)
def test_what_a_config_refuses_is_refused_without_weights(folder, line, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(split(line) if "--seq-length" in line else [*split(line), "--seq-length", "24"]) == 2
    said = capsys.readouterr().err.splitlines()
    errors = [text for text in said if text.startswith("structprune: error: ")]
    assert len(errors) == 1 and message in errors[0], said
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("file", "message"), [
    ("broken.jsonl", "line 2 is not JSON"),
    ("broken.csv", "line 3 has more fields"),
    ("broken.parquet", "cannot be read"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line_on_stderr(folder, file, message, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    contents = {"jsonl": '{"text": "a"}\n{"te', "csv": "text\na\nb,c\n", "parquet": "PAR1"}
    (folder / file).write_text(contents[file.partition(".")[2]])
    assert main(split(f"{SHARE} --quiet --seq-length 24 --text {file}")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"structprune: error: The domain 'broken': {file} cannot be read: ") and message in line


SCRIPT = """
import json, os, sys
from contextlib import redirect_stderr
from io import StringIO
from shlex import split
from optimum_structprune.commands.cli import main

os.chdir(sys.argv[2])
found = []
for line in json.loads(sys.argv[1]):
    said = StringIO()
    with redirect_stderr(said):
        try:
            code = main(split(line))
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue(), sorted({"torch", "transformers", "datasets"} & {*sys.modules})])
print(json.dumps(found))
"""


def test_what_flags_refuse_is_refused_without_torch(folder):
    found = json.loads(ran([sys.executable, "-c", SCRIPT, json.dumps([line for line, _ in FLAGS]), folder]))
    for (line, message), (code, said, imported) in zip(FLAGS, found, strict=True):
        assert code == 2 and message in said, (line, said)
        assert said.count("\n") <= 4 and "Validation error" not in said, said
        assert not imported, line
    assert not (folder / "out").exists()
