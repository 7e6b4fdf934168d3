"""The main path on tiny models: what it promises about models, hooks, seeds and errors."""

import json
from copy import deepcopy
from math import hypot

import pytest
import torch
from helpers import count_hooks, failing, modes, same_weights
from models import build, config, documents, token_ids, tokenizer
from torch import nn

from optimum_structprune import DomainConfig, StructPruner, prune_model
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import CALIBRATED
from optimum_structprune.errors import InPlaceError, StructPruneError
from optimum_structprune.forward.metrics import PARTS_DIFFER, UNSEEN, margin_of_error, sample_losses
from optimum_structprune.pruning.measure import short_rows


LAST = {"llama-tied": "model.layers.1.mlp", "bert": "bert.encoder.layer.1.output"}


@pytest.mark.parametrize(("refit", "criterion"), [("none", "wanda"), ("least_squares", "obs_drive")])
def test_without_a_criterion_the_refit_names_it(refit, criterion):
    model = build("llama-tied")
    pruners = [StructPruner(config(criterion=name, refit=refit)) for name in (None, criterion)]
    assert same_weights(*(one.prune_model(model, tokenizer()) for one in pruners))
    assert pruners[0].report.criterion == criterion


@pytest.mark.parametrize(("case", "fields", "inplace"), [
    ("llama-tied", {"allocation": "sensitivity", "rounds": 2}, False),
    ("mixtral", {"widths": {"layer": 1, "expert": 3, "hidden": 24, "mlp": 24}}, True),
    ("bert", {"rounds": 2}, True),
    ("vit", {}, False),
])  # fmt: skip
def test_the_training_mode_comes_back_and_makes_no_difference(case, fields, inplace):
    model = build(case).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5  # so that a pass in training mode would give something else
    text = {"inputs": {"a": torch.randn(8, 3, 8, 8)}} if case == "vit" else {"tokenizer": tokenizer()}
    expected = prune_model(deepcopy(model).eval(), config(**fields), **text)
    small = prune_model(model, config(**fields), inplace=inplace, **text)
    assert (small is model) == inplace and same_weights(small, expected)
    assert {*modes(expected).values()} == {False} and {*modes(small).values()} == {*modes(model).values()} == {True}


def test_what_was_pruned_on_text_of_a_program_is_copied_and_pruned_again():
    texts = [DomainConfig("a", (text for text in documents(100)))]
    small = prune_model(build("llama-tied"), config(domains=texts), tokenizer())
    assert same_weights(deepcopy(small), small)
    assert prune_model(small, config(widths={"mlp": 20}), tokenizer()).config.intermediate_size == 20


@pytest.mark.parametrize(("case", "fields", "inplace", "kind"), [
    ("llama-tied", {"rounds": 2, "widths": {"mlp": 24, "layer": 1}}, True, RuntimeError),
    ("llama-tied", {"allocation": "sensitivity"}, False, KeyboardInterrupt),
    ("bert", {"rounds": 2}, True, RuntimeError),
])  # fmt: skip
def test_the_modes_of_all_modules_come_back_after_an_error(case, fields, inplace, kind):
    """Wherever it comes up: at the first call in the last layer, the fourth, the thirteenth, and so on."""
    number, ended = 0, False
    while not ended:
        number = 3 * number + 1
        model = build(case).train()
        for module in list(model.modules())[5::3]:
            module.training = False  # such as a frozen layer in a model that is trained
        before, as_it_was = deepcopy(model), modes(model)
        fail = failing(lambda module, args: None, number, kind("stop"))  # copies of the model included
        handle = model.get_submodule(LAST[case]).register_forward_pre_hook(fail)
        try:
            small = prune_model(model, config(num_samples=4, **fields), tokenizer(), inplace=inplace)
            ended = True
        except (kind, StructPruneError):
            small = model
        handle.remove()
        assert modes(model).items() <= as_it_was.items() and {*modes(small).values()} == {True, False}
        assert inplace or (same_weights(model, before) and modes(model) == as_it_was and count_hooks(model) == 0)
    assert number > 5


def test_the_report_adds_up():
    pruner = StructPruner(config(widths={"mlp": 20, "attention": 2}))
    model = build("llama-untied")
    assert len(model(token_ids(), output_hidden_states=True).hidden_states) == 3
    small = pruner.prune_model(model, tokenizer())
    assert len(small(token_ids(), output_hidden_states=True).hidden_states) == 3, "they come out after it too"
    report = pruner.report
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    calibrated = {entry.name: entry.calibration_tokens for entry in pruner.manifest.of_use(CALIBRATED)}
    assert calibrated == {"a": 4 * 24, "b": 4 * 24}
    assert {"domains", "perplexity", "round 1"} <= set(report.seconds)
    table = str(report)
    assert "FFN channels: 40 → 20 (-50.0%)" in table and "mean over the calibration domains" in table
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))).sparsity == report.sparsity


def test_perplexities_come_with_the_margins_that_an_evaluation_finds():
    settings = config(widths={"mlp": 20}, num_samples=96)
    model, reader = build("llama-untied"), tokenizer()
    rows, numbers = short_rows(load_domains(settings, reader)[0].heldout, reader.eos_token_id, 96 // 2 // 8 * 24)
    heldout = torch.stack(rows)
    pruner = StructPruner(settings)
    before, after = (sample_losses(of, heldout) for of in (model, pruner.prune_model(model, reader)))
    ratio = float((after - before).mean().exp())
    margin = ratio * max(margin_of_error(after - before, numbers), UNSEEN / len(numbers.unique()))
    margin = hypot(margin, PARTS_DIFFER * (ratio - 1))
    assert pruner.report.domains["a"].perplexity.margin == pytest.approx(margin)
    assert pruner.report.domains["a"].documents == len(numbers.unique()) >= 5
    assert pruner.report.domains["a"].perplexity.pruned == pytest.approx(float(after.mean().exp()))
    assert pruner.report.domains["a"].tokens == heldout[:, 1:].numel()


def test_what_was_asked_and_what_was_removed_are_said(recwarn):
    near = StructPruner(config(sparsity=0.2))
    near.prune_model(build("llama-untied"), tokenizer())
    assert near.report.sparsity == pytest.approx(0.2, abs=0.01) and "warning: requested" not in str(near.report)
    assert f"Requested 20.0% of the layer parameters, removed {near.report.sparsity:.1%}" in str(near.report)
    far = StructPruner(config(sparsity=0.1, round_to=32, targets=("mlp",)))
    with pytest.warns(UserWarning, match=r"requested 10\.0% .*, removed .*; a smaller round_to") as warned:
        far.prune_model(build("llama-untied"), tokenizer())
    assert {warning.filename for warning in warned} == {__file__}, "at the line that has called the package"
    assert "warning: requested 10.0%" in str(far.report) and far.report.to_dict()["target"] == 0.1


@pytest.mark.parametrize(("case", "weight", "message"), [
    ("llama-tied", "model.layers.0.mlp.up_proj", "perplexity on held-out text of the domain 'a' is not a number"),
    ("bert", "bert.encoder.layer.0.intermediate.dense", "NaN or infinite activations at bert.encoder.layer.0.out"),
])  # fmt: skip
def test_nan_weights_are_noticed_before_anything_changes(case, weight, message):
    model = build(case)
    model.get_submodule(weight).weight.data[0] = float("nan")
    before = deepcopy(model)
    with pytest.raises(StructPruneError, match=message) as refused:
        prune_model(model, config(), tokenizer(), inplace=True)
    assert not isinstance(refused.value, InPlaceError) and same_weights(model, before)
