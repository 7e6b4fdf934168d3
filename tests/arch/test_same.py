"""A run stops if a cut changes the outputs of the masked model; other files prove that right cuts change none."""

import pytest
import torch
from models import build, config, real_text_model, token_ids, tokenizer

from optimum_structprune import InPlaceError, StructPruneError, prune_model
from optimum_structprune.method import resize, shrink
from optimum_structprune.method.shrink import check_same
from optimum_structprune.steps import layers, vocabulary


def reverse_units(slice_tensors):
    """Return a `slice_tensors` that puts the kept units of each cut tensor in the opposite order."""

    def sliced(tensors, spaces, keep, *args):
        smaller = slice_tensors(tensors, spaces, keep, *args)
        for name, tensor in smaller.items():
            if tensor.shape != tensors[name].shape:
                smaller[name] = tensor.flip(0)
        return smaller

    return sliced


def keep_others(remove):
    """Return a `remove` that keeps the wrong one of two layers, or the tokens in the opposite order."""

    def removed(model, arch, keep):
        wrong = keep[::-1]
        if len(keep) == 1:
            wrong = [1 - layer for layer in keep]
        return remove(model, arch, wrong)

    return removed


TIED = "llama-tied"
REVERSED = (shrink, "slice_tensors", reverse_units)
# The kind of space, the model, the function that goes wrong, and fields of the config.
WRONG = {
    "mlp": (TIED, REVERSED, {"widths": {"mlp": 24}}),
    "attention": ("llama-bias", REVERSED, {"widths": {"attention": 2}}),
    "inside experts": ("mixtral", REVERSED, {"widths": {"mlp": 24}}),
    "called with more": ("gemma4_text", REVERSED, {"widths": {"mlp": 24}}),
    "without refit": (TIED, REVERSED, {"widths": {"mlp": 24}, "refit": "none", "rounds": 2}),
    "channels": (TIED, (resize, "slice_tensors", reverse_units), {"widths": {"hidden": 24}}),
    "layers": (TIED, (layers, "drop_layers_", keep_others), {"widths": {"layer": 1}}),
    "tokens": ("real text", (vocabulary, "drop_tokens_", keep_others), {"widths": {"vocab": 320}}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_cut_is_found(kind, monkeypatch):
    case, (module, name, spoil), fields = WRONG[kind]
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    if case == "real text":
        model, reader = real_text_model()
    else:
        model = build(case)
        reader = tokenizer()

    what = "Layer 0|The model|The model with layer 0 cut"
    with pytest.raises(InPlaceError, match=rf"\(({what}) gives other outputs .* differ by .* explains 0.01"):
        prune_model(model, config(**fields), reader, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_that_is_not_in_the_config_is_found(dtype):
    model = build("llama-tied").to(dtype)
    model.model.layers[1].self_attn.scaling *= 8

    with pytest.raises(StructPruneError, match="Layer 1 gives other outputs"):
        prune_model(model, config(widths={"mlp": 39}), inputs={"a": token_ids(8)})


def test_rounding_and_single_tokens_are_tolerated_but_nan_is_not():
    ones = torch.ones(1, 16, 8)
    zeros = torch.zeros(1, 16, 8)
    nan = ones * torch.nan
    one_token_differs = ones.clone()
    one_token_differs[0, 3] = 9.0
    half_zeros = zeros.clone()
    half_zeros[:, 8:] = 1.0

    check_same("It", ones, ones * 1.005)
    check_same("It", ones, one_token_differs)
    check_same("It", zeros, zeros)
    check_same("It", half_zeros, half_zeros)
    check_same("It", nan, nan)  # another check refuses a model whose weights are NaN

    for masked, pruned in ((ones, nan), (zeros, half_zeros + 1), (half_zeros + 1, zeros)):
        with pytest.raises(StructPruneError, match="It gives other outputs"):
            check_same("It", masked, pruned)
