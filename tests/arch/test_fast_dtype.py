"""Matrix products run in fp32 where the CPU emulates a dtype. Weights and outputs keep their dtype."""

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
from optimum_structprune.arch.generation import continuations
from optimum_structprune.arch.modules import blocks
from optimum_structprune.method.layers import run_model


def emulate_bf16(monkeypatch) -> None:
    """Let the package treat bf16 as a dtype that the CPU emulates."""
    monkeypatch.setattr(hooks, "is_emulated", lambda weight: weight.dtype == torch.bfloat16)


def weight_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}


def linear_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]


@pytest.mark.parametrize("case", STRUCTURES)
@torch.no_grad()
def test_products_run_in_fp32_and_the_model_does_not_change(monkeypatch, case):
    model = build(case).to(torch.bfloat16)
    output_dtype = run_model(model, token_ids(2, 8))[0].dtype
    emulate_bf16(monkeypatch)
    original = deepcopy(model)
    modules = linear_modules(model)
    product_dtypes = set()

    with hooks.intercept(modules, lambda index, *_: product_dtypes.add(modules[index].weight.dtype)):
        output = run_model(model, token_ids(2, 8))[0]
        exact = run_model(build(case), token_ids(2, 8))[0]

    assert torch.float32 in product_dtypes
    assert output.dtype == output_dtype
    assert (output.float() - exact).norm() < 0.1 * exact.norm()
    assert count_hooks(model) == 0
    assert weight_dtypes(model) == {torch.bfloat16}
    assert same_weights(model, original)


def test_an_error_leaves_the_weights_in_their_dtype(monkeypatch):
    emulate_bf16(monkeypatch)
    model = build("llama-tied").to(torch.bfloat16)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    interrupt = Mock(side_effect=KeyboardInterrupt)

    with pytest.raises(KeyboardInterrupt), hooks.in_fast_dtype(blocks(model)):
        with hooks.intercept([linear], interrupt):
            model(token_ids(2, 8))

    assert weight_dtypes(model) == {torch.bfloat16}
    assert count_hooks(model) == 0


def test_a_model_is_pruned_and_generates_in_fp32_and_keeps_its_dtype(monkeypatch):
    emulate_bf16(monkeypatch)
    model = build("llama-tied").to(torch.bfloat16)
    pruned = prune_model(model, config(widths={"mlp": 24}), tokenizer())

    assert weight_dtypes(pruned) == {torch.bfloat16}
    assert weight_dtypes(model) == {torch.bfloat16}
    assert count_hooks(pruned) == 0
    assert count_hooks(model) == 0

    linear = pruned.get_submodule("model.layers.0.mlp.down_proj")
    product_dtypes = set()
    with hooks.intercept([linear], lambda *_: product_dtypes.add(linear.weight.dtype)):
        (text,) = continuations(pruned, tokenizer(), [[1, 5, 7]], {"max_new_tokens": 4, "do_sample": False})
    assert product_dtypes == {torch.float32}
    assert 0 < len(text) <= 4
