"""A module that replaces another module has its parameters, settings and hooks."""

from copy import deepcopy

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import build
from torch import nn

from optimum_structprune.arch.load import describe
from optimum_structprune.arch.modules import replace_


def test_a_hook_of_accelerate_does_not_put_a_tied_weight_in_the_place_of_a_new_tensor():
    """accelerate identifies a tied weight by its address, and another tensor may have that address later."""
    model = build("llama-tied")
    layer = model.model.layers[0]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = state["mlp.down_proj.weight"]
    tied_weights = {weight.data_ptr(): {"cpu": nn.Parameter(torch.zeros_like(weight))}}
    add_hook_to_module(layer.mlp.down_proj, AlignDevicesHook("cpu", tied_params_map=tied_weights))

    replace_(model, "model.layers.0", deepcopy(build("llama-tied").model.layers[0]), state, describe(model))

    new_layer = model.model.layers[0]
    assert new_layer is not layer
    assert hasattr(new_layer.mlp.down_proj, "_hf_hook")
    assert torch.equal(new_layer.mlp.down_proj.weight, weight)
    assert weight.any()
