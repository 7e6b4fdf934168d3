"""Tokens and layers that compete for one budget."""

import pytest
from models import config, real_text_model

from optimum_structprune import DomainConfig, StructPruneError, StructPruner


def joint_config(share, **fields):
    return config(
        **{
            "domains": [DomainConfig(name="math", source="builtin:math")],
            "general_share": 0.0,
            "sparsity": None,
            "budget": {"parameters": share},
            "targets": ("vocab", "mlp"),
            "allocation": "search_uniform",
            "round_to": 8,
            "seq_length": 48,
            **fields,
        }
    )


@pytest.mark.parametrize("share", [0.97, 0.6])
def test_the_number_of_tokens_of_least_loss_keeps_to_the_budget(share):
    model, tokenizer = real_text_model()
    pruner = StructPruner(joint_config(share))
    small = pruner.prune_model(model, tokenizer)
    (chosen,) = (balance for balance in pruner.report.balances if balance["chosen"])
    losses = [balance["tokens_loss"] + balance["layers_loss"] for balance in pruner.report.balances]
    assert chosen["tokens_loss"] + chosen["layers_loss"] == min(losses)
    assert small.config.vocab_size == len(pruner.tokenizer) == chosen["tokens"]
    assert small.num_parameters() <= share * model.num_parameters()
    assert (small.config.intermediate_size == model.config.intermediate_size) == (chosen["layers_loss"] == 0)
    assert pruner.used_config.budget == {"parameters": share}
    assert f"{chosen['tokens']:,} tokens" in str(pruner.report)


def test_what_neither_can_give_is_refused():
    model, tokenizer = real_text_model()
    with pytest.raises(StructPruneError, match="budget.*tokens.*targets"):
        StructPruner(joint_config(0.05)).prune_model(model, tokenizer)
