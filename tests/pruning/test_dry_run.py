"""A dry run predicts the result of pruning, and refuses the same requests."""

import json
import time
from copy import deepcopy

import pytest
from helpers import assert_as_said, config_of, error_line, save_with_tokenizer
from models import build, config, real_text_model, tokenizer
from transformers import LlamaConfig, Qwen2Config, Qwen3MoeConfig

from optimum_structprune import StructPruneConfig, dry_run, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.commands.cli import main
from optimum_structprune.system.stages import model_bytes


LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(("case", "fields"), [
    ("llama-tied", {"refit": "none", "widths": {"mlp": 17, "attention": 1}}),
    ("llama-tied", {"widths": {"mlp": 24}, "skip_layers": (1,)}),
    ("llama-tied", {"sparsity": 0.1, "round_to": 64}),
    ("gemma2", {"sparsity": 0.35, "round_to": 8}),
    ("mixtral", {"sparsity": 0.3, "round_to": 8}),
    ("bert", {"sparsity": 0.3, "targets": ("mlp",)}),
])  # fmt: skip
def test_a_dry_run_predicts_widths_and_sizes(case, fields):
    """`test_end_to_end.py` checks every family."""
    model = build(case)
    settings = config(**fields)
    outcome = dry_run(config_of(model), settings)
    assert_as_said(outcome, model, prune_model(model, settings, tokenizer()))


def test_layers_of_different_widths():
    model = build("llama-tied")
    outcome = dry_run(config_of(model), config(widths={"mlp": 24}, skip_layers=(1,)))

    assert "once optimum_structprune has been imported" in outcome.reload[0]
    assert len(outcome.reload) == 3
    assert "24-40" in str(outcome)


def test_an_allocation_by_sensitivity_leaves_the_widths_open():
    model = build("llama-tied")
    settings = config(sparsity=0.3, allocation="sensitivity", targets=("mlp", "attention"), round_to=1)
    outcome = dry_run(config_of(model), settings)
    small = prune_model(model, settings, tokenizer())

    step = max(space.unit_params for space in describe(model).spaces)
    assert abs(outcome.parameters.after - small.num_parameters()) <= step
    assert "calibration chooses the widths" in str(outcome)


@pytest.mark.slow
def test_a_model_of_70_billion_parameters_takes_seconds(tmp_path, capsys):
    LlamaConfig(**LLAMA_70B).save_pretrained(tmp_path / "model")
    start = time.process_time()
    command = ["plan", str(tmp_path / "model"), "--sparsity", "0.3", "--target", "mlp", "--round-to", "128", "--cost"]
    assert main(command + ["--json", str(tmp_path / "out.json")]) == 0
    assert time.process_time() - start < 60

    parameters = 70_553_706_496
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["parameters"]["before"] == parameters
    assert f"{parameters:,}" in capsys.readouterr().out
    removed = 80 * 3 * 8192 * (LLAMA_70B["intermediate_size"] - values["widths"]["mlp"])
    assert values["parameters"]["after"] == parameters - removed
    assert values["sparsity"] == removed / values["layer_parameters"]["before"] == pytest.approx(0.3, abs=0.003)

    assert values["memory"] == {when: 2 * count for when, count in values["parameters"].items()}
    assert values["cache_per_token"] == {"before": 2 * 80 * 2 * 8 * 128, "after": 2 * 80 * 2 * 8 * 128}
    assert values["cost"]["memory"]["weights"] >= 2 * parameters


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("bfloat16", 2)])
def test_the_dtype_sets_the_bytes(dtype, size, tmp_path, capsys):
    build("llama-tied").save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--width", "attention=2", "--dtype", dtype]
    assert main(command + ["--json", str(tmp_path / "out.json")]) == 0

    values = json.loads((tmp_path / "out.json").read_text())
    assert values["memory"]["after"] == size * values["parameters"]["after"]
    assert values["cache_per_token"] == {"before": size * 2 * 2 * 16, "after": size * 2 * 2 * 8}
    assert values["spaces"] == [{"before": 4, "after": 2, "name": "attention"}]
    assert "width attention" in capsys.readouterr().out


def test_the_cost_of_offloading_is_on_the_device_and_in_cpu_memory(tmp_path, capsys):
    build("llama-tied").save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--width", "attention=2", "--cost", "--offload", "disk"]) == 0

    output = capsys.readouterr().out
    assert "memory on the device" in output
    assert "in CPU memory" in output


