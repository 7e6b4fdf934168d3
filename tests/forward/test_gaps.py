"""Masked language models and encoder-decoders are judged by what is missing in text, the same for each tokenizer."""

import pytest
import torch
from helpers import with_tokens
from models import build, config, described, random_model, real_text_model, tokenizer

from optimum_structprune import DomainConfig, StructPruner, evaluate
from optimum_structprune.forward.gaps import MAX_WORD_TOKENS, NOT_PREDICTED, Gaps, fills_gaps


KINDS = [DomainConfig(name=kind, source=f"builtin:{kind}") for kind in ("math", "prose")]
TEXTS = ["The sum of 17 and 25 is 42, of course.", "なにもかもがなくなった", "Good morning to all of you!"]
CASES = ["bert", "xlm-roberta", "t5"]


def masking():
    reader = real_text_model()[1]
    reader.add_special_tokens({"mask_token": "<mask>"})
    return reader


def wide(case):
    auto, model_type, fields = described(case)
    sizes = {"vocab_size": 401, "max_position_embeddings": 256, "decoder_start_token_id": 0}
    return random_model(auto, model_type, {**fields, **sizes})


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_its_own_equal_in_any_numbers_of_tokens_and_a_damaged_one_is_worse(case):
    model, reader = wide(case), masking()
    order = [0, 1, 2, *(3 + torch.randperm(397, generator=torch.Generator().manual_seed(0))).tolist(), 400]
    losses, fewer = [], [*range(300), 400]
    for other, its_own in ((model, reader), with_tokens(model, reader, order), with_tokens(model, reader, fewer)):
        found = evaluate(other, its_own, KINDS, dense=model, dense_tokenizer=reader, seq_length=48, num_samples=8)
        assert found.domains.keys() == {"math", "prose"} and all(domain.vectors for domain in found.domains.values())
        losses.append([domain.perplexity.ratio for domain in found.domains.values()])
    assert losses[0] == [1.0, 1.0] and losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert min(losses[2]) > 1.1 and "Missing text: perplexity" in str(found)


@pytest.mark.parametrize("case", CASES)
def test_the_same_characters_are_missing_for_each_tokenizer(case):
    model, reader = wide(case), masking()
    coarse = with_tokens(model, reader, [*range(300), 400])[1]
    gaps, spelled = Gaps(TEXTS, model, reader), []
    for each in (reader, coarse):
        labels = [label[label != NOT_PREDICTED] for _, label in gaps.rows(model, each)]
        spelled.append([each.decode(label) for label in labels])
    assert spelled[0] == spelled[1] and all(spelled[0])
    if case != "t5":
        assert gaps.tokens[1] <= 3 * MAX_WORD_TOKENS  # three bytes a character
        assert gaps.tokens.sum() < 0.5 * len(reader("".join(TEXTS))["input_ids"])
    else:
        assert all(text.endswith(half.strip()) for text, half in zip(TEXTS, spelled[0], strict=True))


def test_translations_are_what_is_missing_where_there_are_some():
    model, reader = wide("t5"), masking()
    gaps = Gaps(TEXTS[:1], model, reader, TEXTS[2:])
    assert reader.decode(gaps.rows(model, reader)[0][1]) == TEXTS[2]
    losses = gaps.losses(model, reader)
    assert losses.shape == (1,) and float(losses) > 0


def test_a_run_reports_the_loss_and_its_verdict_follows(tmp_path):
    model, reader = wide("bert"), masking()
    pruner = StructPruner(config(domains=KINDS, seq_length=48, num_samples=16, widths={"vocab": 300}))
    small = pruner.prune_model(model, reader)
    domains = pruner.report.domains
    assert {*domains} == {"math", "prose"} and all(domain.perplexity and domain.vectors for domain in domains.values())
    assert "missing text" in str(pruner.report)
    pruner.save(small, tmp_path / "out")
    assert "| missing text |" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_such_a_head_or_mask_has_vectors_only():
    assert not fills_gaps(build("bert-no-head"), masking()) and not fills_gaps(build("bert"), tokenizer())
    assert not fills_gaps(build("bert"), None) and not fills_gaps(build("llama-tied"), masking())
