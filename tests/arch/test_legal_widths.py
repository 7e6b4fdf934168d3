"""A model runs with every width that the package calls legal."""

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


def awkward_width(legal, full):
    """Return a legal width near 60 % of the full width, and an odd one of two that are equally near."""
    return min(legal, key=lambda size: (abs(size - 0.6 * full), -(size % 2)))


@pytest.mark.parametrize("case", STRUCTURES)
@torch.no_grad()
def test_every_space_runs_at_an_awkward_legal_width(case):
    model = build(case)
    arch = describe(model)

    for name in arch.offered:
        full = max(space.width for space in arch.of(name))
        width = awkward_width(legal_sizes(model.config, arch, name), full)
        small = type(model)(shrunk_config(model.config, arch, {name: width})).eval()
        ids = token_ids(1, 6) % small.config.vocab_size
        assert small(ids).logits.isfinite().all(), (name, width)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_the_rows_of_a_mixture_of_experts_fill_blocks_of_16_bytes(case, dtype, multiple):
    model_type, fields = CASES[case]
    model = random_model(AutoModelForCausalLM, model_type, fields | {"hidden_size": 64}).to(dtype)

    # A config holds the dtype as text after it was saved.
    for config_dtype in (dtype, str(dtype).removeprefix("torch.")):
        model.config.dtype = config_dtype
        legal = legal_sizes(model.config, ModelInfo.of(model).arch, HIDDEN)
        assert 50 not in legal
        assert 48 in legal
        assert 52 not in legal or multiple == 4
        assert legal[-1] == 64
        assert all(width % multiple == 0 for width in legal)

    assert all(width % 8 == 0 for width in legal_sizes(model.config, describe(model), "mlp"))


def test_legal_widths_follow_the_config_class():
    for case, name, expected in (
        ("qwen2", "attention", [1, 2, 3, 4]),
        ("gemma2", "attention", [1, 2, 4]),
        ("llama-tied", HIDDEN, [8, 16, 24, 32]),
        ("qwen2", HIDDEN, list(range(1, 33))),
    ):
        model = build(case)
        legal = legal_sizes(model.config, describe(model), name)
        assert list(legal) == expected


@pytest.mark.parametrize("size", [10**8, 10**11])
def test_the_legal_widths_of_a_huge_config_are_not_listed(size):
    """A list of all widths would fill the memory, and a config may hold any number by mistake or on purpose."""
    sizes = GROUPED | {"intermediate_size": size}
    model_config = LlamaConfig(**sizes)
    no_defaults = {"widths": None, "targets": None}

    for fields, width in (
        ({"sparsity": 0.5}, size // 2),
        ({"widths": {"mlp": 77}}, 77),
        ({"widths": {"mlp": 77, "attention": 2}}, 77),
        ({"budget": {"parameters": 0.5}}, size // 2),
    ):
        settings = config(**(no_defaults | fields))
        space = dry_run(model_config, settings).spaces[0]
        assert space.name == "mlp"
        assert space.after == pytest.approx(width, rel=1e-3)

    with pytest.raises(StructPruneError, match=f"The nearest legal choice is {size}"):
        dry_run(model_config, config(widths={"mlp": size + 1}))


@given(st.integers(1, 9), st.integers(1, 60), st.sampled_from([1, 2, 8, 12]), st.sampled_from([1, 4, 5, 64]))
def test_a_range_and_a_list_have_the_same_multiples(first, count, step, multiple):
    legal = range(first * step, (first + count) * step, step)
    for size in {legal[-1], legal[count // 2]}:
        assert list(multiples(legal, size, multiple)) == list(multiples(list(legal), size, multiple))


def test_the_page_of_architectures_is_generated_from_the_data():
    root = Path(__file__).parents[2]
    table = run_path(str(root / ".ci" / "architectures.py"))["table"]
    page = (root / "docs" / "architectures.md").read_text()
    assert page.endswith("\n\n" + table()), "run `python .ci/architectures.py`"
