"""A legal width is one that the model runs with."""

import pytest
import torch
from models import CASES, STRUCTURES, build, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_structprune.arch.load import describe
from optimum_structprune.arch.shrink import legal_sizes, shrunk_config
from optimum_structprune.arch.spec import HIDDEN


SHARE = 0.6
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe"]


@pytest.mark.parametrize("case", STRUCTURES)
@torch.no_grad()
def test_every_space_runs_at_a_legal_width_that_suits_nobody(case):
    model = build(case)
    arch = describe(model)
    for name in arch.offered:
        full = max(space.width for space in arch.of(name))
        width = min(legal_sizes(model.config, arch, name), key=lambda size: (abs(size - SHARE * full), -(size % 2)))
        small = type(model)(shrunk_config(model.config, arch, {name: width})).eval()
        assert small(token_ids(1, 6)).logits.isfinite().all(), (name, width)


def wide(model_type, dtype):
    """A model on the meta device whose residual stream has 64 channels."""
    fields = {**next(fields for kind, fields in CASES.values() if kind == model_type), "hidden_size": 64}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=dtype)


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_the_residual_stream_of_a_mixture_has_rows_of_whole_16_bytes(model_type, dtype, multiple):
    model = wide(model_type, dtype)
    arch = describe(model)
    legal = legal_sizes(model.config, arch, HIDDEN)
    assert 50 not in legal and 48 in legal and legal[-1] == 64
    assert all(width % multiple == 0 for width in legal) and (52 in legal) <= (multiple == 4)
    assert all(width % 8 == 0 for width in legal_sizes(model.config, arch, "mlp"))


def test_the_residual_stream_of_a_dense_model_needs_none_of_that():
    model = build("qwen2")
    assert 25 in legal_sizes(model.config, describe(model), HIDDEN)
