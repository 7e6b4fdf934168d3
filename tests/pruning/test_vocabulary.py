"""A smaller vocabulary: what its model computes, and what is saved with it."""

import torch
from models import config, real_text_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruner


TEXT = [DomainConfig(name="math", source="builtin:math")]


def vocabulary_config(**fields):
    return config(**{"domains": TEXT, "widths": {"vocab": 320}, "seq_length": 48, **fields})


@torch.no_grad()
def kept_logits(model, ids, keep):
    return model(torch.tensor([ids])).logits[..., list(keep)]


def test_it_is_the_dense_model_where_all_tokens_stay_and_reloads(tmp_path):
    model, tokenizer = real_text_model()
    pruner = StructPruner(vocabulary_config())
    small = pruner.prune_model(model, tokenizer)
    keep = pruner.plan.keep[-1, "vocab"]
    assert len(keep) == 320 == small.config.vocab_size == len(pruner.tokenizer)
    text = pruner.tokenizer.decode(range(3, 300))
    ids = pruner.tokenizer(text)["input_ids"]
    torch.testing.assert_close(kept_logits(small, ids, range(320)), kept_logits(model, [keep[i] for i in ids], keep))
    pruner.save(small, tmp_path / "out", tokenizer)
    again, reader = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert reader(text)["input_ids"] == ids
    torch.testing.assert_close(kept_logits(again, ids, range(320)), kept_logits(small, ids, range(320)))
    print(pruner.report)
