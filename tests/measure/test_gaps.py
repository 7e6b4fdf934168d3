"""Masked language models and encoder-decoders are measured on missing text, which is the same for each tokenizer."""

import pytest
import torch
from helpers import with_tokens
from models import build, config, described, random_model, real_text_model, tokenizer

from optimum_structprune import DomainConfig, StructPruner, evaluate
from optimum_structprune.measure.batches import IGNORED
from optimum_structprune.measure.gaps import MAX_WORD_TOKENS, Gaps, fills_gaps


KINDS = [DomainConfig(name=kind, source=f"builtin:{kind}") for kind in ("math", "prose")]
TEXTS = ["The sum of 17 and 25 is 42, of course.", "なにもかもがなくなった", "Good morning to all of you!"]
CASES = ["bert", "xlm-roberta", "t5"]
# The first 300 tokens, and the mask.
FEWER_TOKENS = list(range(300)) + [400]


def tokenizer_with_mask():
    """Return a byte-level tokenizer of 401 tokens. The last one is the mask."""
    reader = real_text_model()[1]
    reader.add_special_tokens({"mask_token": "<mask>"})
    return reader


def build_for_real_text(case):
    """Return a random model for the tokens of `tokenizer_with_mask`."""
    auto, model_type, fields = described(case)
    sizes = {"vocab_size": 401, "max_position_embeddings": 256, "decoder_start_token_id": 0}
    return random_model(auto, model_type, fields | sizes)


def compare(model, reader, original, original_reader):
    """Return the evaluation of a model against an original one, and the ratio of perplexities in each domain."""
    evaluation = evaluate(
        model, reader, KINDS, original=original, original_tokenizer=original_reader, seq_length=48, num_samples=8
    )
    domains = evaluation.domains
    assert domains.keys() == {"math", "prose"}
    assert all(domain.texts for domain in domains.values())
    return evaluation, [domain.perplexity.ratio for domain in domains.values()]


@pytest.mark.parametrize("case", CASES)
def test_other_token_ids_change_no_loss_and_fewer_tokens_do(case):
    model = build_for_real_text(case)
    reader = tokenizer_with_mask()
    shuffled = (3 + torch.randperm(397, generator=torch.Generator().manual_seed(0))).tolist()
    reordered_model, reordered_reader = with_tokens(model, reader, [0, 1, 2] + shuffled + [400])
    smaller_model, smaller_reader = with_tokens(model, reader, FEWER_TOKENS)

    _, original = compare(model, reader, model, reader)
    _, reordered = compare(reordered_model, reordered_reader, model, reader)
    evaluation, smaller = compare(smaller_model, smaller_reader, model, reader)

    assert original == [1.0, 1.0]
    assert reordered == pytest.approx(original, rel=1e-6)
    assert min(smaller) > 1.1
    assert "Missing text: perplexity" in str(evaluation)


@pytest.mark.parametrize("case", CASES)
def test_the_same_characters_are_missing_for_each_tokenizer(case):
    model = build_for_real_text(case)
    reader = tokenizer_with_mask()
    coarse_reader = with_tokens(model, reader, FEWER_TOKENS)[1]
    gaps = Gaps(TEXTS, model, reader)

    def missing_texts(tokenizer):
        labels = [row_labels[row_labels != IGNORED] for _, row_labels in gaps.rows(model, tokenizer)]
        return [tokenizer.decode(row_labels) for row_labels in labels]

    missing = missing_texts(reader)
    assert missing == missing_texts(coarse_reader)
    assert all(missing)

    if case == "t5":
        assert all(text.endswith(half.strip()) for text, half in zip(TEXTS, missing, strict=True))
    else:
        assert gaps.tokens[1] <= 3 * MAX_WORD_TOKENS  # three bytes a character
        assert gaps.tokens.sum() < 0.5 * len(reader("".join(TEXTS))["input_ids"])


def test_an_encoder_decoder_predicts_the_translations_if_there_are_some():
    model = build_for_real_text("t5")
    reader = tokenizer_with_mask()
    gaps = Gaps(TEXTS[:1], model, reader, TEXTS[2:])

    _, labels = gaps.rows(model, reader)[0]
    assert reader.decode(labels) == TEXTS[2]

    losses = gaps.losses(model, reader)
    assert losses.shape == (1,)
    assert float(losses) > 0


def test_a_run_reports_the_loss_of_missing_text(tmp_path):
    model = build_for_real_text("bert")
    pruner = StructPruner(config(domains=KINDS, seq_length=48, num_samples=16, widths={"vocab": 300}))
    small = pruner.prune_model(model, tokenizer_with_mask())

    domains = pruner.result.report.domains
    assert domains.keys() == {"math", "prose"}
    assert all(domain.perplexity and domain.texts for domain in domains.values())
    assert "missing text" in str(pruner.result.report)

    pruner.save(small, tmp_path / "out")
    assert "| missing text |" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_such_a_head_or_mask_has_vectors_only():
    assert not fills_gaps(build("bert-no-head"), tokenizer_with_mask())
    assert not fills_gaps(build("bert"), tokenizer())
    assert not fills_gaps(build("bert"), None)
    assert not fills_gaps(build("llama-tied"), tokenizer_with_mask())
