"""The main path on tiny models: training modes, hooks, errors and reports."""

import json
from copy import deepcopy
from math import hypot

import pytest
import torch
from helpers import count_hooks, failing, modes, same_weights
from models import build, config, documents, fewer_tokens, real_text_model, token_ids, tokenizer
from torch import nn

from optimum_structprune import DomainConfig, RunOptions, StructPruner, prune, prune_model
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import CALIBRATED
from optimum_structprune.measure.losses import means, measure
from optimum_structprune.measure.text import Text
from optimum_structprune.record.verdict import judge
from optimum_structprune.saving.page import write_report
from optimum_structprune.system.errors import InPlaceError, StructPruneError
from optimum_structprune.system.margins import MIN_RELATIVE_MARGIN, PARTS_DIFFER, margin_of_error


LAST = {"llama-tied": "model.layers.1.mlp", "bert": "bert.encoder.layer.1.output"}


@pytest.mark.parametrize(("refit", "criterion"), [("none", "wanda"), ("least_squares", "obs_drive")])
def test_the_default_criterion_depends_on_the_refit(refit, criterion):
    model = build("llama-tied")
    default = StructPruner(config(criterion=None, refit=refit))
    small = default.prune_model(model, tokenizer())
    expected = prune_model(model, config(criterion=criterion, refit=refit), tokenizer())

    assert same_weights(small, expected)
    assert default.result.report.criterion == criterion


@pytest.mark.parametrize(("case", "fields", "inplace"), [
    ("llama-tied", {"allocation": "sensitivity", "rounds": 2}, False),
    ("mixtral", {"widths": {"layer": 1, "expert": 3, "hidden": 24, "mlp": 24}}, True),
    ("bert", {"rounds": 2}, True),
    ("vit", {"widths": {"mlp": 16}}, False),
])  # fmt: skip
def test_the_training_mode_is_restored_and_has_no_effect_on_the_result(case, fields, inplace):
    model = build(case).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5  # A pass in training mode would change the result.
    if case == "vit":
        text = {"inputs": {"a": torch.randn(8, 3, 8, 8)}}
    else:
        text = {"tokenizer": tokenizer()}

    expected = prune_model(deepcopy(model).eval(), config(**fields), **text)
    small = prune_model(model, config(**fields), inplace=inplace, **text)

    assert (small is model) == inplace
    assert same_weights(small, expected)
    assert set(modes(expected).values()) == {False}
    assert set(modes(small).values()) == {True}
    assert set(modes(model).values()) == {True}


def test_a_model_pruned_on_a_generator_of_text_can_be_copied_and_pruned_further():
    """A generator cannot be copied."""
    generator = (text for text in documents(100))
    small = prune_model(build("llama-tied"), config(domains=[DomainConfig("a", generator)]), tokenizer())
    assert same_weights(deepcopy(small), small)

    smaller = prune_model(small, config(widths={"mlp": 20}), tokenizer())
    assert smaller.config.intermediate_size == 20


@pytest.mark.parametrize(("case", "fields", "inplace", "kind"), [
    ("llama-tied", {"rounds": 2, "widths": {"mlp": 24, "layer": 1}}, True, RuntimeError),
    ("llama-tied", {"allocation": "sensitivity"}, False, KeyboardInterrupt),
    ("bert", {"rounds": 2}, True, RuntimeError),
])  # fmt: skip
def test_the_modes_of_all_modules_are_restored_after_an_error(case, fields, inplace, kind):
    """The error comes at the first call of the last layer, the fourth, the thirteenth, until no call fails."""

    def do_nothing(module, args):
        pass

    number = 0
    finished = False
    while not finished:
        number = 3 * number + 1
        model = build(case).train()
        for module in list(model.modules())[5::3]:
            module.training = False  # As a frozen layer has it in a training.
        original = deepcopy(model)
        original_modes = modes(model)

        # The hook counts the calls of copies of the model too.
        fail = failing(do_nothing, number, kind("stop"))
        handle = model.get_submodule(LAST[case]).register_forward_pre_hook(fail)
        try:
            small = prune_model(model, config(num_samples=4, **fields), tokenizer(), inplace=inplace)
            finished = True
        except (kind, StructPruneError):
            small = model
        handle.remove()

        # Pruning in place may have removed modules.
        assert modes(model).items() <= original_modes.items()
        assert set(modes(small).values()) == {True, False}
        if not inplace:
            assert same_weights(model, original)
            assert modes(model) == original_modes
            assert count_hooks(model) == 0
    assert number > 5


def test_hidden_states_are_returned_before_and_after_pruning():
    model = build("llama-untied")
    assert len(model(token_ids(), output_hidden_states=True).hidden_states) == 3

    small = prune_model(model, config(widths={"mlp": 20, "attention": 2}), tokenizer())
    assert len(small(token_ids(), output_hidden_states=True).hidden_states) == 3


def test_the_report_adds_up():
    pruner = StructPruner(config(widths={"mlp": 20, "attention": 2}))
    pruner.prune_model(build("llama-untied"), tokenizer())
    report = pruner.result.report

    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    calibration_tokens = {
        entry.name: entry.calibration_tokens for entry in pruner.result.manifest.with_use(CALIBRATED)
    }
    assert calibration_tokens == {"a": 4 * 24, "b": 4 * 24}
    assert {"domains", "perplexity", "pruning"} <= set(report.seconds)

    table = str(report)
    assert "FFN channels: 40 → 20 (-50.0%)" in table
    assert "mean over the calibration domains" in table
    reloaded = type(report).from_dict(json.loads(json.dumps(report.to_dict())))
    assert reloaded.sparsity == report.sparsity


