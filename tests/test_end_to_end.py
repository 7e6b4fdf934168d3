"""Every family: a dry run says what pruning gives, and what is saved loads plainly and gives the same."""

import pytest
import torch
from helpers import assert_as_said, config_of, count_hooks, outputs, same_weights
from models import NOT_SEQUENTIAL, OTHERS, PRUNABLE, build, config, described, tokenizer

from optimum_structprune import StructPruner, dry_run
from optimum_structprune.arch.load import describe


TEXT = [case for case in OTHERS if case != "vit"]  # pixels are in `test_others.py`
# Two rounds are one that masks and one that shrinks; one round shrinks a model that nothing has masked before.
ONCE = ["llama-bias", "gpt2-tied", "gpt_oss", "deepseek_v2", "qwen3_next"]
RUNS = [(case, 2) for case in (*PRUNABLE, *TEXT)] + [(case, 1) for case in ONCE] + [("llama-tied", 3)]
# Models that cannot be run without weights, so that the size of their cache is not known.
NO_CACHE_KNOWN = (*NOT_SEQUENTIAL, "gemma4")


def halves(arch):
    """At most half of everything, in multiples of 8 where experts need them."""
    return {name: max(arch.of(name)[0].width // 16 * 8, 2) for name in arch.names}


@pytest.mark.parametrize(("case", "rounds"), RUNS)
def test_every_family_end_to_end(case, rounds, tmp_path):
    model, before = build(case), build(case)
    arch = describe(model)
    wish = config(widths=halves(arch), rounds=rounds)
    outcome, pruner = dry_run(config_of(model), wish), StructPruner(wish)
    small = pruner.prune_model(model, tokenizer())
    assert type(small) is type(model) and same_weights(model, before)
    assert count_hooks(small) == count_hooks(model) == 0
    assert_as_said(outcome, model, small, cache_known=case not in NO_CACHE_KNOWN)
    assert small.num_parameters() == pruner.report.parameters["after"] < pruner.report.parameters["before"]
    measured, kind = (
        (pruner.report.perplexity, "perplexity") if arch.causal else (pruner.report.output_error, "output error")
    )
    assert {*measured} == {"a", "b"} and f"{kind} a" in str(pruner.report)
    pruner.save(small, tmp_path / "out", tokenizer=tokenizer())
    again = described(case)[0].from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(again), outputs(small), atol=1e-6, rtol=0)
