"""The training text: shares by weight, nothing that was held out, and parts that share no sample."""

import pytest
import torch
from helpers import RECOVERY_TEXT, recovery_config
from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruneError
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.resolve import texts_of
from optimum_structprune.recovery.text import heldout_samples, part_rows, samples_of, text_config, training_text


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("seq_length", [12, 24, 40])
def test_held_out_documents_of_the_pruning_are_not_trained_on(seed, seq_length):
    pruning = config(**RECOVERY_TEXT, num_samples=32, holdout=0.25, seed=1)
    settings = recovery_config(domains=None, tokens=4 * seq_length, seq_length=seq_length, seed=seed)
    before = load_domains(pruning, tokenizer())
    after = training_text(settings, pruning, tokenizer(), build("llama-tied"))
    for pruned, recovered in zip(before, after, strict=True):
        assert len(recovered.samples) == 2
        assert set(pruned.heldout_documents) <= set(recovered.heldout_documents)
        assert not set(pruned.heldout_documents) & set(recovered.documents)
        if seq_length == pruning.seq_length:
            assert torch.equal(pruned.heldout, recovered.heldout)


def test_much_shorter_training_samples_leave_out_the_held_out_documents_too():
    domains = [DomainConfig(name="a", source=documents(2_000))]
    pruning = config(domains=domains, num_samples=64, holdout=0.25, seq_length=512)
    before = load_domains(pruning, tokenizer())
    after = training_text(recovery_config(domains=None, seq_length=8), pruning, tokenizer(), build("llama-tied"))
    assert set(before[0].heldout_documents) <= set(after[0].heldout_documents)
    assert heldout_samples(pruning, 512) == len(before[0].heldout)


def test_the_domains_give_tokens_by_their_weights():
    uneven = [DomainConfig(name="a", source=documents(200), weight=3.0), DomainConfig(name="b", source=documents(200))]
    text = training_text(recovery_config(domains=uneven), config(), tokenizer(), build("llama-tied"))
    assert [len(domain.samples) for domain in text] == [15, 5]
    with pytest.raises(StructPruneError, match="each of 6 rounds; 576 is enough"):
        text_config(recovery_config(domains=uneven), config(), parts=6)
    assert text_config(recovery_config(domains=uneven, tokens=576), config(), parts=6).num_samples == 24


@pytest.mark.parametrize("parts", [1, 2, 3, 10])
def test_parts_share_no_sample_and_are_the_whole_together(parts):
    domains = training_text(recovery_config(), config(), tokenizer(), build("llama-tied"), parts)
    rows = [part_rows(domains, part, parts) for part in range(1, parts + 1)]
    assert sorted(row for part in rows for row in part) == list(range(len(samples_of(domains)))) == list(range(20))
    # Each part has as much of one domain as of the other.
    assert all(sum(row < 10 for row in part) * 2 == len(part) > 0 for part in rows)


def test_what_the_model_wrote_beside_the_domains_is_not_trained_on():
    written = config(breadth=None, broad_text="self:any")
    assert [domain.name for domain in texts_of(written)] == ["a", "b", "broad"]
    follows = recovery_config(domains=None)
    assert [domain.name for domain in text_config(follows, written).domains] == ["a", "b"]
    named = config(breadth=None, broad_text="builtin:broad")
    assert [domain.name for domain in text_config(follows, named).domains] == ["a", "b", "broad"]
