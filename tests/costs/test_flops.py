"""Counted operations and bytes are those of a run."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_structprune import GatesConfig, StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.costs.flops import flops, traffic
from optimum_structprune.costs.machines import MACHINES, estimate
from optimum_structprune.costs.workload import workload
from optimum_structprune.widths.budget import widths_of


ATEN = torch.ops.aten
WIDTHS = {"mlp": 128, "attention": 1}


def factor(matrix, *rest, **more):
    return matrix[-1] ** 3 / 3


def triangular(matrix, right, *rest, **more):
    return torch.Size(right).numel() * matrix[-1]


def solved(right, matrix, *rest, **more):
    return 2 * matrix[-1] ** 2 * right[-1]


def attention(query, key, *rest, **more):
    return 4 * torch.Size(query).numel() * key[-2]


# What torch's counter does not know.
MORE = {
    ATEN.linalg_cholesky_ex: factor,
    ATEN.linalg_solve_triangular: triangular,
    ATEN.cholesky_solve: solved,
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, intermediate_size=256, **sizes)).eval()


def work_of(model, config, inputs, itemsize=4):
    return workload(config, describe(model), model, config.widths, itemsize, inputs)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rounds": 2},
        {"error_feedback": 0},
        {"criterion": "wanda", "refit": "none"},
        {"criterion": "pip", "refit": "none"},
        {"criterion": "ddp", "refit": "none", "gates": GatesConfig(steps=9, tokens_per_step=256)},
        {"criterion": "slimllm", "refit": "slope"},
    ],
)
def test_operations_are_those_that_torch_counts(fields):
    model, inputs = llama(), {name: torch.randint(256, (18, 64)) for name in "ab"}
    config = StructPruneConfig(widths=WIDTHS, num_samples=32, seq_length=64, **fields)
    expected = flops(work_of(model, config, inputs))
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        StructPruner(config).prune_model(model, inputs=inputs, inplace=True)
    assert expected.total == pytest.approx(counter.get_total_flops(), rel=0.25)
    counted = counter.get_flop_counts()["Global"]
    linear = sum(counted.get(name, 0) for name in (ATEN.linalg_cholesky_ex, ATEN.linalg_solve_triangular))
    if expected.scoring:
        assert 0 < linear < 2 * (expected.scoring + expected.refit)
    else:
        assert expected.refit == linear == 0


@pytest.mark.parametrize("allocation", ["global", "cosine", "sensitivity", "search", "search_uniform"])
def test_what_chooses_the_widths_is_counted(allocation):
    """The shapes that are pruned on trial are counted at their most, so for them the count is taken from the run."""
    model, inputs = llama(), {name: torch.randint(256, (24, 64)) for name in "ab"}
    config = StructPruneConfig(
        sparsity=0.3, targets=("mlp", "attention"), allocation=allocation, num_samples=32, seq_length=64, round_to=16
    )
    arch = describe(model)
    work = workload(config, arch, model, widths_of(config, arch, model), 4, inputs)
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        (pruner := StructPruner(config)).prune_model(model, inputs=inputs, inplace=True)
    finals = len(pruner.report.shapes)
    assert finals <= work.choosing.finals
    expected = flops(replace(work, choosing=replace(work.choosing, finals=finals)))
    print(
        allocation, finals, expected.total / counter.get_total_flops(), flops(work).total / counter.get_total_flops()
    )
    # A space that a shape leaves whole is not gathered, so the count is too high: measured by 26 % at most.
    assert 0.75 < expected.total / counter.get_total_flops() < 1.3


def test_bytes_written_are_those_of_the_files(tmp_path):
    model, inputs = llama(), {"a": torch.randint(256, (18, 64))}
    config = StructPruneConfig(widths=WIDTHS, num_samples=16, seq_length=64, checkpoint_dir=str(tmp_path / "progress"))
    work = work_of(model, config, inputs)
    pruner = StructPruner(config)
    pruner.save(pruner.prune_model(model, inputs=inputs, inplace=True), tmp_path / "out")
    output = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert traffic(work).written == pytest.approx(output, rel=0.05)
    layers = sum(path.stat().st_size for path in (tmp_path / "progress").glob("layer-*.safetensors"))
    passes = sum(path.stat().st_size for path in (tmp_path / "progress").glob("passes-*.safetensors"))
    # The states of the samples are written anew after each of three layers.
    written = traffic(work, checkpoint=True).written
    assert written == pytest.approx(output + layers + 3 * passes, rel=0.05)


def test_layers_are_streamed_as_often_as_they_are_read():
    inputs = {"a": torch.zeros(18, 64)}
    config = StructPruneConfig(widths=WIDTHS, num_samples=16, seq_length=64)
    work = work_of(llama(), config, inputs)
    one, away = traffic(work), traffic(work, "disk")
    inside = work.weights - work.itemsize * work.outside
    assert one.read == work.weights + work.result and one.copied == one.summed == 0
    assert away.read - one.read > 4 * inside and away.copied > away.read - one.read - inside
    assert traffic(work, "cpu").read == one.read and traffic(work, processes=2).summed > 0


def test_a_machine_offloads_only_where_it_has_to():
    config = StructPruneConfig(widths=WIDTHS, num_samples=16, seq_length=64)
    work = work_of(llama(), config, {"a": torch.zeros(18, 64)})
    one, large, eight, nodes = (estimate(work, machine) for machine in MACHINES)
    assert all(found.fits and found.offload is None for found in (one, large, eight, nodes))
    assert large.compute > eight.compute > nodes.compute and eight.moving < nodes.moving
    asked = estimate(work, MACHINES[0], "disk")
    assert asked.offload == "disk" and asked.moving > one.moving and asked.compute == one.compute
