"""The dry run says what pruning then gives, and refuses what pruning refuses."""

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


LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False}
LLAMA_70B |= {"dtype": "bfloat16", "head_dim": 128, "vocab_size": 128256}


@pytest.mark.parametrize(("case", "fields"), [
    ("llama-tied", {"refit": "none", "widths": {"mlp": 17, "attention": 1}}),
    ("llama-tied", {"widths": {"mlp": 24}, "skip_layers": (1,)}),
    ("llama-tied", {"sparsity": 0.1, "round_to": 64}),
    ("gemma2", {"sparsity": 0.35, "round_to": 8}),
    ("mixtral", {"sparsity": 0.3, "round_to": 8}),
    ("bert", {"sparsity": 0.3, "targets": ("mlp",)}),
])  # fmt: skip
def test_it_says_what_pruning_gives(case, fields):
    """With widths for every family: `test_end_to_end.py`."""
    model, wish = build(case), config(**fields)
    assert_as_said(dry_run(config_of(model), wish), model, prune_model(model, wish, tokenizer()))


def test_layers_that_differ():
    model = build("llama-tied")
    outcome = dry_run(config_of(model), config(widths={"mlp": 24}, skip_layers=(1,)))
    assert "once optimum_structprune has been imported" in outcome.reload[0] and len(outcome.reload) == 3
    assert "24-40" in str(outcome)
    wish = config(sparsity=0.3, allocation="sensitivity", targets=("mlp", "attention"), round_to=1)
    outcome = dry_run(config_of(model), wish)
    small = prune_model(model, wish, tokenizer())
    step = max(space.unit_params for space in describe(model).spaces)
    assert abs(outcome.parameters.after - small.num_parameters()) <= step
    assert "calibration chooses the widths" in str(outcome)


@pytest.mark.slow
def test_a_model_of_70_billion_parameters_takes_seconds(tmp_path, capsys):
    model_config, parameters = LlamaConfig(**LLAMA_70B), 70_553_706_496
    model_config.save_pretrained(tmp_path / "model")
    start = time.process_time()
    command = ["plan", str(tmp_path / "model"), "--sparsity", "0.3", "--target", "mlp", "--round-to", "128", "--cost"]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    assert time.process_time() - start < 60
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["parameters"]["before"] == parameters and f"{parameters:,}" in shown
    assert found["memory"] == {when: 2 * count for when, count in found["parameters"].items()}
    assert found["cache_per_token"] == {"before": 2 * 80 * 2 * 8 * 128, "after": 2 * 80 * 2 * 8 * 128}
    removed = 80 * 3 * 8192 * (model_config.intermediate_size - found["widths"]["mlp"])
    assert found["parameters"]["after"] == parameters - removed
    assert found["sparsity"] == removed / found["layer_parameters"]["before"] == pytest.approx(0.3, abs=0.003)
    assert found["need"]["weights"] >= 2 * parameters


def test_dtype_and_choices(tmp_path, capsys):
    build("llama-tied").save_pretrained(tmp_path)
    for dtype, size in (("auto", 4), ("bfloat16", 2)):
        arguments = ["plan", str(tmp_path), "--width", "attention=2", "--dtype", dtype, "--json"]
        assert main([*arguments, str(tmp_path / f"{dtype}.json")]) == 0
        found = json.loads((tmp_path / f"{dtype}.json").read_text())
        assert found["memory"]["after"] == size * found["parameters"]["after"]
        assert found["cache_per_token"] == {"before": size * 2 * 2 * 16, "after": size * 2 * 2 * 8}
    assert found["spaces"] == [{"before": 4, "after": 2, "name": "attention"}]
    assert "width attention" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--width", "attention=2", "--cost", "--offload", "disk"]) == 0
    text = capsys.readouterr().out
    assert "on the device" in text and "in CPU memory" in text


def test_a_quantized_model_is_counted_unpacked_and_the_callers_config_is_left_alone():
    plain, packed = config_of(build("llama-tied")), config_of(build("llama-tied"))
    packed.quantization_config = {"quant_method": "gptq", "bits": 4}
    before = deepcopy(plain.to_dict())
    ours, theirs = (dry_run(one, config()) for one in (packed, plain))
    assert ours.memory == theirs.memory and "sizes are after unpacking" in str(ours) and theirs.notes == ()
    assert plain.to_dict() == before and plain._attn_implementation != "eager"


def test_grams_of_experts_stay_small():
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 32}
    config = Qwen3MoeConfig(**sizes, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, dtype="bfloat16")
    settings = StructPruneConfig(sparsity=0.3)
    dense = Qwen2Config(**{**sizes, "intermediate_size": 128 * 768}, num_key_value_heads=4, dtype="bfloat16")
    experts, whole = (dry_run(model, settings, cost=True) for model in (config, dense))
    assert experts.need.working < whole.need.working / 20
    assert whole.need.weights == whole.memory.before and whole.dtype == "bfloat16"
    dense.dtype = "float32"
    assert dry_run(dense, settings, cost=True).need.weights == 2 * whole.need.weights


def test_it_refuses_the_numbers_of_tokens_and_the_tokenizers_that_pruning_refuses(tmp_path, capsys):
    model, reader = real_text_model()
    save_with_tokenizer(model, tmp_path / "model", reader)
    model.save_pretrained(tmp_path / "alone")
    save_with_tokenizer(build("llama-tied"), tmp_path / "words", tokenizer())
    for name, width, expected in (
        ("model", "vocab=3", "vocab=3 is not possible for this model"),
        ("words", "vocab=50", "The tokenizer is of the kind WordLevel"),
    ):
        errors = set()
        for command in (["plan", str(tmp_path / name)], ["prune", str(tmp_path / name), str(tmp_path / "out")]):
            assert main([*command, "--width", width, "--seq-length", "48", "--quiet"]) == 2
            errors.add(error_line(capsys))
        assert len(errors) == 1 and expected in errors.pop()
    assert main(["plan", str(tmp_path / "model"), "--width", "vocab=390"]) == 0
    assert main(["plan", str(tmp_path / "alone"), "--width", "vocab=3"]) == 0, "a config alone has no tokenizer"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"suppress_tokens": [*range(200, 400)]}, "vocab=350 is not possible for this model"),
        ({"temperature": 0.5, "do_sample": False, "num_beams": 1, "early_stopping": "x"}, "generation config"),
    ],
)
def test_it_reads_the_generation_config_that_pruning_reads(tmp_path, capsys, fields, expected):
    """Tokens that it names always stay."""
    model, reader = real_text_model()
    save_with_tokenizer(model, tmp_path / "model", reader)
    write = ["--width", "vocab=350", "--seq-length", "48", "--quiet"]
    assert main(["plan", str(tmp_path / "model"), *write]) == 0

    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(fields))
    capsys.readouterr()
    errors = set()
    for command in (["plan", str(tmp_path / "model")], ["prune", str(tmp_path / "model"), str(tmp_path / "out")]):
        assert main([*command, *write]) == 2
        errors.add(error_line(capsys))
    assert len(errors) == 1 and expected in errors.pop()


def test_buffers_that_are_saved_count_as_bytes():
    model = build("bart")
    outcome = dry_run(config_of(model), config(widths={"vocab": model.config.vocab_size - 10}))
    assert outcome.memory.before == model_bytes(model) == 4 * (model.num_parameters() + model.config.vocab_size)
    assert outcome.memory.after == 4 * (outcome.parameters.after + model.config.vocab_size - 10)
