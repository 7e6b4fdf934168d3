"""Budgets, widths and rounds."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import build, config

from optimum_structprune import StructPruneConfig, StructPruneError
from optimum_structprune.allocation import round_widths, target_widths, widths_for_sparsity
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import ArchSpec, Space


def spec_of(layers: int, groups: int, group_cost: int, channels: int, channel_cost: int) -> ArchSpec:
    spaces = []
    for layer in range(layers):
        heads = (("kv_heads", 1), ("heads", 2))
        spaces.append(Space("attention", layer, groups, (), (), heads, (), group_cost))
        spaces.append(Space("mlp", layer, channels, (), (), (("ffn", 1),), (), channel_cost))
    block = groups * group_cost + channels * channel_cost + 7
    return ArchSpec("toy", "layers", (block,) * layers, tuple(spaces))


specs = st.builds(
    spec_of, st.integers(1, 4), st.integers(1, 9), st.integers(500, 5000), st.integers(64, 2048), st.integers(5, 50)
)


def removed(spec: ArchSpec, widths: dict[str, int]) -> int:
    return sum((space.size - widths.get(space.name, space.size)) * space.unit_params for space in spec.spaces)


@settings(deadline=None, max_examples=200)
@given(spec=specs, sparsity=st.floats(0.02, 0.9), round_to=st.sampled_from([1, 8, 64]))
def test_sparsity_is_met_within_half_a_step(spec, sparsity, round_to):
    legal = {name: list(range(1, spec.of(name)[0].size + 1)) for name in spec.names}
    most = {"attention": 1, "mlp": round_to if round_to < spec.of("mlp")[0].size else 1}
    if sparsity * sum(spec.block_params) > removed(spec, most):
        with pytest.raises(StructPruneError, match="is more than"):
            widths_for_sparsity(spec, sparsity, legal, round_to)
        return
    widths = widths_for_sparsity(spec, sparsity, legal, round_to)
    assert all(width in legal[name] for name, width in widths.items())
    channels = spec.of("mlp")[0]
    assume(widths["mlp"] < channels.size)
    step = most["mlp"] * channels.unit_params * spec.num_blocks
    assert abs(removed(spec, widths) - sparsity * sum(spec.block_params)) <= step / 2 + 1e-6


@settings(deadline=None, max_examples=100)
@given(spec=specs, low=st.floats(0.02, 0.4), more=st.floats(0.01, 0.4))
def test_more_sparsity_never_keeps_more(spec, low, more):
    legal = {name: list(range(1, spec.of(name)[0].size + 1)) for name in spec.names}
    assume((low + more) * sum(spec.block_params) <= removed(spec, {"attention": 1, "mlp": 1}))
    little = widths_for_sparsity(spec, low, legal, 1)
    much = widths_for_sparsity(spec, low + more, legal, 1)
    assert removed(spec, much) >= removed(spec, little)


def test_one_target_takes_it_all():
    model = build("qwen2")
    spec = describe(model)
    widths = target_widths(config(sparsity=0.25, targets=("mlp",), round_to=1), spec, model.config)
    assert set(widths) == {"mlp"}
    assert removed(spec, widths) / sum(spec.block_params) == pytest.approx(0.25, abs=0.01)


def test_sparsity_rounds_channels_and_explicit_widths_do_not():
    model = build("llama-tied")
    spec = describe(model)
    assert target_widths(config(sparsity=0.2, round_to=16), spec, model.config)["mlp"] % 16 == 0
    assert target_widths(config(widths={"mlp": 23}), spec, model.config) == {"mlp": 23}


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        (
            "llama-tied",
            {"widths": {"attention": 3}},
            r"'attention'\] = 3 is not legal .* nearest legal choice is 2 or 4",
        ),
        (
            "llama-tied",
            {"widths": {"mlp": 41}},
            r"'mlp'\] = 41 is not legal .* has 40; the nearest legal choice is 40",
        ),
        ("llama-tied", {"widths": {"mpl": 4}}, r"no space 'mpl' to prune. Did you mean 'mlp'\?"),
        (
            "opt",
            {"widths": {"attention": 2}},
            "no space 'attention' to prune: transformers derives the head dimension",
        ),
        ("llama-tied", {"sparsity": 0.99}, "sparsity=0.99 is more than mlp, attention can give: at most 0.8"),
    ],
)
def test_illegal_wishes_name_what_is_legal(case, fields, message):
    model = build(case)
    with pytest.raises(StructPruneError, match=message):
        target_widths(config(**fields), describe(model), model.config)


@settings(deadline=None)
@given(
    rounds=st.integers(1, 8),
    schedule=st.sampled_from(["linear", "geometric", "cubic"]),
    mlp=st.integers(1, 40),
    attention=st.integers(1, 4),
)
def test_rounds_go_down_and_end_at_the_target(rounds, schedule, mlp, attention):
    spec = spec_of(2, 4, 100, 40, 10)
    widths = {"mlp": mlp, "attention": attention}
    steps = round_widths(StructPruneConfig(widths=widths, rounds=rounds, schedule=schedule), spec, widths)
    assert len(steps) == rounds and steps[-1] == widths
    for name in widths:
        series = [spec.of(name)[0].size, *(step[name] for step in steps)]
        assert series == sorted(series, reverse=True)


def test_schedules_differ_in_when_they_remove():
    spec = spec_of(1, 4, 100, 1000, 10)
    middle = {
        schedule: round_widths(
            StructPruneConfig(widths={"mlp": 250}, rounds=2, schedule=schedule), spec, {"mlp": 250}
        )[0]
        for schedule in ("linear", "geometric", "cubic")
    }
    assert middle["linear"]["mlp"] == 625 and middle["geometric"]["mlp"] == 500
    assert middle["cubic"]["mlp"] == round(1000 - (1 - 0.5**3) * 750)
