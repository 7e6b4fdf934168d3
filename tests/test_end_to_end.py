"""Every family: a dry run says what pruning gives, what is saved loads plainly, and the text half alone shrinks."""

import pytest
import torch
from helpers import assert_as_said, config_of, count_hooks, outputs, random_plan, same_weights, shrunk, with_long
from models import OTHER_STRUCTURES, OTHERS, PRUNABLE, STRUCTURES, build, config, described, token_ids, tokenizer
from transformers import (
    BartForSequenceClassification,
    BertForMultipleChoice,
    LlamaForSequenceClassification,
    Qwen3Model,
    T5EncoderModel,
    T5ForSequenceClassification,
)

from optimum_structprune import StructPruneError, StructPruner, dry_run, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.saving.save import save_checked
from optimum_structprune.widths.allocation import widths_of


TEXT = [case for case in OTHERS if case != "vit"]  # pixels are given as inputs
# Two rounds are one that masks and one that shrinks; one round shrinks a model that nothing has masked before.
ONCE = ["llama-bias", "gpt2-tied", "gpt_oss", "deepseek_v2", "qwen3_next"]
RUNS = [(case, 2) for case in (*PRUNABLE, *TEXT)] + [(case, 1) for case in ONCE] + [("llama-tied", 3)]


@pytest.mark.parametrize(("case", "rounds"), with_long(RUNS, [*STRUCTURES, *OTHER_STRUCTURES]))
def test_every_family_end_to_end(case, rounds, tmp_path):
    model, before = build(case), build(case)
    arch = describe(model)
    # At most half of everything, in multiples of 8 where experts need them.
    halves = {name: max(arch.of(name)[0].width // 16 * 8, 2) for name in arch.names}
    wish = config(widths=halves, rounds=rounds, num_samples=4)
    outcome, pruner = dry_run(config_of(model), wish), StructPruner(wish)
    small = pruner.prune_model(model, tokenizer())
    assert type(small) is type(model) and same_weights(model, before)
    assert count_hooks(small) == count_hooks(model) == 0
    # Gemma 4 cannot be run without weights, so that the size of its cache is not known.
    assert_as_said(outcome, model, small, cache_known=not case.startswith("gemma4"))
    assert small.num_parameters() == pruner.report.pruned.parameters < pruner.report.dense.parameters
    assert {*pruner.report.domains} == {"a", "b"}
    assert ("Perplexity relative" if arch.causal else "cosine") in str(pruner.report)
    if case in ONCE:  # page, card and records do not depend on the family
        pruner.save(small, tmp_path / "out", tokenizer=tokenizer())
    else:
        save_checked(small, tmp_path / "out", tokenizer(), False, lambda folder: None)
    again = described(case)[0].from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    torch.testing.assert_close(outputs(again), outputs(small), atol=1e-6, rtol=0)
    if case in PRUNABLE:
        assert again.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 7)


MULTIMODAL = [case for case in OTHERS if describe(build(case)).layer_path.startswith("model.language_model.")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_are_given_as_inputs(dtype, tmp_path):
    model = build("vit").to(dtype)
    pruner = StructPruner(config(widths={"mlp": 12, "attention": 2}))
    small = pruner.prune_model(model, inputs={"pixels": torch.randn(8, 3, 8, 8)})
    assert small.config.intermediate_size == 12 and small.config.num_attention_heads == 2
    assert 0.5 < pruner.report.domains["pixels"].vectors.cosine.pruned < 1
    pruner.save(small, tmp_path / "out")
    again = described("vit")[0].from_pretrained(tmp_path / "out", dtype=dtype)
    assert again.config.intermediate_size == 12 and torch.equal(outputs(again), outputs(small))
    entry = Manifest.load(tmp_path / "out").domains[0]
    assert (entry.calibration_tokens, entry.heldout_tokens) == (6, 2)
    assert "Perplexity" not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(StructPruneError, match=r"inputs\['few'\]` has 2 samples.* at least 3"):
        prune_model(model, config(), inputs={"few": torch.randn(2, 3, 8, 8)})
    with pytest.raises(StructPruneError, match="at least one entry"):
        prune_model(model, config(), inputs={})


def test_a_model_of_images_is_told_to_take_inputs():
    for reader in (None, tokenizer()):
        with pytest.raises(StructPruneError, match="ViTFor.* reads pixel_values, and domains are text.*inputs="):
            prune_model(build("vit"), config(), reader)


def test_heads_of_a_vision_model_are_not_rounded():
    model, wish = build("vit"), config(sparsity=0.3, round_to=8, targets=("attention",))
    assert widths_of(wish, describe(model), model) == {"attention": 2}


@pytest.mark.parametrize("case", MULTIMODAL)
def test_only_the_text_half_shrinks(case):
    model = build(case)
    arch = describe(model)
    small = shrunk(model, arch, random_plan(arch, ("mlp",)))
    assert small.config.text_config.intermediate_size == 24
    assert small.model.language_model.config is small.config.text_config
    prefix = arch.layer_path + "."
    ours, dense = small.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], dense[name]) for name in dense if not name.startswith(prefix))


def test_a_refit_brings_vectors_nearer_to_the_dense_ones():
    cosines = []
    for refit in ("none", "least_squares"):
        pruner = StructPruner(config(refit=refit))
        pruner.prune_model(build("bert").train(), tokenizer())
        cosines.append(sum(domain.vectors.cosine.pruned for domain in pruner.report.domains.values()))
    assert cosines[0] < cosines[1] < 2


@pytest.mark.parametrize(("head", "case", "widths"), [
    (BartForSequenceClassification, "bart", {"encoder_mlp": 24}),
    (T5ForSequenceClassification, "t5", {"mlp": 24}),
    (BertForMultipleChoice, "bert", {"mlp": 24, "layer": 1}),
    (LlamaForSequenceClassification, "llama-tied", {"mlp": 24}),
    (Qwen3Model, "qwen3", {"mlp": 24}),
    (T5EncoderModel, "t5", {"mlp": 24}),
])  # fmt: skip
def test_other_heads_and_none_are_pruned_and_saved(head, case, widths, tmp_path):
    pruner = StructPruner(config(widths=widths))
    pruner.save(pruner.prune_model(head(build(case).config), tokenizer()), tmp_path / "out")
    assert describe(head.from_pretrained(tmp_path / "out")).of(next(iter(widths)))[0].width == 24
