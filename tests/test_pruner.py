"""The main path on tiny models: what it promises about models, hooks, seeds and errors."""

import json
from copy import deepcopy

import pytest
import torch
from helpers import count_hooks, evidence_of, logits, modes, pruned_on, same_weights, whole_passes
from models import build, config, documents, token_ids, tokenizer
from torch import nn

from optimum_structprune import (
    AutoStructPruner,
    DomainConfig,
    InPlaceError,
    StructPruneError,
    StructPruner,
    prune_model,
    register_criterion,
    register_pruner,
)
from optimum_structprune.criteria import CRITERIA, Criterion
from optimum_structprune.pruner import PRUNERS
from optimum_structprune.pruning import sweep


@pytest.mark.parametrize("refit", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "flap", "obs", "obs_drive", "random"])
def test_every_criterion_with_every_refit(criterion, refit):
    model = build("llama-tied")
    widths = {"mlp": 24, "attention": 2}
    small = prune_model(model, config(widths=widths, criterion=criterion, refit=refit), tokenizer())
    assert small.config.intermediate_size == 24 and small.config.num_key_value_heads == 2
    assert small.config.mlp_bias == (refit == "bias")
    assert torch.isfinite(logits(small)).all()


def test_refit_brings_the_logits_nearer():
    model = build("llama-tied")
    configs = {refit: config(criterion="wanda", refit=refit) for refit in ("none", "least_squares")}
    distance = {
        refit: float((logits(prune_model(model, one, tokenizer())) - logits(model)).square().mean())
        for refit, one in configs.items()
    }
    assert distance["least_squares"] < 0.9 * distance["none"]


@pytest.mark.parametrize(
    ("refit", "criterion"), [("none", "wanda"), ("bias", "wanda"), ("least_squares", "obs_drive")]
)
def test_without_a_criterion_the_refit_names_it(refit, criterion):
    model = build("llama-tied")
    names = (None, criterion, "wanda" if criterion == "obs_drive" else "obs_drive")
    pruners = [StructPruner(config(criterion=name, refit=refit)) for name in names]
    silent, named, other = (one.prune_model(model, tokenizer()) for one in pruners)
    assert same_weights(silent, named) and not same_weights(silent, other)
    assert pruners[0].report.criterion == criterion


def test_one_round_of_the_masked_form_equals_the_shrunk_form():
    # Of two rounds the first works on masked layers and the second on shrunk ones.
    model = build("qwen2")
    once = prune_model(model, config(criterion="magnitude", refit="none"), tokenizer())
    twice = prune_model(model, config(criterion="magnitude", refit="none", rounds=2), tokenizer())
    assert same_weights(once, twice)


@pytest.mark.parametrize("rounds", [1, 2])
def test_passes_over_the_whole_model_prune_too(rounds):
    model = build("llama-tied")
    small = pruned_on(evidence_of(config(rounds=rounds), run_passes=whole_passes), model, {"mlp": 24}).model
    assert small.config.intermediate_size == 24 and count_hooks(small) == 0
    # Later layers are judged on what the dense model before them gives, so the result is another one.
    other = pruned_on(evidence_of(config(rounds=rounds)), model, {"mlp": 24}).model
    assert not same_weights(small, other)


def test_same_seed_same_plan_other_seed_other_text():
    pruners = [StructPruner(config(seed=seed)) for seed in (0, 0, 1)]
    models = [pruner.prune_model(build("llama-tied"), tokenizer()) for pruner in pruners]
    assert pruners[0].plan == pruners[1].plan and same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


def test_in_place_returns_the_same_object():
    model = build("llama-tied")
    expected = logits(prune_model(model, config(), tokenizer()))
    small = prune_model(model, config(), tokenizer(), inplace=True)
    assert small is model and model.config.intermediate_size == 24
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_exception_in_the_middle(monkeypatch, inplace):
    original = sweep.shrink_layer_

    def fail(model, arch, layer, plan, smaller):
        if layer == 1:
            raise RuntimeError("disk on fire")
        original(model, arch, layer, plan, smaller)

    monkeypatch.setattr(sweep, "shrink_layer_", fail)
    model = build("llama-tied")
    before = deepcopy(model)
    expected = InPlaceError if inplace else RuntimeError
    with pytest.raises(expected, match="disk on fire.*load it again" if inplace else "disk on fire"):
        StructPruner(config()).prune_model(model, tokenizer(), inplace=inplace)
    assert count_hooks(model) == 0
    assert inplace or same_weights(model, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("llama-tied", {"rounds": 2}),
        ("llama-tied", {"allocation": "sensitivity"}),
        ("mixtral", {"widths": {"layer": 1, "expert": 3, "hidden": 24, "mlp": 24}}),
        ("bert", {"rounds": 2}),
        ("vit", {}),
    ],
)
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


