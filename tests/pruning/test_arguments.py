"""What is of another kind than a parameter takes is refused by name, and nothing has changed then."""

import pytest
from helpers import same_weights
from models import build, config, token_ids, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import AutoStructPruner, StructPruneError, StructPruner, calibrate, prune_model


IDS = token_ids(12, 16)
WRONG = {
    "a path as the model": ({"model": "some/model"}, "model takes a model of transformers, got str"),
    "a class as the model": ({"model": AutoModelForCausalLM}, "model takes a model of transformers, got type"),
    "a path as the tokenizer": ({"tokenizer": "some/model"}, "tokenizer takes a tokenizer, got str"),
    "a mapping as the config": ({"config": {"sparsity": 0.2}}, "config takes a StructPruneConfig, got dict"),
    "a list as inputs": ({"inputs": [IDS]}, "inputs takes a mapping .*, got list"),
    "a tensor as inputs": ({"inputs": IDS}, "inputs takes a mapping .*, got Tensor"),
    "an array": ({"inputs": {"a": IDS.numpy()}}, r"inputs\['a'\] takes a tensor, got ndarray"),
    "a batch": ({"inputs": {"a": {"input_ids": IDS}}}, r"inputs\['a'\] takes a tensor, got dict"),
    "one dimension": ({"inputs": {"a": IDS[0]}}, r"shape \(16,\); \(samples, …\) is expected"),
    "other token ids": ({"inputs": {"a": IDS + 1000}}, "those of this model lie between 0 and"),
    "token ids below zero": ({"inputs": {"a": IDS - 1000}}, "holds token ids from -"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_kind_is_refused(case, tmp_path):
    model = build("llama-tied")
    before = build("llama-tied")
    fields, message = WRONG[case]
    arguments = {"model": model, "config": config(), "tokenizer": tokenizer(), **fields}
    with pytest.raises(StructPruneError, match=message):
        prune_model(**arguments, inplace=True)
    with pytest.raises(StructPruneError, match=message):
        calibrate(folder=tmp_path / "stats", **arguments)
    assert same_weights(model, before) and not list(tmp_path.iterdir())


def test_a_pruner_takes_a_config():
    for make in (StructPruner, AutoStructPruner.from_config):
        with pytest.raises(StructPruneError, match="got TokenizersBackend|got PreTrainedTokenizerFast"):
            make(tokenizer())


def test_token_ids_of_the_model_are_taken():
    small = prune_model(build("llama-tied"), config(), inputs={"a": IDS})
    assert small.config.intermediate_size < build("llama-tied").config.intermediate_size
