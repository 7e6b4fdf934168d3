"""What a token costs is what torch counts, for whole families."""

import pytest
from helpers import counted_by_torch
from models import build

from optimum_structprune.arch.load import describe
from optimum_structprune.forward.generation import flops_per_token, why_not_counted


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "gpt2-tied", "opt", "phi", "qwen3", "gemma2"])
def test_operations_are_those_that_torch_counts(case):
    model = build(case)
    arch = describe(model)
    assert flops_per_token(model, arch, 24) == counted_by_torch(model, 24)


def test_where_parameters_do_not_say_it_the_reason_is_given():
    assert not why_not_counted(build("llama-tied"), describe(build("llama-tied")))
    assert "experts" in why_not_counted(build("mixtral"), describe(build("mixtral")))
    packed = build("llama-tied")
    packed.config.quantization_config = {"quant_method": "gptq"}
    assert "quantized" in why_not_counted(packed, describe(build("llama-tied")))
