"""Where the CPU emulates a dtype, products run in fp32; the weights and what a module returns keep their dtype."""

from copy import deepcopy
from unittest.mock import Mock

import pytest
import torch
from helpers import count_hooks, same_weights
from models import STRUCTURES, build, config, token_ids, tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_structprune import prune_model
from optimum_structprune.arch import hooks
from optimum_structprune.arch.modules import blocks
from optimum_structprune.forward.generation import continuations
from optimum_structprune.method.layers import run_model


def emulate(monkeypatch) -> None:
    monkeypatch.setattr(hooks, "is_emulated", lambda weight: weight.dtype == torch.bfloat16)


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}


@pytest.mark.parametrize("case", STRUCTURES)
def test_products_run_in_fp32_and_the_model_is_as_before(monkeypatch, case):
    model = build(case).to(torch.bfloat16)
    with torch.no_grad():
        dtype = run_model(model, token_ids(2, 8))[0].dtype
    emulate(monkeypatch)
    before = deepcopy(model)
    linear, products = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))], set()
    with hooks.intercept(linear, lambda index, *_: products.add(linear[index].weight.dtype)), torch.no_grad():
        output = run_model(model, token_ids(2, 8))[0]
        exact = run_model(build(case), token_ids(2, 8))[0]
    assert torch.float32 in products and output.dtype == dtype and count_hooks(model) == 0
    assert (output.float() - exact).norm() < 0.1 * exact.norm()
    assert dtypes(model) == {torch.bfloat16} and same_weights(model, before)


def test_an_error_leaves_the_weights_in_their_dtype(monkeypatch):
    emulate(monkeypatch)
    model, fail = build("llama-tied").to(torch.bfloat16), Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), hooks.in_fast_dtype(blocks(model)):
        with hooks.intercept([next(m for m in model.modules() if isinstance(m, nn.Linear))], fail):
            model(token_ids(2, 8))
    assert dtypes(model) == {torch.bfloat16} and count_hooks(model) == 0


def test_a_model_is_pruned_and_writes_in_fp32_and_keeps_its_dtype(monkeypatch):
    emulate(monkeypatch)
    model = build("llama-tied").to(torch.bfloat16)
    pruned = prune_model(model, config(widths={"mlp": 24}), tokenizer())
    assert dtypes(pruned) == dtypes(model) == {torch.bfloat16} and count_hooks(pruned) == count_hooks(model) == 0
    linear, seen = pruned.get_submodule("model.layers.0.mlp.down_proj"), []
    with hooks.intercept([linear], lambda *_: seen.append(linear.weight.dtype)):
        (text,) = continuations(pruned, tokenizer(), [[1, 5, 7]], {"max_new_tokens": 4, "do_sample": False})
    assert {*seen} == {torch.float32} and 0 < len(text) <= 4
