"""The speed of shapes is measured in turns, predicted for other shapes, and limits a pruning."""

from itertools import cycle
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from models import build, config, fewer_tokens, real_text_model, three_layers, tokenizer

from optimum_structprune import StructPruneConfig, StructPruneError, dry_run, prune
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.shrink import shrunk_config
from optimum_structprune.record.report import Report
from optimum_structprune.record.verdict import judge
from optimum_structprune.widths import speed
from optimum_structprune.widths.allocation import widths_of
from optimum_structprune.widths.speed import ShapeTimes, SpeedUp, TimedRun, measured_speed_up, random_model, speed_up


CPU = torch.device("cpu")
# The time of a model: fixed, of a layer, and of a unit of each kind.
FIXED = 20
OF_LAYER = 10
OF_UNIT = {"mlp": 1.0, "attention": 4.0, "vocab": 0.2}


def run_of(seconds):
    """Return a run that takes these seconds, over and over."""
    durations = cycle(seconds)
    return SimpleNamespace(seconds=lambda: next(durations), steps=1)


def linear_time(shape, of_unit):
    layers = shape.num_hidden_layers
    in_layer = OF_LAYER + of_unit["mlp"] * shape.intermediate_size + of_unit["attention"] * shape.num_key_value_heads
    return FIXED + layers * in_layer + of_unit["vocab"] * shape.vocab_size


def fake(of_unit=None, power=1.0, margin=0.001):
    """Return a measurement whose times are a power of a linear function of the sizes, and which counts its calls."""
    of_unit = OF_UNIT | (of_unit or {})
    shapes = []

    def measure(model, original, shape, use, device):
        shapes.append(shape)
        ratio = (linear_time(original, of_unit) / linear_time(shape, of_unit)) ** power
        return SpeedUp(ratio, ratio * (1 - margin), ratio * (1 + margin))

    measure.shapes = shapes
    return measure


@pytest.fixture
def measuring(monkeypatch):
    """Return a function that replaces the measurement of this test."""

    def replace(measure):
        monkeypatch.setattr(speed, "TIMES", {})
        monkeypatch.setattr(speed, "measured_speed_up", measure)
        return measure

    return replace


def wish(value=1.2, **fields):
    return config(**({"widths": None, "budget": {"speed": value}, "targets": ("mlp",), "round_to": 1} | fields))


def true_speed_up(measure, model, widths):
    shape = shrunk_config(model.config, describe(model), widths)
    return measure(model, model.config, shape, None, CPU).value


def test_other_jobs_do_not_change_a_speed_up():
    """The load of the machine changes between pairs, and slows down both runs of a pair."""
    load = [1.0, 3.0, 2.0, 1.5, 4.0]
    result = speed_up(run_of([3 * factor for factor in load]), run_of([2 * factor for factor in load]))
    assert result == pytest.approx((1.5, 1.5, 1.5))


def test_a_noisy_speed_up_takes_more_pairs():
    calls = []

    def noisy(durations):
        run = run_of(durations)
        return SimpleNamespace(seconds=lambda: calls.append(run) or run.seconds(), steps=1)

    exact = speed_up(noisy([2.0]), noisy([1.0]))
    assert exact == SpeedUp(2.0, 2.0, 2.0)
    assert len(calls) == 2 * 5

    calls.clear()
    ratios = [1.0, 1.4, 1.2]
    result = speed_up(noisy(ratios), noisy([1.0]))
    assert len(calls) == 2 * 15
    assert result.value == median(ratios)
    assert result.low <= result.value <= result.high
    assert all(first is not second for first, second in zip(calls, calls[1:], strict=False)), "the models take turns"

    calls.clear()
    speed_up(noisy([0.1, 0.14, 0.12]), noisy([0.1]))
    assert len(calls) > 2 * 15, "short runs get more pairs"


@pytest.mark.parametrize(("case", "decodes"), [("llama-tied", True), ("llama-tied", False), ("bert", False)])
def test_a_run_takes_at_least_a_tenth_of_a_second(case, decodes):
    now = [0.0]
    model = build(case)
    model.base_model.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 0.004))
    ids = torch.ones(2, 8, dtype=torch.long)

    with torch.inference_mode():
        run = TimedRun(model, ids, decodes, lambda: now[0])
        assert run.steps == 25
        assert run.seconds() == pytest.approx(0.004)
        assert TimedRun(model, ids, decodes, lambda: now[0], steps=3).steps == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama-tied", "gemma3_text", "qwen3_moe", "bert"])
def test_a_random_model_has_the_shapes_and_the_dtype_of_the_model(case, dtype):
    model = build(case).to(dtype)
    shapes = {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()}
    candidate = random_model(model.to("meta"), model.config, CPU)

    assert {name: (weight.shape, weight.dtype) for name, weight in candidate.named_parameters()} == shapes
    assert not any(weight.count_nonzero() == 0 for weight in candidate.parameters())
    assert not candidate.training


@pytest.mark.parametrize(("case", "use"), [
    ("llama-tied", "decode"), ("gemma3_text", "prompt"), ("bert", "encode"), ("bert", "query"),
])  # fmt: skip
def test_every_use_is_measured(case, use):
    model = build(case)
    smaller = shrunk_config(model.config, describe(model), {"mlp": 20})
    result = measured_speed_up(model, model.config, smaller, speed.USES[use]._replace(batch_size=2), CPU)
    assert 0 < result.low <= result.value <= result.high


