"""Every family: a dry run predicts the pruned model, and the saved model reloads in plain transformers."""

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


TEXT = [case for case in OTHERS if case != "vit"]
# The first of two rounds only masks the model. With one round, the model is not masked before it shrinks.
ONCE = ["llama-bias", "gpt2-tied", "gpt_oss", "deepseek_v2", "qwen3_next"]
RUNS = [(case, 2) for case in PRUNABLE + TEXT]
RUNS += [(case, 1) for case in ONCE]
RUNS += [("llama-tied", 3)]


@pytest.mark.parametrize(("case", "rounds"), with_long(RUNS, [*STRUCTURES, *OTHER_STRUCTURES]))
def test_every_family_end_to_end(case, rounds, tmp_path):
    model = build(case)
    arch = describe(model)
    widths = {}
    for name in arch.names:
        # At most half of the units, in multiples of 8, because the widths of experts need them.
        widths[name] = max(arch.of(name)[0].width // 16 * 8, 2)
    settings = config(widths=widths, rounds=rounds, num_samples=4)
    outcome = dry_run(config_of(model), settings)

    pruner = StructPruner(settings)
    small = pruner.prune_model(model, tokenizer())
    assert type(small) is type(model)
    assert same_weights(model, build(case))
    assert count_hooks(small) == count_hooks(model) == 0
    # A dry run cannot compute the cache of Gemma 4, which cannot run without weights.
    assert_as_said(outcome, model, small, cache_known=not case.startswith("gemma4"))

    report = pruner.result.report
    assert small.num_parameters() == report.pruned.parameters < report.original.parameters
    assert set(report.domains) == {"a", "b"}
    assert ("Perplexity relative" if arch.causal else "cosine") in str(report)

    if case in ONCE:
        pruner.save(small, tmp_path / "out", tokenizer=tokenizer())
    else:  # The report and the model card do not depend on the family, so this saves only the model.
        save_checked(small, tmp_path / "out", tokenizer(), False, lambda folder: None)
    auto, _, _ = described(case)
    reloaded = auto.from_pretrained(tmp_path / "out")
    assert type(reloaded) is type(model)
    torch.testing.assert_close(outputs(reloaded), outputs(small), atol=1e-6, rtol=0)
    if case in PRUNABLE:
        tokens = reloaded.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False)
        assert tokens.shape == (1, 7)


MULTIMODAL = [case for case in OTHERS if describe(build(case)).layer_path.startswith("model.language_model.")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vision_model_is_pruned_on_pixels(dtype, tmp_path):
    model = build("vit").to(dtype)
    pruner = StructPruner(config(widths={"mlp": 12, "attention": 2}))
    small = pruner.prune_model(model, inputs={"pixels": torch.randn(8, 3, 8, 8)})
    assert small.config.intermediate_size == 12
    assert small.config.num_attention_heads == 2
    assert 0.5 < pruner.result.report.domains["pixels"].cosine.pruned < 1

    pruner.save(small, tmp_path / "out")
    auto, _, _ = described("vit")
    reloaded = auto.from_pretrained(tmp_path / "out", dtype=dtype)
    assert reloaded.config.intermediate_size == 12
    assert torch.equal(outputs(reloaded), outputs(small))
    entry = Manifest.load(tmp_path / "out").domains[0]
    assert entry.calibration_tokens == 6
    assert entry.heldout_tokens == 2
    assert "Perplexity" not in (tmp_path / "out" / "README.md").read_text()


def test_too_few_inputs_are_refused():
    model = build("vit")
    with pytest.raises(StructPruneError, match=r"inputs\['few'\]` has 2 samples.* at least 3"):
        prune_model(model, config(widths={"mlp": 16}), inputs={"few": torch.randn(2, 3, 8, 8)})
    with pytest.raises(StructPruneError, match="at least one entry"):
        prune_model(model, config(widths={"mlp": 16}), inputs={})


def test_text_for_a_vision_model_is_refused():
    for reader in (None, tokenizer()):
        with pytest.raises(StructPruneError, match="ViTFor.* reads pixel_values, and domains are text.*inputs="):
            prune_model(build("vit"), config(widths={"mlp": 16}), reader)


def test_heads_of_a_vision_model_are_not_rounded():
    model = build("vit")
    settings = config(sparsity=0.3, round_to=8, targets=("attention",))
    assert widths_of(settings, describe(model), model) == {"attention": 2}


@pytest.mark.parametrize("case", MULTIMODAL)
def test_only_the_text_half_shrinks(case):
    model = build(case)
    arch = describe(model)
    small = shrunk(model, arch, random_plan(arch, ("mlp",)))

    assert small.config.text_config.intermediate_size == 24
    assert small.model.language_model.config is small.config.text_config
    weights = small.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith(arch.layer_path + "."):
            assert torch.equal(weights[name], tensor), name


def test_a_refit_brings_vectors_nearer_to_those_of_the_original_model():
    def total_cosine(refit):
        pruner = StructPruner(config(refit=refit))
        pruner.prune_model(build("bert").train(), tokenizer())
        return sum(domain.cosine.pruned for domain in pruner.result.report.domains.values())

    assert total_cosine("none") < total_cosine("least_squares") < 2  # Two domains.


@pytest.mark.parametrize(("head", "case", "widths"), [
    (BartForSequenceClassification, "bart", {"encoder_mlp": 24}),
    (T5ForSequenceClassification, "t5", {"mlp": 24}),
    (BertForMultipleChoice, "bert", {"mlp": 24, "layer": 1}),
    (LlamaForSequenceClassification, "llama-tied", {"mlp": 24}),
    (Qwen3Model, "qwen3", {"mlp": 24}),
    (T5EncoderModel, "t5", {"mlp": 24}),
])  # fmt: skip
def test_models_with_other_heads_or_without_a_head(head, case, widths, tmp_path):
    model = head(build(case).config)
    pruner = StructPruner(config(widths=widths))
    small = pruner.prune_model(model, tokenizer())
    pruner.save(small, tmp_path / "out")

    reloaded = head.from_pretrained(tmp_path / "out")
    ffn = next(iter(widths))
    assert describe(reloaded).of(ffn)[0].width == 24
