"""Test folders of sentence-transformers with the transformer in a subfolder."""

import json
import shutil

import pytest
import torch
from helpers import contents, error_line, put_into, same_weights, save_with_tokenizer, write_texts
from models import build, documents
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from optimum_structprune.commands.cli import main
from optimum_structprune.measure.vectors import Pooling, embed


SUBFOLDER = "0_Transformer"
PROMPTS = {"prompts": {"document": "w3 w4"}, "default_prompt_name": "document", "similarity_fn_name": "cosine"}
FILES = {
    "config_sentence_transformers.json": json.dumps(PROMPTS),
    "1_Pooling/config.json": json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}),
    "LICENSE": "the licence",
}


def modules_file(transformer_path):
    """Return the content of `modules.json` for a transformer at this path."""
    kinds = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": transformer_path, "type": f"{kinds}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kinds}.Pooling"},
    ]
    return json.dumps(modules)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Save one model in both layouts, and prune both."""
    place = tmp_path_factory.mktemp("sentences")
    inside = place / "inside"
    flat = place / "flat"
    save_with_tokenizer(build("bert-no-head"), inside / SUBFOLDER)
    put_into(inside / SUBFOLDER, {"sentence_bert_config.json": '{"max_seq_length": 48}'})
    shutil.copytree(inside / SUBFOLDER, flat)
    put_into(inside, FILES | {"modules.json": modules_file(SUBFOLDER)})
    put_into(flat, FILES | {"modules.json": modules_file("")})

    write_texts(place / "a.jsonl", documents(80))
    text = ["--domain", f"a={place / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "16", "--general-share", "0"]
    for folder in (inside, flat):
        line = ["prune", str(folder), f"{folder}-out", "--width", "mlp=24", "--quiet"]
        assert main(line + text) == 0
    return place


def test_a_transformer_in_a_subfolder_is_pruned_like_one_in_the_root(place):
    inside = contents(place / "inside-out")
    flat = contents(place / "flat-out")
    names = list(FILES) + ["sentence_bert_config.json"]
    assert inside.keys() == flat.keys()
    assert flat.keys() >= set(names + ["modules.json", "config.json"])
    assert json.loads(inside["modules.json"]) == json.loads(flat["modules.json"])
    for name in names:
        assert inside[name] == flat[name]

    inside_model = AutoModel.from_pretrained(place / "inside-out")
    flat_model = AutoModel.from_pretrained(place / "flat-out")
    assert same_weights(inside_model, flat_model)
    assert inside_model.config.intermediate_size == 24


def test_the_pooling_is_found_in_both_layouts(place):
    inside_model = AutoModel.from_pretrained(place / "inside" / SUBFOLDER)
    flat_model = AutoModel.from_pretrained(place / "flat")

    assert Pooling.of(inside_model) == Pooling(["cls"], True, *["w3 w4"] * 3)
    assert Pooling.of(flat_model) == Pooling(["cls"], True, *["w3 w4"] * 3)


def test_other_commands_read_both_layouts(place, capsys):
    for name in ("inside", "flat"):
        assert main(["inspect", str(place / name)]) == 0
        assert main(["plan", str(place / name), "--width", "mlp=24"]) == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp")]
    assert len(lines) == 2
    assert len(set(lines)) == 1


def test_sentence_transformers_loads_the_result(place):
    library = pytest.importorskip("sentence_transformers", minversion="6", reason="it loads the folder")
    out = place / "inside-out"
    texts = [text[:40] for text in documents(9)]

    encoder = library.SentenceTransformer(str(out), device="cpu")
    expected = torch.tensor(encoder.encode(texts, prompt=""))
    reader = AutoTokenizer.from_pretrained(out)
    rows = [torch.tensor(row) for row in reader(texts)["input_ids"]]
    vectors = embed(AutoModel.from_pretrained(out), rows, Pooling(["cls"]))

    torch.testing.assert_close(normalize(vectors), normalize(expected), atol=1e-5, rtol=1e-4)


def test_a_router_behind_the_transformer_is_copied(place, tmp_path):
    original = shutil.copytree(place / "flat", tmp_path / "original")
    modules = json.loads(modules_file("")) + [{"path": "2_Router", "type": "sentence_transformers.models.Router"}]
    router = {"2_Router/router_config.json": "{}", "2_Router/query_0_Dense/config.json": '{"in_features": 32}'}
    put_into(original, router | {"modules.json": json.dumps(modules)})

    line = f"prune {original} {tmp_path / 'out'} --width mlp=24 --domain a={place / 'a.jsonl'} --num-samples 6"
    assert main([*line.split(), "--seq-length", "16", "--general-share", "0"]) == 0
    assert contents(tmp_path / "out").keys() >= router.keys()


def test_layers_that_a_module_reads_are_not_removed(place, tmp_path, capsys):
    original = shutil.copytree(place / "flat", tmp_path / "original")
    modules = [{"path": ""}, {"path": "1_WeightedLayerPooling"}, {"path": "2_Pooling"}]
    weights = {"1_WeightedLayerPooling/config.json": '{"num_hidden_layers": 2, "layer_start": 1}'}
    put_into(original, weights | {"modules.json": json.dumps(modules)})

    assert main(["prune", str(original), str(tmp_path / "out"), "--width", "layer=1", "--seq-length", "16"]) == 2
    assert "1_WeightedLayerPooling/config.json belongs to a module that reads" in error_line(capsys)