def test_linear_times_are_predicted_exactly():
    model = three_layers()
    measure = fake()
    times = ShapeTimes(wish(), describe(model), model, CPU, measure)

    for widths in (
        {},
        {"mlp": 10},
        {"mlp": 36, "attention": 2},
        {"mlp": 20, "attention": 1, "vocab": 64},
        {"layer": 2},
    ):
        assert 1 / times.predicted(widths) == pytest.approx(true_speed_up(fake(), model, widths)), widths
    assert len(measure.shapes) == 4, "one shape is measured for each space"

    times.measured({"mlp": 10})
    times.measured({"mlp": 10, "attention": 4})
    assert len(measure.shapes) == 5, "a full width is not a different shape"


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("targets", [("mlp",), ("mlp", "attention"), ("layer",)])
def test_the_widths_are_the_largest_that_meet_the_wish(targets, power, measuring):
    """The times bend, so the first prediction is wrong."""
    measure = measuring(fake(power=power))
    model = three_layers()
    widths = widths_of(wish(1.15, targets=targets), describe(model), model)

    assert true_speed_up(measure, model, widths) >= 1.15 * 0.99
    if "mlp" in widths:
        larger = widths | {"mlp": widths["mlp"] + 2}
        assert true_speed_up(measure, model, larger) < 1.15


def test_a_space_that_is_not_faster_keeps_its_width(measuring):
    measuring(fake({"attention": 0.0}))
    model = build("llama-tied")
    assert set(widths_of(wish(targets=("mlp", "attention")), describe(model), model)) == {"mlp"}

    measuring(fake({"mlp": 0.0}))
    with pytest.raises(StructPruneError, match=r"speed=1.20× .* targets=\['mlp'\] do not change that"):
        widths_of(wish(), describe(model), model)


def test_a_wish_that_cannot_be_met_names_the_fastest_shape(measuring):
    measure = measuring(fake(power=1.3))
    model = build("llama-tied")
    fastest = true_speed_up(measure, model, {"mlp": 1})

    message = f"speed=5.00× cannot be met.* smallest widths of mlp the model is {fastest:.2f}× as fast. Ask for that, "
    with pytest.raises(StructPruneError, match=f"{message}or add targets: .*'attention'.*'layer' alone"):
        widths_of(wish(5), describe(model), model)


def test_speed_and_parameters_are_two_limits(measuring):
    measure = measuring(fake())
    model = build("llama-tied")
    for share in (0.75, 0.95):
        result = prune(model, wish(1.2, budget={"parameters": share, "speed": 1.2}), tokenizer())
        assert result.model.num_parameters() <= share * model.num_parameters()
        assert true_speed_up(measure, model, result.report.final_widths) >= 1.2


def test_the_report_has_the_wish_and_the_speed_up_of_the_saved_shape(measuring, tmp_path):
    measure = measuring(fake(power=1.2))
    model = build("llama-tied")
    expected = dry_run(model.config, wish()).speed
    result = prune(model, wish(), tokenizer())
    measured = result.report.speed

    assert measured.wish == 1.2
    assert measured.measured == true_speed_up(measure, model, result.report.final_widths) == expected.measured
    assert measured.use == "decode"
    assert "requested 1.20×, predicted" in str(result.report)
    assert Report.from_dict(result.report.to_dict()).speed == measured
    assert "was requested" not in str(judge(result.report))


def test_the_verdict_names_a_missed_speed(measuring):
    """The machine is slower than before when the pruned model is measured."""
    measuring(fake())
    result = prune(build("llama-tied"), wish(), tokenizer())
    result.report.speed.measured = 1.11
    result.report.speed.high = 1.15
    assert "1.11× as fast, and 1.20× was requested" in str(judge(result.report))


@pytest.mark.parametrize(("of_token", "has_fewer_tokens"), [(20.0, True), (0.0, False)])
def test_tokens_shrink_only_if_the_model_gets_faster(of_token, has_fewer_tokens, measuring):
    measure = measuring(fake({"vocab": of_token}))
    model, reader = real_text_model()
    settings = fewer_tokens(widths=None, targets=("vocab", "mlp"), budget={"speed": 1.1}, round_to=1)
    result = prune(model, settings, reader)

    shapes = [shape["widths"] for shape in result.report.shapes] + [result.report.final_widths]
    assert any("vocab" in widths for widths in shapes) == has_fewer_tokens
    for widths in shapes:
        assert true_speed_up(measure, model, widths) >= 1.1 * 0.99, widths


def test_a_wish_that_ruins_a_model_gets_a_warning_before_text_is_read(measuring):
    measuring(fake())
    with pytest.warns(UserWarning, match=r"speed=1.6 keeps \d+% of the units of 'mlp'"):
        dry_run(build("llama-tied").config, wish(1.6))


def test_impossible_wishes_are_refused():
    for fields, message in (
        ({"value": 1.0}, "greater than 1 for 'speed', got 1.0"),
        ({"allocation": "sensitivity"}, "Use allocation='uniform'"),
        ({"speed_use": "run"}, "speed_use"),
    ):
        with pytest.raises(StructPruneError, match=message):
            wish(**fields)

    for case, use, choices in (
        ("llama-tied", "encode", "'decode' or 'prompt'"),
        ("bert", "prompt", "'encode' or 'query'"),
    ):
        with pytest.raises(StructPruneError, match=f"speed_use='{use}' does not fit .* Choose {choices}"):
            dry_run(build(case).config, wish(speed_use=use))
    with pytest.raises(StructPruneError, match="is no encoder of text"):
        dry_run(build("t5").config, wish(targets=None))

    with pytest.warns(UserWarning, match="speed_use='prompt', because the budget has no 'speed'"):
        dry_run(build("llama-tied").config, StructPruneConfig(sparsity=0.2, round_to=1, speed_use="prompt"))
