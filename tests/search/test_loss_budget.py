"""A size that is found by its loss: how near the search comes, the text that it is judged on, and what is refused."""

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


def pruned(model, limit, inplace=False, **fields):
    asked = config(**{"widths": None, "budget": {"loss": limit}, "targets": ("mlp",), **fields})
    return prune(model, asked, tokenizer(), inplace=inplace)


@given(
    st.floats(1, 3), st.sampled_from([0.01, 0.02, 0.1]), st.floats(0.01, 0.4), st.floats(0, 0.3), st.floats(0.25, 4)
)
def test_a_few_trials_come_near_the_largest_cut(power, limit, most, free, factor):
    """Of losses that grow with a power of what goes beyond a part that is free; no more than nine tenths can go."""
    tried = []

    def measure(share):
        tried.append(share)
        return inf if share > 0.9 else limit * (max(share - free, 0) / most) ** power

    losses = largest_cut(measure, limit, first=min(factor * (free + most), 0.9))
    met = max(share for share, loss in losses.items() if loss <= limit)
    assert len(tried) == len({*tried}) and sum(losses[share] < inf for share in tried) <= MOST_TRIALS
    assert 0.5 * min(0.9, free + most) <= met <= free + most


def test_the_last_pruning_is_judged_on_text_that_chose_nothing():
    model = prune_model(build("llama-tied"), config(widths={"attention": 2}), tokenizer())
    before, seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}, Manifest.seen_by(model)
    result = pruned(model, 0.05)
    report, wish = result.report, result.report.wish
    assert wish["loss"] == 0.05
    met = max(one["removed"] for one in wish["trials"] if max(one["your domains"][0], one["unseen text"][0]) <= 0.05)
    assert 1 - report.pruned.parameters / report.dense.parameters == pytest.approx(met, abs=0.001)
    chosen = {name for entry in result.manifest.of_use(EARLIER) for name in entry.probe_documents}
    entries = [entry for entry in result.manifest.domains if entry.use != EARLIER]
    assert chosen and not chosen & {name for entry in entries for name in entry.heldout_documents}
    # What is saved names the size that was found.
    (size,) = result.config.budget.values()
    assert result.model.num_parameters() <= size
    assert {pair for pair in seen.uses().items() if pair[0] not in chosen} <= {*result.manifest.uses().items()}
    # The dense model is as it was, and has seen no more.
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert Manifest.seen_by(model) is seen


@pytest.mark.slow
def test_tokens_go_in_place_and_their_trials_share_the_weights():
    model, reader = real_text_model()
    asked = fewer_tokens(widths=None, budget={"loss": 0.5}, targets=("vocab",), round_to=1)
    result = prune(model, asked, reader, inplace=True)
    assert result.model is model
    kept = result.plan.keep[MODEL, VOCAB]
    assert len(kept) == model.config.vocab_size < len(reader)
    # The rows that are left are the dense model's own, whatever the trials have cut.
    dense = real_text_model()[0].get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, dense[[*kept]])


def test_an_encoder_loses_ten_times_what_its_cosine_lacks():
    report = pruned(build("bert"), 0.02).report
    cosines = [domain.vectors.cosine.pruned for domain in report.domains.values()]
    assert report.wish["measured"]["your domains"][0] == pytest.approx(10 * (1 - sum(cosines) / len(cosines)))
    assert min(cosines) >= 0.99 and "Target loss 2.0%" in str(report)


def test_a_wish_that_nothing_meets_names_the_smallest_loss():
    with pytest.raises(StructPruneError, match="loss=1e-12 cannot be met"):
        pruned(build("bert"), 1e-12)
    # Each size is tried once, whatever share was asked for.
    trying = patch.object(StructPruner, "prune", autospec=True, side_effect=StructPruner.prune)
    with trying as tried, pytest.raises(StructPruneError, match=r"cut that was tried, 34\.18% of the parameters"):
        pruned(build("bert"), 1e-12, targets=("layer",))
    assert tried.call_count == 1


def test_text_of_one_document_meets_no_small_wish():
    texts = [DomainConfig(name="a", source=[" ".join(documents(40, seed=seed)) for seed in (0, 1)])]
    with pytest.raises(StructPruneError, match="loss=0.05 cannot be met.*more text"):
        pruned(build("llama-tied"), 0.05, domains=texts)


@pytest.mark.parametrize(
    ("target", "fields"), [("mlp", {"intermediate_size": 1}), ("attention", {"num_key_value_heads": 1})]
)
def test_a_loss_without_anything_to_remove_is_refused_by_its_own_name(target, fields):
    """The size that a search begins with is no setting of the user."""
    model = random_model(AutoModelForCausalLM, "llama", {**GROUPED, **fields})
    asked = config(widths=None, budget={"loss": 0.02}, targets=(target,))
    with pytest.raises(StructPruneError) as refusal:
        prune_model(model, asked, tokenizer())
    assert "budget loss=0.02" in str(refusal.value) and "parameters=" not in str(refusal.value)
    assert "target 'layer' alone" in str(refusal.value)


def test_what_measures_no_loss_on_text_is_refused():
    model = build("llama-tied")
    asked = config(widths=None, budget={"loss": 0.02})
    with pytest.raises(StructPruneError, match="a dry run has no trials"):
        dry_run(model.config, asked)
    with pytest.raises(StructPruneError, match="which `inputs` are not"):
        prune_model(model, asked, tokenizer(), inputs={"a": token_ids(30, 12)})
    speech = random_model(WhisperForConditionalGeneration, "whisper", {**TOKENS, **BART})
    with pytest.raises(StructPruneError, match="this model needs other inputs too"):
        prune_model(speech, replace(asked, targets=("vocab",)), tokenizer())
    with pytest.raises(StructPruneError, match=r"needs trial prunings. Call `prune\("):
        StructPruner(asked).prune_model(model, tokenizer())
    with pytest.raises(StructPruneError, match="less than 1"):
        config(widths=None, budget={"loss": 2})
    assert f"is at least {1 - 0.02 / LOSS_OF_COSINE:g}." in str(StructPruneConfig.__doc__)