@pytest.mark.parametrize(("inplace", "kind"), [(False, KeyboardInterrupt), (True, RuntimeError)])
@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("llama-tied", {"rounds": 2, "widths": {"mlp": 24, "layer": 1}}),
        ("llama-tied", {"allocation": "sensitivity"}),
        ("bert", {"rounds": 2}),
    ],
)
def test_the_modes_of_all_modules_come_back_after_an_error(case, fields, inplace, kind):
    """Wherever it comes up: at the first call in the last layer, the fourth, the thirteenth, and so on."""
    number, ended = 0, False
    while not ended:
        number = 3 * number + 1
        model = build(case).train()
        for module in list(model.modules())[5::3]:
            module.training = False  # such as a frozen layer in a model that is trained
        before, as_it_was = deepcopy(model), modes(model)
        handle = model.get_submodule(LAST[case]).register_forward_pre_hook(failing(number, kind))
        try:
            small = prune_model(model, config(num_samples=4, **fields), tokenizer(), inplace=inplace)
            ended = True
        except (kind, InPlaceError):
            small = model
        handle.remove()
        assert modes(model).items() <= as_it_was.items() and {*modes(small).values()} == {True, False}
        assert inplace or (same_weights(model, before) and modes(model) == as_it_was and count_hooks(model) == 0)
    assert number > 5


LAST = {"llama-tied": "model.layers.1.mlp", "bert": "bert.encoder.layer.1.output"}


def failing(number, kind):
    """A hook that raises at its n-th call in a model, copies included."""
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == number:
            raise kind("stop")

    return fail


@torch.no_grad()
def test_hidden_states_come_out_of_a_model_that_gave_them_before():
    model = build("llama-tied")
    assert len(model(token_ids(), output_hidden_states=True).hidden_states) == 3
    small = prune_model(model, config(), tokenizer())
    output = small(token_ids(), output_hidden_states=True)
    assert len(output.hidden_states) == 3


def test_bfloat16_stays_bfloat16():
    small = prune_model(build("llama-tied").to(torch.bfloat16), config(), tokenizer())
    assert small.dtype == torch.bfloat16 and torch.isfinite(logits(small)).all()


def test_pruning_twice():
    once = prune_model(build("llama-tied"), config(widths={"mlp": 32, "attention": 2}), tokenizer())
    twice = prune_model(once, config(widths={"mlp": 16, "attention": 1}), tokenizer())
    assert (twice.config.intermediate_size, twice.config.num_key_value_heads) == (16, 1)


def test_the_report_adds_up():
    pruner = StructPruner(config(widths={"mlp": 20, "attention": 2}))
    small = pruner.prune_model(build("llama-untied"), tokenizer())
    report = pruner.report
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert report.parameters["after"] == small.num_parameters()
    assert set(report.perplexity) == {"a", "b"} and report.perplexity["a"]["after"] > 1
    assert report.calibration_tokens == {"a": 4 * 24, "b": 4 * 24}
    assert {"domains", "perplexity", "round 1"} <= set(report.seconds)
    table = str(report)
    assert "width mlp" in table and "-50.0%" in table and "geometric mean" in table
    assert json.loads(json.dumps(report.to_dict()))["sparsity"] == report.sparsity


@pytest.fixture
def unregister():
    """Takes a class out of a registry again, which only tests need."""
    entered = []
    yield lambda registry, name: entered.append((registry, name))
    for registry, name in entered:
        for names in (table for table in vars(registry).values() if isinstance(table, dict)):
            names.pop(name, None)


def test_pruners_resolve_by_method(unregister):
    unregister(PRUNERS, "test-pruner")

    @register_pruner("test-pruner")
    class Mine(StructPruner):
        pass

    assert type(AutoStructPruner.from_config(config(method="test-pruner"))) is Mine
    with pytest.raises(StructPruneError, match=r"no pruner 'test-prunner'. Did you mean 'test-pruner'\?"):
        AutoStructPruner.from_config(config(method="test-prunner"))


def test_a_registered_criterion_is_used(unregister):
    unregister(CRITERIA, "test-first")

    @register_criterion("test-first")
    class First(Criterion):
        def score(self, weight, moments, columns_per_unit):
            return -torch.arange(weight.shape[1] // columns_per_unit, dtype=torch.float32)

    pruner = StructPruner(config(criterion="test-first"))
    pruner.prune_model(build("llama-tied"), tokenizer())
    assert pruner.plan.keep[0, "mlp"] == tuple(range(24))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"domains": [DomainConfig(name="none", source=[])]}, "none"),
        ({"domains": [DomainConfig(name="short", source=documents(2))]}, "short"),
        ({"domains": [DomainConfig(name="gone", source="./gone.jsonl")]}, "gone.jsonl"),
    ],
)
def test_bad_text_changes_nothing(fields, message):
    model = build("llama-tied")
    before = deepcopy(model)
    with pytest.raises(StructPruneError, match=message):
        StructPruner(config(**fields)).prune_model(model, tokenizer(), inplace=True)
    assert same_weights(model, before) and count_hooks(model) == 0


@pytest.mark.parametrize(
    ("case", "weight", "message"),
    [
        ("llama-tied", "model.layers.0.mlp.up_proj", "perplexity on held-out text of the domain 'a' is not a number"),
        ("bert", "bert.encoder.layer.0.intermediate.dense", "NaN or infinite activations at bert.encoder.layer.0.out"),
    ],
)
def test_nan_weights_are_noticed_before_anything_changes(case, weight, message):
    model = build(case)
    model.get_submodule(weight).weight.data[0] = float("nan")
    before = deepcopy(model)
    with pytest.raises(StructPruneError, match=message) as refused:
        prune_model(model, config(), tokenizer(), inplace=True)
    assert not isinstance(refused.value, InPlaceError) and same_weights(model, before)
