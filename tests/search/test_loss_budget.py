"""A search for the largest cut within a loss comes near it, is judged on unseen text, and refuses unusable inputs."""

from dataclasses import replace
from math import inf
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    BART,
    GROUPED,
    TOKENS,
    build,
    config,
    documents,
    fewer_tokens,
    random_model,
    real_text_model,
    token_ids,
    tokenizer,
)
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

from optimum_structprune import (
    DomainConfig,
    StructPruneConfig,
    StructPruneError,
    StructPruner,
    dry_run,
    prune,
    prune_model,
)
from optimum_structprune.arch.spec import MODEL, VOCAB
from optimum_structprune.domains.manifest import EARLIER, Manifest
from optimum_structprune.search.loss_budget import LOSS_OF_COSINE, MOST_TRIALS, largest_cut


def prune_within(model, limit, **fields):
    """Prune a model as far as a limit of its loss allows."""
    options = {"widths": None, "budget": {"loss": limit}, "targets": ("mlp",)}
    options.update(fields)
    return StructPruner(config(**options)).prune(model, tokenizer())


@given(
    power=st.floats(1, 3),
    limit=st.sampled_from([0.01, 0.02, 0.1]),
    extra_share=st.floats(0.01, 0.4),
    free_share=st.floats(0, 0.3),
    factor=st.floats(0.25, 4),
)
def test_a_few_trials_come_near_the_largest_cut(power, limit, extra_share, free_share, factor):
    """Removal is free up to a share, the loss is a power of any further share, and more than 0.9 cannot be removed."""
    largest_share = free_share + extra_share
    tried_shares = []

    def measure(share):
        tried_shares.append(share)
        if share > 0.9:
            return inf
        return limit * (max(share - free_share, 0) / extra_share) ** power

    losses = largest_cut(measure, limit, first=min(factor * largest_share, 0.9))

    assert len(tried_shares) == len(set(tried_shares))
    assert sum(losses[share] < inf for share in tried_shares) <= MOST_TRIALS
    best_share = max(share for share, loss in losses.items() if loss <= limit)
    assert 0.5 * min(0.9, largest_share) <= best_share <= largest_share


def test_the_final_pruning_is_judged_on_text_that_chose_no_size():
    model = prune_model(build("llama-tied"), config(widths={"attention": 2}), tokenizer())
    weights_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    manifest_before = Manifest.seen_by(model)

    result = prune_within(model, 0.05)

    report = result.report
    assert report.loss_search.limit == 0.05
    shares_within_loss = []
    for trial in report.loss_search.trials:
        if trial["your domains"][0] <= 0.05 and trial["unseen text"][0] <= 0.05:
            shares_within_loss.append(trial["removed"])
    removed_share = 1 - report.pruned.parameters / report.original.parameters
    assert removed_share == pytest.approx(max(shares_within_loss), abs=0.001)

    probe_documents = set()
    for entry in result.manifest.with_use(EARLIER):
        probe_documents.update(entry.probe_documents)
    assert probe_documents
    for entry in result.manifest.domains:
        if entry.use != EARLIER:
            assert probe_documents.isdisjoint(entry.heldout_documents)

    # The saved config names the size that the search has chosen.
    (size,) = result.config.budget.values()
    assert result.model.num_parameters() <= size
    uses_before = {pair for pair in manifest_before.uses().items() if pair[0] not in probe_documents}
    assert uses_before.issubset(result.manifest.uses().items())

    # The original model has the same weights, and its manifest has no new text.
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights_before[name], tensor)
    assert Manifest.seen_by(model) is manifest_before


@pytest.mark.slow
def test_tokens_are_removed_in_place_and_their_trials_share_the_weights():
    model, reader = real_text_model()
    settings = fewer_tokens(widths=None, budget={"loss": 0.5}, targets=("vocab",), round_to=1)
    result = prune(model, settings, reader, inplace=True)

    assert result.model is model
    kept_tokens = result.plan.keep[MODEL, VOCAB]
    assert len(kept_tokens) == model.config.vocab_size < len(reader)

    # The trials have removed rows too, but the remaining rows still are rows of the original model.
    original_model, _ = real_text_model()
    original_rows = original_model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, original_rows[list(kept_tokens)])


def test_the_loss_of_an_encoder_is_ten_times_the_distance_of_its_cosine_from_1():
    report = prune_within(build("bert"), 0.02).report
    cosines = [domain.cosine.pruned for domain in report.domains.values()]

    loss = report.loss_search.measured["your domains"][0]
    assert loss == pytest.approx(10 * (1 - sum(cosines) / len(cosines)))
    assert min(cosines) >= 0.99
    assert "Target loss 2.0%" in str(report)


def test_a_loss_that_no_cut_meets_is_refused():
    with pytest.raises(StructPruneError, match="loss=1e-12 cannot be met"):
        prune_within(build("bert"), 1e-12)


def test_a_size_is_tried_once_even_if_several_shares_lead_to_it():
    trials = patch.object(StructPruner, "prune", autospec=True, side_effect=StructPruner.prune)
    message = r"cut that was tried, 34\.18% of the parameters"
    with trials as prune_calls, pytest.raises(StructPruneError, match=message):
        prune_within(build("bert"), 1e-12, targets=("layer",))
    assert prune_calls.call_count == 2, "the call and one trial"


def test_one_document_of_text_is_too_little_for_a_small_loss():
    texts = [" ".join(documents(40, seed=seed)) for seed in (0, 1)]
    with pytest.raises(StructPruneError, match="loss=0.05 cannot be met.*more text"):
        prune_within(build("llama-tied"), 0.05, domains=[DomainConfig(name="a", source=texts)])


@pytest.mark.parametrize(
    ("target", "fields"), [("mlp", {"intermediate_size": 1}), ("attention", {"num_key_value_heads": 1})]
)
def test_a_model_without_anything_to_remove_is_refused_by_the_name_of_the_loss(target, fields):
    """The error does not mention the size that the search begins with, because no user has set it."""
    model = random_model(AutoModelForCausalLM, "llama", GROUPED | fields)
    settings = config(widths=None, budget={"loss": 0.02}, targets=(target,))
    with pytest.raises(StructPruneError) as refusal:
        prune_model(model, settings, tokenizer())

    message = str(refusal.value)
    assert "budget loss=0.02" in message
    assert "parameters=" not in message
    assert "target 'layer' alone" in message


def test_models_and_calls_without_a_loss_on_text_are_refused():
    model = build("llama-tied")
    settings = config(widths=None, budget={"loss": 0.02})
    with pytest.raises(StructPruneError, match="a dry run has no trials"):
        dry_run(model.config, settings)
    with pytest.raises(StructPruneError, match="which `inputs` are not"):
        prune_model(model, settings, tokenizer(), inputs={"a": token_ids(30, 12)})

    speech_model = random_model(WhisperForConditionalGeneration, "whisper", TOKENS | BART)
    with pytest.raises(StructPruneError, match="this model needs other inputs too"):
        prune_model(speech_model, replace(settings, targets=("vocab",)), tokenizer())


def test_a_loss_of_1_or_more_is_refused():
    with pytest.raises(StructPruneError, match="less than 1"):
        config(widths=None, budget={"loss": 2})


def test_the_docstring_names_the_cosine_of_a_loss():
    assert f"is at least {1 - 0.02 / LOSS_OF_COSINE:g}." in str(StructPruneConfig.__doc__)