def test_a_quantized_model_is_counted_after_unpacking():
    plain = config_of(build("llama-tied"))
    packed = config_of(build("llama-tied"))
    packed.quantization_config = {"quant_method": "gptq", "bits": 4}

    plain_outcome = dry_run(plain, config())
    packed_outcome = dry_run(packed, config())
    assert packed_outcome.memory == plain_outcome.memory
    assert "sizes are after unpacking" in str(packed_outcome)
    assert plain_outcome.notes == ()


def test_a_dry_run_does_not_change_the_config():
    model_config = config_of(build("llama-tied"))
    original = deepcopy(model_config.to_dict())
    dry_run(model_config, config())

    assert model_config.to_dict() == original
    assert model_config._attn_implementation != "eager"


def test_gram_matrices_of_experts_need_less_memory_than_those_of_one_wide_ffn():
    sizes = {"hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes["dtype"] = "bfloat16"
    experts = Qwen3MoeConfig(**sizes, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    wide = Qwen2Config(**sizes, intermediate_size=128 * 768)
    settings = StructPruneConfig(sparsity=0.3)
    experts_outcome = dry_run(experts, settings, cost=True)
    wide_outcome = dry_run(wide, settings, cost=True)

    assert experts_outcome.cost.memory["working memory"] < wide_outcome.cost.memory["working memory"] / 20
    assert wide_outcome.cost.memory["weights"] == wide_outcome.memory.before
    assert wide_outcome.dtype == "bfloat16"
    wide.dtype = "float32"
    assert dry_run(wide, settings, cost=True).cost.memory["weights"] == 2 * wide_outcome.cost.memory["weights"]


def shared_error(folder, flags, capsys):
    """Return the error of `plan` and `prune`, which both have to fail with it."""
    capsys.readouterr()
    assert main(["plan", str(folder)] + flags) == 2
    error = error_line(capsys)
    out = folder.with_name("out")
    assert main(["prune", str(folder), str(out)] + flags) == 2
    assert error_line(capsys) == error
    return error


def test_plan_and_prune_refuse_the_same_vocabularies(tmp_path, capsys):
    model, reader = real_text_model()
    save_with_tokenizer(model, tmp_path / "model", reader)
    model.save_pretrained(tmp_path / "no-tokenizer")
    save_with_tokenizer(build("llama-tied"), tmp_path / "words", tokenizer())

    for name, width, expected in (
        ("model", "vocab=3", "vocab=3 is not possible for this model"),
        ("words", "vocab=50", "The tokenizer is of the kind WordLevel"),
    ):
        flags = ["--width", width, "--seq-length", "48", "--quiet"]
        assert expected in shared_error(tmp_path / name, flags, capsys)

    assert main(["plan", str(tmp_path / "model"), "--width", "vocab=390"]) == 0
    assert main(["plan", str(tmp_path / "no-tokenizer"), "--width", "vocab=3"]) == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"suppress_tokens": list(range(200, 400))}, "vocab=350 is not possible for this model"),
        ({"temperature": 0.5, "do_sample": False, "num_beams": 1, "early_stopping": "x"}, "generation config"),
    ],
)
def test_plan_and_prune_refuse_the_same_generation_configs(tmp_path, capsys, fields, expected):
    """Vocabulary trimming keeps all tokens in the generation config."""
    model, reader = real_text_model()
    save_with_tokenizer(model, tmp_path / "model", reader)
    flags = ["--width", "vocab=350", "--seq-length", "48", "--quiet"]
    assert main(["plan", str(tmp_path / "model"), *flags]) == 0

    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(fields))
    assert expected in shared_error(tmp_path / "model", flags, capsys)


def test_sizes_that_depend_on_the_text_are_approximate():
    model, reader = real_text_model()
    fields = {"widths": None, "budget": {"parameters": 0.8}, "seq_length": 48}
    exact = dry_run(config_of(model), config(targets=("mlp",), **fields), tokenizer=reader)
    approximate = dry_run(config_of(model), config(targets=("vocab", "mlp"), **fields), tokenizer=reader)

    assert "after" in str(exact).splitlines()[0]
    assert "about" in str(approximate).splitlines()[0]
    assert "so all sizes after pruning are approximate" in str(approximate)
    assert approximate.to_dict()["depends_on_text"]
    assert not exact.to_dict()["depends_on_text"]


def test_saved_buffers_count_as_bytes():
    """BART saves a buffer with one number for each token."""
    model = build("bart")
    vocab_size = model.config.vocab_size
    outcome = dry_run(config_of(model), config(widths={"vocab": vocab_size - 10}))

    assert outcome.memory.before == model_bytes(model) == 4 * (model.num_parameters() + vocab_size)
    assert outcome.memory.after == 4 * (outcome.parameters.after + vocab_size - 10)
