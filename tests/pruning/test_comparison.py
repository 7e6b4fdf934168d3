"""A run measures the original and the pruned model on text of several documents."""

from math import isfinite

from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruner
from optimum_structprune.system.margins import MANY_DOCUMENTS


def test_a_run_measures_a_limited_number_of_tokens():
    pruner = StructPruner(config(num_samples=96))
    pruner.prune_model(build("llama-tied"), tokenizer())

    tokens = [domain.tokens for domain in pruner.result.report.domains.values()]
    assert 0 < sum(tokens) <= max(96 * 24 / 8, MANY_DOCUMENTS * 23 * len(tokens))


def test_a_short_run_is_measured_on_several_documents_of_each_domain():
    texts = [DomainConfig(name, documents(60, seed)) for seed, name in enumerate("abc")]
    pruner = StructPruner(config(domains=texts, num_samples=30))
    pruner.prune_model(build("llama-tied"), tokenizer())

    # A single document has no margin of error.
    assert all(isfinite(domain.perplexity.margin) for domain in pruner.result.report.domains.values())
