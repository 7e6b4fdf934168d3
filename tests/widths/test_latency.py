"""A budget of milliseconds, by times that were measured before."""

import json

import pytest
from helpers import save_with_tokenizer
from models import build, config, three_layers, tokenizer

from optimum_structprune import StructPruneConfig, StructPruneError, dry_run, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import LAYER
from optimum_structprune.commands.cli import main
from optimum_structprune.widths.budget import widths_of
from optimum_structprune.widths.latency import Latency, Times


def times_of(arch, per_unit):
    """Times that are as large as a number for each unit of each layer says, and 10 ms beside them."""
    sizes = {kind: arch.widths(kind)[0] for kind in per_unit}
    layer = sum(size * per_unit[kind] for kind, size in sizes.items())
    dense = 10 + arch.num_layers * layer

    def at(kind, width):
        return dense - arch.num_layers * (sizes[kind] - width) * per_unit[kind]

    spaces = {kind: {width: at(kind, width) for width in {1, size // 2} - {size}} for kind, size in sizes.items()}
    times = {name: Times(dense, layer, spaces) for name in ("ms_per_token", "ms_to_first_token")}
    return Latency(arch.model_type, arch.num_layers, sizes, times, {"device": "cpu"})


@pytest.fixture
def measured(tmp_path):
    model = build("llama-tied")
    arch = describe(model)
    latency = times_of(arch, {"mlp": 0.5, "attention": 2.0})
    latency.save(tmp_path / "latency.json")
    return model, arch, latency, str(tmp_path / "latency.json")


def asking(most, file, name="ms_per_token", **fields):
    return config(sparsity=None, round_to=1, budget={name: most}, latency_file=file, **fields)


def test_what_was_saved_is_read_back(measured):
    _, _, latency, file = measured
    assert Latency.load(file) == latency


def test_times_lie_on_straight_lines_between_measured_widths_and_never_grow():
    # At a quarter the machine was disturbed: what is slower than a wider one counts as equally fast.
    times = Times(100.0, 1.0, {"mlp": {96: 90.0, 64: 70.0, 32: 75.0}})
    found = {width: round(100 - times.saved("mlp", 128, width), 6) for width in (128, 112, 96, 80, 64, 48, 32, 16)}
    assert found == {128: 100, 112: 95, 96: 90, 80: 80, 64: 70, 48: 70, 32: 70, 16: 70}
    assert Times(10.0, 0.0, {"mlp": {4: 6.0}}).saved("mlp", 8, 2) == 6.0  # the line goes on


@pytest.mark.parametrize("name", ["ms_per_token", "ms_to_first_token"])
@pytest.mark.parametrize("share", [0.95, 0.8])
def test_the_widths_are_the_largest_that_keep_to_it(measured, name, share):
    model, arch, latency, file = measured
    time = latency.gauge(name, arch)
    most = share * time({})
    widths = widths_of(asking(most, file, name), arch, model)
    assert time(widths) <= most < time({}) and widths != {}
    for kind, width in widths.items():
        assert width == arch.widths(kind)[0] or time({**widths, kind: width + 1}) > most


def test_layers_and_widths_of_single_layers_count(measured):
    _, arch, latency, _ = measured
    time, layers = latency.gauge("ms_per_token", arch), arch.num_layers
    size = arch.widths("mlp")[0]
    one = time({}) - time({"mlp": {0: size - 4}})
    assert one == pytest.approx(2.0) and time({"mlp": size - 4}) == pytest.approx(time({}) - layers * one)
    assert time({}) - time({LAYER: layers - 1}) == pytest.approx(latency.times["ms_per_token"].layer)
    # The layer that stays is narrower, and the one that is gone is not counted twice.
    assert time({LAYER: 1, "mlp": {0: size - 4}}) == pytest.approx(time({LAYER: 1}) - one)


def test_a_space_that_takes_no_time_stays_as_it_is(tmp_path):
    model = build("llama-tied")
    arch = describe(model)
    times_of(arch, {"mlp": 0.5, "attention": 0.0}).save(tmp_path / "latency.json")
    dense = Latency.load(tmp_path / "latency.json").times["ms_per_token"].dense
    widths = widths_of(asking(0.9 * dense, str(tmp_path / "latency.json")), arch, model)
    assert [*widths] == ["mlp"]
    with pytest.raises(StructPruneError, match="leave that as it is"):
        widths_of(asking(0.9 * dense, str(tmp_path / "latency.json"), targets=("attention",)), arch, model)


@pytest.mark.parametrize("allocation", ["uniform", "search", "search_uniform"])
def test_a_pruned_model_keeps_to_it(measured, allocation):
    model, arch, latency, file = measured
    time = latency.gauge("ms_per_token", arch)
    most = 0.85 * time({})
    pruned = prune_model(model, asking(most, file, allocation=allocation), tokenizer())
    small = describe(pruned)
    widths = {kind: small.widths(kind) for kind in latency.sizes}
    assert time({LAYER: small.num_layers, **widths}) <= most


def test_the_command_line_and_a_dry_run_read_it_too(measured, tmp_path, capsys):
    model, arch, latency, file = measured
    save_with_tokenizer(model, tmp_path / "model")
    most = 0.9 * latency.times["ms_per_token"].dense
    line = ["plan", str(tmp_path / "model"), "--budget", f"ms_per_token={most}", "--latency-file", file, "--json"]
    assert main([*line, "--round-to", "1", "--quiet"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["widths"] == widths_of(asking(most, file), arch, model)
    assert dry_run(model.config, asking(most, file)).widths == shown["widths"]


def test_an_unfit_file_or_wish_is_told_of(measured, tmp_path):
    model, arch, latency, file = measured
    with pytest.raises(StructPruneError, match="`structprune latency MODEL FILE`"):
        StructPruneConfig(budget={"ms_per_token": 5})
    dense = latency.times["ms_per_token"].dense
    with pytest.raises(StructPruneError, match=r"met by the dense model, which has \d+\.?\d*;"):
        widths_of(asking(dense + 1, file), arch, model)
    with pytest.raises(StructPruneError, match=r"cannot be met: .* still has \d+\.?\d* of"):
        widths_of(asking(1, file), arch, model)
    with pytest.raises(StructPruneError, match="measured on a llama model of .* layers"):
        other = three_layers()
        widths_of(asking(dense / 2, file), describe(other), other)
    spoilt = json.loads((tmp_path / "latency.json").read_text())
    for change in ({"times": {}}, {"sizes": {"mlp": 4}}, {"layers": None}, {"format_version": 9}):
        (tmp_path / "spoilt.json").write_text(json.dumps({**spoilt, **change}))
        with pytest.raises(StructPruneError, match=r"holds no measured times|format_version 9"):
            Latency.load(tmp_path / "spoilt.json")
    with pytest.raises(StructPruneError, match="cannot be read"):
        Latency.load(tmp_path / "nowhere.json")


def test_a_file_that_no_budget_asks_for_is_warned_of(measured):
    model, _, _, file = measured
    with pytest.warns(UserWarning, match="latency_file=.*no budget is a time"):
        prune_model(model, config(sparsity=0.2, latency_file=file), tokenizer())