def test_perplexities_have_margins_of_error():
    settings = config(widths={"mlp": 20}, num_samples=96)
    reader = tokenizer()
    heldout = load_domains(settings, reader)[0].heldout
    text = Text.short(heldout, reader, 96 // 2 // 8 * 24)
    numbers = text.documents
    model = build("llama-untied")
    pruner = StructPruner(settings)
    small = pruner.prune_model(model, reader)

    original_losses = means(measure(model, text).loss)
    pruned_losses = means(measure(small, text).loss)
    increases = pruned_losses - original_losses
    num_documents = len(numbers.unique())
    ratio = float(increases.mean().exp())
    margin = ratio * max(margin_of_error(increases, numbers), MIN_RELATIVE_MARGIN / num_documents)
    margin = hypot(margin, PARTS_DIFFER * (ratio - 1))

    result = pruner.result.report.domains["a"]
    assert result.perplexity.margin == pytest.approx(margin)
    assert result.perplexity.pruned == pytest.approx(float(pruned_losses.mean().exp()))
    assert result.documents == num_documents >= 5
    assert result.tokens == text.tokens.sum()


def test_the_report_states_requested_and_removed_parameters():
    pruner = StructPruner(config(sparsity=0.2))
    pruner.prune_model(build("llama-untied"), tokenizer())

    report = pruner.result.report
    assert report.sparsity == pytest.approx(0.2, abs=0.01)
    assert "warning: requested" not in str(report)
    assert f"Requested 20.0% of the layer parameters, removed {report.sparsity:.1%}" in str(report)


def test_a_coarse_rounding_that_misses_the_requested_sparsity_warns():
    pruner = StructPruner(config(sparsity=0.1, round_to=32, targets=("mlp",)))
    message = r"requested 10\.0% .*, removed .*; other targets, or a smaller round_to"
    with pytest.warns(UserWarning, match=message) as warned:
        pruner.prune_model(build("llama-untied"), tokenizer())

    # The warning names the line that called the package.
    assert {warning.filename for warning in warned} == {__file__}
    assert "warning: requested 10.0%" in str(pruner.result.report)
    assert pruner.result.report.to_dict()["target"] == 0.1


@pytest.mark.parametrize(("case", "weight", "message"), [
    ("llama-tied", "model.layers.0.mlp.up_proj", "perplexity on held-out text of the domain 'a' is not a number"),
    ("bert", "bert.encoder.layer.0.intermediate.dense", "NaN or infinite activations at bert.encoder.layer.0.out"),
])  # fmt: skip
def test_nan_weights_are_noticed_before_anything_changes(case, weight, message):
    model = build(case)
    model.get_submodule(weight).weight.data[0] = float("nan")
    original = deepcopy(model)

    with pytest.raises(StructPruneError, match=message) as refusal:
        prune_model(model, config(), tokenizer(), inplace=True)
    assert not isinstance(refusal.value, InPlaceError)
    assert same_weights(model, original)


def passes_of(model, fields, measure):
    """Return the result of a pruning, and the number of calls of the embeddings, also of those of copies."""
    calls = []

    def count(module, args):
        calls.append(module)

    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    options = RunOptions(measure=measure)
    reader = tokenizer()
    if "vocab" in str(fields):
        reader = real_text_model()[1]
    result = prune(model, config(**fields), reader, options=options)
    handle.remove()
    return result, len(calls)


@pytest.mark.parametrize(("case", "fields"), [
    ("llama-tied", {}),
    ("llama-tied", {"allocation": "sensitivity"}),
    ("bert", {}),
    ("text", {"widths": {"vocab": 300}}),
    ("text", {"widths": None, "targets": ("vocab", "mlp"), "budget": {"parameters": 0.8}}),
])  # fmt: skip
def test_a_run_without_measurements_has_the_same_weights_and_fewer_passes(case, fields):
    model = real_text_model()[0] if case == "text" else build(case)
    measured, passes = passes_of(model, fields, True)
    unmeasured, fewer_passes = passes_of(model, fields, False)

    assert same_weights(measured.model, unmeasured.model)
    assert measured.plan == unmeasured.plan
    assert fewer_passes < passes


@pytest.mark.parametrize("trims", [False, True])
def test_a_run_without_measurements_claims_nothing(trims, tmp_path):
    model, reader = build("llama-tied"), tokenizer()
    settings = config()
    if trims:
        model, reader = real_text_model()
        settings = fewer_tokens()
    result = prune(model, settings, reader, options=RunOptions(measure=False))
    report = result.report
    assert not report.domains and not report.languages
    assert report.unseen is None
    assert judge(report) is None
    assert report.pruned.parameters < report.original.parameters

    result.save(tmp_path / "out")
    write_report(tmp_path / "out")
    texts = [str(report)] + [(tmp_path / "out" / name).read_text() for name in ("README.md", "report.html")]
    for text in texts:
        assert "The run measured no losses" in text
        for claim in ("Verdict", "Unseen text was not measured", "No loss was measured", "×", "have changed"):
            assert claim not in text
