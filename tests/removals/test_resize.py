"""Fewer tokens: the model computes for those that stay what it did, in every family, and is loaded as such."""

import pytest
import torch
from helpers import assert_remembers_its_own_config, same_weights
from models import CASES, OTHER_STRUCTURES, OTHERS, STRUCTURES, VOCAB, build

from optimum_structprune.arch.load import describe
from optimum_structprune.arch.token_space import named_ids
from optimum_structprune.errors import StructPruneError
from optimum_structprune.forward.metrics import outputs_of
from optimum_structprune.method.layers import run_model
from optimum_structprune.removals.resize import drop_tokens_


KEEP = (0, 1, 2, *range(5, 60, 2), 70, 71, 95)
FIRST = {"llama-untied", *STRUCTURES, *OTHER_STRUCTURES, "bert", "t5", "gemma3", "gemma4_text", "roberta", "phi"} - {
    "vit"
}
# Pictures have no tokens, and the tokens of zamba2 stay.
READ = [
    case if case in FIRST else pytest.param(case, marks=pytest.mark.nightly)
    for case in [*CASES, *OTHERS]
    if case not in ("vit", "zamba2")
]
# What is not a matrix of rows tied to the embedding: a head of its own, biases, a second embedding.
PER_TOKEN = {"llama-untied": 2 * 32, "phi": 2 * 32 + 1, "bert": 32 + 1, "bart": 32, "gemma4_text": 32 + 16, "t5": 32}


def fewer(case):
    """The dense model, the one without tokens, and the ids that stay: `KEEP`, and what the configs name."""
    model, small = build(case), build(case)
    keep = sorted({*KEEP} | named_ids(model) & {*range(VOCAB)})
    drop_tokens_(small, describe(small), keep)
    return model, small, keep


@torch.no_grad()
def same_outputs(model, small, keep, atol=0.0):
    """On text whose tokens all stay."""
    new = torch.randint(len(keep), (2, 12), generator=torch.Generator().manual_seed(1))
    dense = outputs_of(run_model(model, torch.tensor(keep)[new]))
    dense = dense[..., keep] if dense.shape[-1] == VOCAB else dense
    torch.testing.assert_close(outputs_of(run_model(small, new)), dense, atol=atol, rtol=0)


@pytest.mark.parametrize("case", READ)
def test_what_stays_is_computed_as_before_and_reloads(case, tmp_path):
    model, small, keep = fewer(case)
    same_outputs(model, small, keep)
    assert_remembers_its_own_config(small)
    space, left = describe(model).of("vocab")[0], describe(small).of("vocab")[0]
    assert (space.size, left.size) == (VOCAB, len(keep)) and left.unit_params == space.unit_params
    assert model.num_parameters() - small.num_parameters() == space.unit_params * (VOCAB - len(keep))
    assert space.unit_params == PER_TOKEN.get(case, space.unit_params)
    small.save_pretrained(tmp_path)
    same_outputs(model, type(model).from_pretrained(tmp_path), keep, 1e-6)


def test_what_is_tied_stays_tied_and_a_larger_loss_can_be_taken():
    _, small, keep = fewer("llama-tied")
    assert small.get_input_embeddings().weight is small.get_output_embeddings().weight
    ids = torch.arange(len(keep))[None]
    loss = small(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and small.get_input_embeddings().num_embeddings == len(keep) == small.vocab_size


def test_ids_in_configs_are_numbered_anew():
    model = build("bart")
    model.config.forced_eos_token_id, model.config.pad_token_id = 70, 0
    model.generation_config.eos_token_id, model.generation_config.suppress_tokens = [2, 95], [71, 5]
    model.generation_config.bad_words_ids, model.generation_config.bos_token_id = [[70, 71]], None
    model.generation_config.lang_to_id, model.generation_config.task_to_id = {"<|de|>": 70}, {"translate": 71}
    assert {2, 95, 71, 5, 70} <= named_ids(model)
    assert not describe(build("vit")).of("vocab"), "a model without tokens has no vocabulary"
    drop_tokens_(model, describe(model), KEEP)
    new = {old: place for place, old in enumerate(KEEP)}
    assert model.config.forced_eos_token_id == new[70] and model.config.vocab_size == len(KEEP)
    assert model.generation_config.eos_token_id == [2, new[95]]
    assert model.generation_config.suppress_tokens == [new[71], new[5]]
    assert model.generation_config.bad_words_ids == [[new[70], new[71]]]
    assert model.generation_config.lang_to_id == {"<|de|>": new[70]}
    assert model.generation_config.task_to_id == {"translate": new[71]}
    images = build("llava")
    images.config.image_token_index = images.config.text_config.pad_token_id = 71
    images.config.vision_config.image_token_id = 70
    drop_tokens_(images, describe(images), KEEP)
    assert images.config.image_token_index == new[71] == images.config.text_config.pad_token_id
    assert images.config.vision_config.image_token_id == new[70] and images.config.text_config.vocab_size == len(KEEP)


def test_a_token_that_a_config_names_is_never_taken_for_another():
    model = build("llama-tied")
    model.generation_config.suppress_tokens = [5, 94]
    with pytest.raises(StructPruneError, match="GenerationConfig names the token 94, which is none of the 34"):
        drop_tokens_(model, describe(model), KEEP)
    assert model.config.vocab_size == VOCAB and model.generation_config.suppress_tokens == [5, 94]
    assert same_weights(model, build("llama-tied"))
