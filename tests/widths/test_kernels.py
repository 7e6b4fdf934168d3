"""A plan says which fast kernels its widths lose."""

import pytest
import torch
from models import config
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_structprune.arch.load import describe
from optimum_structprune.dryrun import dry_run
from optimum_structprune.widths.kernels import lost_kernels


SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
LLAMA = LlamaConfig(vocab_size=64, num_hidden_layers=2, **SIZES)


@pytest.mark.parametrize(("widths", "devices", "lost"), [
    ({"mlp": 2048}, 1, []),
    ({"mlp": 2048, "attention": 4}, 4, []),
    ({"mlp": 1152}, 1, ["256"]),
    ({"mlp": {0: 3072, 1: 1120}}, 1, ["64", "128", "256"]),
    ({"mlp": 1152}, 2, ["256", "256"]),  # K-quants, and groups of 128 on each of two devices
    ({"mlp": 2000}, 1, ["32", "64", "128", "256"]),
    ({"attention": 3}, 2, ["2"]),
])  # fmt: skip
def test_what_is_lost(widths, devices, lost):
    with torch.device("meta"):
        arch = describe(LlamaForCausalLM(LLAMA))
    notes = [*lost_kernels(config(widths=widths, tensor_parallel=devices), arch, widths)]
    assert len(notes) == bool(lost)
    assert [part.split(")")[0] for note in notes for part in note.split("multiples of ")[1:]] == lost


def test_a_plan_warns():
    outcome = dry_run(LLAMA, config(widths={"mlp": 1000}))
    assert "warning: mlp 1000 has no llama.cpp's Q8_0" in str(outcome)
    large = LlamaConfig(vocab_size=64, num_hidden_layers=2, **{**SIZES, "intermediate_size": 12800})
    assert dry_run(large, config(sparsity=0.2, tensor_parallel=2)).notes == ()
