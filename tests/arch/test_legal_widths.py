"""A legal width is one that the model runs with."""

from pathlib import Path
from runpy import run_path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CASES, GROUPED, STRUCTURES, build, config, random_model, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_structprune import StructPruneError, dry_run
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.shrink import legal_sizes, shrunk_config
from optimum_structprune.arch.spec import HIDDEN
from optimum_structprune.widths.legal import multiples


@pytest.mark.parametrize("case", STRUCTURES)
@torch.no_grad()
def test_every_space_runs_at_a_legal_width_that_suits_nobody(case):
    model = build(case)
    arch = describe(model)
    for name in arch.offered:
        full = max(space.width for space in arch.of(name))
        width = min(legal_sizes(model.config, arch, name), key=lambda size: (abs(size - 0.6 * full), -(size % 2)))
        small = type(model)(shrunk_config(model.config, arch, {name: width})).eval()
        assert small(token_ids(1, 6) % small.config.vocab_size).logits.isfinite().all(), (name, width)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_the_residual_stream_of_a_mixture_has_rows_of_whole_16_bytes(case, dtype, multiple):
    """A config that has been saved holds the dtype as text."""
    model_type, fields = CASES[case]
    model = random_model(AutoModelForCausalLM, model_type, {**fields, "hidden_size": 64}).to(dtype)
    for model.config.dtype in (dtype, str(dtype).removeprefix("torch.")):
        legal = legal_sizes(model.config, ModelInfo.of(model).arch, HIDDEN)
        assert 50 not in legal and 48 in legal and legal[-1] == 64
        assert all(width % multiple == 0 for width in legal) and (52 in legal) <= (multiple == 4)
    assert all(width % 8 == 0 for width in legal_sizes(model.config, describe(model), "mlp"))


def test_legal_widths_follow_the_config_class():
    for case, name, legal in (
        ("qwen2", "attention", [1, 2, 3, 4]),
        ("gemma2", "attention", [1, 2, 4]),
        ("llama-tied", HIDDEN, [8, 16, 24, 32]),
        ("qwen2", HIDDEN, [*range(1, 33)]),
    ):
        model = build(case)
        assert [*legal_sizes(model.config, describe(model), name)] == legal


@pytest.mark.parametrize("size", [10**8, 10**11])
def test_widths_are_not_listed_one_by_one(size):
    """As a config may hold any number, mistyped or hostile."""
    model_config = LlamaConfig(**{**GROUPED, "intermediate_size": size})
    for fields, width in (
        ({"sparsity": 0.5}, size // 2),
        ({"widths": {"mlp": 77}}, 77),
        ({"widths": {"mlp": 77, "attention": 2}}, 77),
        ({"budget": {"parameters": 0.5}}, size // 2),
    ):
        (space, *_) = dry_run(model_config, config(**{"widths": None, "targets": None, **fields})).spaces
        assert space.name == "mlp" and space.after == pytest.approx(width, rel=1e-3)
    with pytest.raises(StructPruneError, match=f"the nearest legal choice is {size}"):
        dry_run(model_config, config(widths={"mlp": size + 1}))


@given(st.integers(1, 9), st.integers(1, 60), st.sampled_from([1, 2, 8, 12]), st.sampled_from([1, 4, 5, 64]))
def test_multiples_of_a_range_are_those_of_a_list(least, count, step, multiple):
    legal = range(least * step, (least + count) * step, step)
    for size in {legal[-1], legal[count // 2]}:
        assert [*multiples(legal, size, multiple)] == [*multiples([*legal], size, multiple)]


def test_the_page_is_generated_from_the_data():
    root = Path(__file__).parents[2]
    table = run_path(str(root / ".ci" / "architectures.py"))["table"]
    page = (root / "docs" / "architectures.md").read_text()
    assert page.endswith("\n\n" + table()), "run `python .ci/architectures.py`"
