"""After an error, a model is unchanged, or it cannot be saved as a finished one."""

from copy import deepcopy

import pytest
from helpers import count_hooks, data_of, failing, same_weights
from models import build, config, documents, tokenizer
from quantized import Packed, Reversible, quantized
from torch import nn

from optimum_structprune import DomainConfig, InPlaceError, StructPruneError, StructPruner, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.method import loop, shrink
from optimum_structprune.method.layers import InMemory
from optimum_structprune.method.shrink import Masks
from optimum_structprune.steps import experts, hidden, layers
from optimum_structprune.steps.base import RunState, refusing_half_pruned


def grad_flags(model):
    """Return whether each parameter of a model requires a gradient."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def assert_unchanged_after_error(prune, model, message, folder):
    """Assert that `prune` raises an error with this message, and leaves a model that is unchanged and can be saved."""
    original = deepcopy(model)
    with pytest.raises(StructPruneError, match=message) as error:
        prune(model)

    assert not isinstance(error.value, InPlaceError)
    assert same_weights(model, original)
    assert model.config.to_dict() == original.config.to_dict()
    assert grad_flags(model) == grad_flags(original)
    assert count_hooks(model) == 0
    model.save_pretrained(folder)


def prune_in_place(model, **fields):
    return prune_model(model, config(**fields), tokenizer(), inplace=True)


@pytest.mark.parametrize(
    ("case", "refit"), [("llama-tied", "least_squares"), ("llama-bias", "least_squares"), ("gpt_oss", "none")]
)
def test_nan_weights_in_a_later_layer_undo_the_masks_of_earlier_layers(case, refit, monkeypatch, tmp_path):
    model = build(case)
    model.get_parameter(describe(model).of("mlp")[-1].producers[0].param).data[..., -1] = float("nan")
    undo = Masks.undo_
    masked_models = []

    def record_and_undo(self, at):
        masked_models.append(deepcopy(self.model))
        undo(self, at)

    monkeypatch.setattr(Masks, "undo_", record_and_undo)

    def prune(model):
        data = data_of(config(refit=refit, rounds=2))
        state = RunState.start(model, describe(model), data)
        with refusing_half_pruned(state):
            for step in StructPruner(data.config).steps(state.arch, state.model, {"mlp": 24}):
                step.apply(state)

    message = "NaN or infinite activations at model.layers.1.mlp"
    assert_unchanged_after_error(prune, model, message, tmp_path)
    assert len(masked_models) == 1
    assert not same_weights(masked_models[0], model)


@pytest.mark.parametrize(("rounds", "number"), [(1, 1), (2, 2)])
def test_a_criterion_that_fails_before_a_layer_is_cut_changes_nothing(rounds, number, monkeypatch, tmp_path):
    wanda = CRITERIA.get("wanda")
    score = wanda.score
    calls = []

    def score_once_with_nan(*args):
        calls.append(args)
        scores = score(*args)
        if len(calls) == number:
            scores = scores * float("nan")
        return scores

    monkeypatch.setattr(wanda, "score", score_once_with_nan)

    def prune(model):
        prune_in_place(model, criterion="wanda", rounds=rounds, refit="none")

    message = "'wanda' must return 40 finite scores.*NaN"
    assert_unchanged_after_error(prune, build("llama-tied"), message, tmp_path)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_errors_of_any_kind_undo_masks(kind, monkeypatch, tmp_path):
    model = build("llama-tied")
    monkeypatch.setattr(InMemory, "moments", failing(InMemory.moments, 2, kind("stop")))
    with pytest.raises(kind, match="stop"):
        prune_in_place(model, rounds=2, refit="none")

    assert same_weights(model, build("llama-tied"))
    model.save_pretrained(tmp_path)


# The module of a function that fails, its name, the number of the call that fails, and fields of the config.
SHRUNK = {
    "one consumer": (shrink, "write_consumer_", 1, {}),
    "last layer": (loop, "shrink_layer_", 2, {"refit": "none"}),
    "rounds": (loop, "shrink_layer_", 1, {"rounds": 2}),
    "experts": (experts, "shrink_layer_", 1, {"widths": {"expert": 3}}),
    "layers": (layers, "drop_layers_", 1, {"widths": {"layer": 1}}),
    "channels": (hidden, "narrow_", 1, {"widths": {"hidden": 24}}),
}


# Each place with one kind of error, and each kind of error at two places.
ENDS = [(place, RuntimeError, True) for place in SHRUNK]
ENDS += [("last layer", StructPruneError, True)]
for place in ("rounds", "channels"):
    ENDS += [(place, StructPruneError, False), (place, KeyboardInterrupt, True)]


@pytest.mark.parametrize(("place", "kind", "inplace"), ENDS)
def test_a_partly_pruned_model_cannot_be_saved(place, kind, inplace, monkeypatch, tmp_path):
    module, name, number, fields = SHRUNK[place]
    model = build("mixtral")
    original = deepcopy(model)
    monkeypatch.setattr(module, name, failing(getattr(module, name), number, kind("stop")))

    if not inplace or kind is KeyboardInterrupt:
        expected_error = pytest.raises(kind, match="stop")
    else:
        expected_error = pytest.raises(InPlaceError, match=r"Pruning stopped \(stop\).*begun to change: load it again")
    with expected_error as error:
        prune_model(model, config(**fields), tokenizer(), inplace=inplace)

    if not inplace:
        assert not isinstance(error.value, InPlaceError)
        assert same_weights(model, original)
        assert count_hooks(model) == 0
        model.save_pretrained(tmp_path / "unchanged")
        return

    assert not same_weights(model, original)
    with pytest.raises(InPlaceError, match="load it again"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()

    # A new model of the same class can be saved.
    build("mixtral").save_pretrained(tmp_path / "new")


def test_a_model_without_some_experts_cannot_be_saved_after_a_later_error(monkeypatch, tmp_path):
    """The masks of units are undone, but the experts are removed already."""
    monkeypatch.setattr(InMemory, "advance_original", failing(InMemory.advance_original, 2, RuntimeError("stop")))
    model = build("mixtral")

    with pytest.raises(InPlaceError, match="load it again"):
        prune_in_place(model, widths={"expert": 3, "mlp": 24}, rounds=2)
    with pytest.raises(InPlaceError):
        model.save_pretrained(tmp_path)


def test_a_quantized_model_is_unpacked_only_if_the_request_is_accepted():
    model = quantized(Reversible())
    short_text = [DomainConfig(name="short", source=documents(2))]
    refused_requests = [
        ({"widths": {"attention": 3}}, tokenizer(), "nearest legal choice is 2 or 4"),
        ({"criterion": "wnada"}, tokenizer(), "Did you mean 'wanda'"),
        ({}, None, "reading them takes a tokenizer"),
        ({"domains": short_text}, tokenizer(), "short"),
    ]
    for fields, reader, message in refused_requests:
        with pytest.raises(StructPruneError, match=message):
            prune_model(model, config(**fields), reader, inplace=True)
        assert type(model.model.layers[0].mlp.up_proj) is Packed
        assert model.is_quantized

    small = prune_model(model, config(), tokenizer(), inplace=True)
    assert small is model
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_the_largest_seed_is_valid_for_all_layers():
    settings = config(seed=2**32 - 1, criterion="random")
    assert prune_model(build("llama-tied"), settings, tokenizer()).num_parameters()
