"""What an error leaves behind: a model as it was, or one that cannot be taken for a finished one."""

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


def assert_refused(prune, model, message, folder):
    """The model is bit for bit as it was, the error does not say otherwise, and the model can be saved."""
    before = deepcopy(model)
    with pytest.raises(StructPruneError, match=message) as refused:
        prune(model)
    assert not isinstance(refused.value, InPlaceError)
    assert same_weights(model, before) and model.config.to_dict() == before.config.to_dict()
    now, then = ({name: p.requires_grad for name, p in one.named_parameters()} for one in (model, before))
    assert now == then
    assert count_hooks(model) == 0
    model.save_pretrained(folder)


def in_place(**fields):
    return lambda model: prune_model(model, config(**fields), tokenizer(), inplace=True)


@pytest.mark.parametrize(
    ("case", "refit"), [("llama-tied", "least_squares"), ("llama-bias", "least_squares"), ("gpt_oss", "none")]
)
def test_nan_weights_in_a_later_layer_undo_the_masks_of_those_before(case, refit, monkeypatch, tmp_path):
    model = build(case)
    model.get_parameter(describe(model).of("mlp")[-1].producers[0].param).data[..., -1] = float("nan")
    masked, undo = [], Masks.undo_

    def noted(self, at):
        masked.append(deepcopy(self.model))
        undo(self, at)

    monkeypatch.setattr(Masks, "undo_", noted)

    def prune(model):
        data = data_of(config(refit=refit, rounds=2))
        state = RunState.start(model, describe(model), data)
        with refusing_half_pruned(state):
            for step in StructPruner(data.config).steps(state.arch, state.model, {"mlp": 24}):
                step.apply(state)

    assert_refused(prune, model, "NaN or infinite activations at model.layers.1.mlp", tmp_path)
    assert len(masked) == 1 and not same_weights(masked[0], model)


@pytest.mark.parametrize(("rounds", "number"), [(1, 1), (2, 2)])
def test_a_criterion_that_fails_before_a_layer_is_cut(rounds, number, monkeypatch, tmp_path):
    calls, wanda = [], CRITERIA.get("wanda")
    score = wanda.score

    def scores(*args):
        calls.append(args)
        return score(*args) * (float("nan") if len(calls) == number else 1.0)

    monkeypatch.setattr(wanda, "score", scores)
    prune = in_place(criterion="wanda", rounds=rounds, refit="none")
    assert_refused(prune, build("llama-tied"), "'wanda' must return 40 finite scores.*NaN", tmp_path)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_other_errors_undo_masks_too(kind, monkeypatch, tmp_path):
    model = build("llama-tied")
    before = deepcopy(model)
    monkeypatch.setattr(InMemory, "moments", failing(InMemory.moments, 2, kind("stop")))
    with pytest.raises(kind, match="stop"):
        in_place(rounds=2, refit="none")(model)
    assert same_weights(model, before)
    model.save_pretrained(tmp_path)


# The module whose function fails, the function, at which call, and the config.
SHRUNK = {
    "one consumer": (shrink, "write_consumer_", 1, {}),
    "last layer": (loop, "shrink_layer_", 2, {"refit": "none"}),
    "rounds": (loop, "shrink_layer_", 1, {"rounds": 2}),
    "experts": (experts, "shrink_layer_", 1, {"widths": {"expert": 3}}),
    "layers": (layers, "drop_layers_", 1, {"widths": {"layer": 1}}),
    "channels": (hidden, "narrow_", 1, {"widths": {"hidden": 24}}),
}


# Every place with one kind of error, and every kind at two places.
ENDS = [(where, RuntimeError, True) for where in SHRUNK]
ENDS += [("last layer", StructPruneError, True)]
for where in ("rounds", "channels"):
    ENDS += [(where, StructPruneError, False), (where, KeyboardInterrupt, True)]


@pytest.mark.parametrize(("where", "kind", "inplace"), ENDS)
def test_a_model_that_has_begun_to_shrink_cannot_be_saved(where, kind, inplace, monkeypatch, tmp_path):
    module, name, number, fields = SHRUNK[where]
    model = build("mixtral")
    before = deepcopy(model)
    monkeypatch.setattr(module, name, failing(getattr(module, name), number, kind("stop")))
    if not inplace or kind is KeyboardInterrupt:
        expected = pytest.raises(kind, match="stop")
    else:
        expected = pytest.raises(InPlaceError, match=r"Pruning stopped \(stop\).*begun to change: load it again")
    with expected as raised:
        prune_model(model, config(**fields), tokenizer(), inplace=inplace)
    if not inplace:
        assert not isinstance(raised.value, InPlaceError)
        assert same_weights(model, before) and count_hooks(model) == 0
        model.save_pretrained(tmp_path / "as it was")
        return
    assert not same_weights(model, before)
    with pytest.raises(InPlaceError, match="load it again"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Loaded again means a model of its own, which has nothing to do with the broken one.
    build("mixtral").save_pretrained(tmp_path / "again")


def test_an_error_in_a_later_step_counts_too(monkeypatch, tmp_path):
    """Experts have gone by then, and masks of units are undone: not enough to go on with this model."""
    monkeypatch.setattr(InMemory, "advance_dense", failing(InMemory.advance_dense, 2, RuntimeError("stop")))
    model = build("mixtral")
    with pytest.raises(InPlaceError, match="load it again"):
        in_place(widths={"expert": 3, "mlp": 24}, rounds=2)(model)
    with pytest.raises(InPlaceError):
        model.save_pretrained(tmp_path)


def test_a_quantized_model_stays_packed_where_a_wish_is_refused():
    model, short = quantized(Reversible()), [DomainConfig(name="short", source=documents(2))]
    for fields, reader, message in (
        ({"widths": {"attention": 3}}, tokenizer(), "nearest legal choice is 2 or 4"),
        ({"criterion": "wnada"}, tokenizer(), "Did you mean 'wanda'"),
        ({}, None, "reading them takes a tokenizer"),
        ({"domains": short}, tokenizer(), "short"),
    ):
        with pytest.raises(StructPruneError, match=message):
            prune_model(model, config(**fields), reader, inplace=True)
        assert type(model.model.layers[0].mlp.up_proj) is Packed and model.is_quantized
    # And what is granted unpacks it.
    small = prune_model(model, config(), tokenizer(), inplace=True)
    assert small is model and type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_the_largest_seed_is_one_for_all_layers():
    assert prune_model(build("llama-tied"), config(seed=2**32 - 1, criterion="random"), tokenizer()).num_parameters()
