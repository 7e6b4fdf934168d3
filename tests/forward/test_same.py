"""A cut that does not compute what the masked model did stops the run; other files prove that right ones do."""

import pytest
import torch
from models import build, config, real_text_model, token_ids, tokenizer

from optimum_structprune import InPlaceError, StructPruneError, prune_model
from optimum_structprune.method import shrink
from optimum_structprune.method.shrink import check_same
from optimum_structprune.steps import layers, resize, vocabulary


def mixed_up(slice_tensors):
    """What is cut, in the opposite order."""

    def sliced(tensors, spaces, keep, *more):
        smaller = slice_tensors(tensors, spaces, keep, *more)
        return {name: of if of.shape == tensors[name].shape else of.flip(0) for name, of in smaller.items()}

    return sliced


def of_others(remove):
    """What removes as many layers or tokens, and other ones."""

    def removed(model, arch, keep):
        return remove(model, arch, [1 - layer for layer in keep] if len(keep) == 1 else keep[::-1])

    return removed


TIED, MIXED = "llama-tied", (shrink, "slice_tensors", mixed_up)
# The kind of space, the model, what is done wrong, and more of the config.
WRONG = {
    "mlp": (TIED, MIXED, {"widths": {"mlp": 24}}),
    "attention": ("llama-bias", MIXED, {"widths": {"attention": 2}}),
    "inside experts": ("mixtral", MIXED, {"widths": {"mlp": 24}}),
    "called with more": ("gemma4_text", MIXED, {"widths": {"mlp": 24}}),
    "without refit": (TIED, MIXED, {"widths": {"mlp": 24}, "refit": "none", "rounds": 2}),
    "channels": (TIED, (resize, "slice_tensors", mixed_up), {"widths": {"hidden": 24}}),
    "layers": (TIED, (layers, "drop_layers_", of_others), {"widths": {"layer": 1}}),
    "tokens": ("real text", (vocabulary, "drop_tokens_", of_others), {"widths": {"vocab": 320}}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_cut_is_found(kind, monkeypatch):
    case, (module, name, spoil), fields = WRONG[kind]
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    model, reader = real_text_model() if case == "real text" else (build(case), tokenizer())
    what = "Layer 0|The model|The model with layer 0 cut"
    with pytest.raises(InPlaceError, match=rf"\(({what}) gives other outputs .* differ by .* explains 0.01"):
        prune_model(model, config(**fields), reader, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_so_is_what_no_config_tells(dtype):
    model = build("llama-tied").to(dtype)
    model.model.layers[1].self_attn.scaling *= 8
    with pytest.raises(StructPruneError, match="Layer 1 gives other outputs"):
        prune_model(model, config(widths={"mlp": 39}), inputs={"a": token_ids(8)})


def test_rounding_and_single_tokens_are_none_and_nan_is():
    masked = torch.ones(1, 16, 8)
    zeros, one_off, nan = torch.zeros(1, 16, 8), masked.clone(), masked * torch.nan
    one_off[0, 3] = 9.0
    some = zeros.clone()
    some[:, 8:] = 1.0
    for same in ((masked, masked * 1.005), (masked, one_off), (zeros, zeros), (some, some)):
        check_same("It", *same)
    check_same("It", nan, nan)  # weights that are no numbers are refused elsewhere
    for pair in ((masked, nan), (zeros, some + 1), (some + 1, zeros)):
        with pytest.raises(StructPruneError, match="It gives other outputs"):
            check_same("It", *pair)
