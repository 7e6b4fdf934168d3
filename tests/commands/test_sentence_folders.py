"""Folders of sentence-transformers whose transformer lies in a folder of its own."""

import json
import shutil

import pytest
import torch
from helpers import contents, put_into, same_weights, save_with_tokenizer, write_texts
from models import build, documents
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from optimum_structprune.commands.cli import main
from optimum_structprune.pruning.embeddings import Pooling, embed


OWN = "0_Transformer"
MODULES = [
    {"idx": 0, "name": "0", "path": OWN, "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
PROMPTS = {"prompts": {"document": "w3 w4"}, "default_prompt_name": "document", "similarity_fn_name": "cosine"}
FILES = {
    "config_sentence_transformers.json": json.dumps(PROMPTS),
    "1_Pooling/config.json": json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}),
    "LICENSE": "the licence",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same model in both layouts, and the results of the same pruning of both."""
    place = tmp_path_factory.mktemp("sentences")
    save_with_tokenizer(build("bert-no-head"), place / "inside" / OWN)
    put_into(place / "inside" / OWN, {"sentence_bert_config.json": '{"max_seq_length": 48}'})
    shutil.copytree(place / "inside" / OWN, place / "flat")
    put_into(place / "inside", {**FILES, "modules.json": json.dumps(MODULES)})
    flat = [{**module, "path": module["path"].replace(OWN, "")} for module in MODULES]
    put_into(place / "flat", {**FILES, "modules.json": json.dumps(flat)})

    write_texts(place / "a.jsonl", documents(80))
    text = ["--domain", f"a={place / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "16", "--general-share", "0"]
    for name in ("inside", "flat"):
        command = ["prune", str(place / name), str(place / f"{name}-out"), "--width", "mlp=24", *text, "--quiet"]
        assert main(command) == 0
    return place


def test_the_result_is_the_same_as_of_a_transformer_in_the_root(place):
    inside, flat = (contents(place / f"{name}-out") for name in ("inside", "flat"))
    assert inside.keys() == flat.keys() >= {*FILES, "modules.json", "sentence_bert_config.json", "config.json"}
    assert json.loads(inside["modules.json"]) == json.loads(flat["modules.json"])
    for name in (*FILES, "sentence_bert_config.json"):
        assert inside[name] == flat[name]
    models = [AutoModel.from_pretrained(place / f"{name}-out") for name in ("inside", "flat")]
    assert same_weights(*models) and models[0].config.intermediate_size == 24
    pooling, same_pooling = (Pooling.of(AutoModel.from_pretrained(place / name)) for name in (f"inside/{OWN}", "flat"))
    assert pooling == same_pooling == Pooling(["cls"], "w3 w4")


def test_other_commands_read_both_layouts(place, capsys):
    for name in ("inside", "flat"):
        assert main(["inspect", str(place / name)]) == 0
        assert main(["plan", str(place / name), "--width", "mlp=24"]) == 0
    spaces = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    assert len({*spaces}) == 1 and len(spaces) == 2


def test_sentence_transformers_loads_the_result(place):
    library = pytest.importorskip("sentence_transformers", minversion="6", reason="it loads the folder")
    out = place / "inside-out"
    texts = [text[:40] for text in documents(9)]
    theirs = torch.tensor(library.SentenceTransformer(str(out), device="cpu").encode(texts, prompt=""))
    reader = AutoTokenizer.from_pretrained(out)
    rows = [torch.tensor(row) for row in reader(texts)["input_ids"]]
    ours = embed(AutoModel.from_pretrained(out), rows, Pooling(["cls"]))
    torch.testing.assert_close(normalize(ours), normalize(theirs), atol=1e-5, rtol=1e-4)
