"""Times of a model at several widths."""

import json
from copy import deepcopy

import pytest
import torch
from helpers import save_with_tokenizer
from models import build
from transformers import LlamaForCausalLM

from optimum_structprune import StructPruneError
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import LAYER
from optimum_structprune.commands.cli import main
from optimum_structprune.evaluation.latency import measure_latency, measured_widths, smaller_model
from optimum_structprune.widths.latency import Latency


SHORT = {"prompt": 6, "new_tokens": 2, "repeats": 1, "threads": 1}
FLAGS = ["--prompt", "6", "--new-tokens", "2", "--repeats", "1", "--threads", "1", "--device", "cpu", "--quiet"]


def test_the_widths_that_are_measured():
    assert measured_widths([*range(1, 1537)], 1536) == [1152, 768, 384]
    assert measured_widths([1, 2, 3], 3) == [2, 1]
    assert measured_widths([4], 4) == []


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "gpt2-tied", "gemma2"])
def test_a_smaller_model_has_the_widths_and_runs(case):
    model = build(case).to(torch.bfloat16)
    arch = describe(model)
    for widths in ({"mlp": arch.widths("mlp")[0] // 2}, {LAYER: arch.num_layers // 2}):
        small = smaller_model(model, arch, widths)
        found = describe(small)
        assert (widths.get(LAYER, arch.num_layers), small.dtype) == (found.num_layers, torch.bfloat16)
        assert found.widths("mlp")[0] == widths.get("mlp", arch.widths("mlp")[0])
        assert torch.isfinite(small(torch.tensor([[1, 2, 3]])).logits).all()


def test_what_is_measured_says_which_model_and_how():
    model = build("llama-tied")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    latency, arch = measure_latency(model, **SHORT), describe(model)
    assert (latency.model_type, latency.layers) == ("llama", arch.num_layers)
    assert latency.sizes == {kind: arch.widths(kind)[0] for kind in ("mlp", "attention")}
    assert {name: latency.how[name] for name in SHORT} == SHORT and latency.how["dtype"] == "float32"
    for times in latency.times.values():
        assert times.dense > 0 and all(ms > 0 for by_width in times.spaces.values() for ms in by_width.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_of_a_wide_model_takes_less_time():
    # Wide enough for the matrices to be most of the time.
    wide = deepcopy(build("llama-tied").config)
    wide.intermediate_size = 16384
    model = LlamaForCausalLM(wide).eval()
    latency = measure_latency(model, targets=["mlp"], prompt=32, new_tokens=2, repeats=3, threads=1, clock="cpu")
    times = latency.times["ms_to_first_token"]
    assert min(times.spaces["mlp"]) == 4096 and times.spaces["mlp"][4096] < times.dense
    assert latency.gauge("ms_to_first_token", describe(model))({"mlp": 4096}) < times.dense


def test_the_command_writes_a_file_and_replaces_only_such_files(tmp_path, capsys):
    save_with_tokenizer(build("llama-tied"), tmp_path / "model")
    line = ["latency", str(tmp_path / "model"), str(tmp_path / "times.json"), *FLAGS]
    assert main(line) == 0 and "a layer less" in capsys.readouterr().out
    assert main([*line, "--target", "mlp", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [*shown["sizes"]] == ["mlp"] == [*Latency.load(tmp_path / "times.json").sizes]
    (tmp_path / "times.json").write_text("{}")
    assert main(line) == 2 and "holds no measured times" in capsys.readouterr().err
    assert (tmp_path / "times.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "mpl"], "mpl"),
        (["--target", "experts"], "experts"),
        (["--prompt", "100"], "positions"),
        (["--clock", "sun"], "There is no clock 'sun'"),
        (["--repeats", "0"], "repeats has to be 1 or more, got 0"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(tmp_path, flags, message, capsys):
    save_with_tokenizer(build("llama-tied"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main(["latency", str(tmp_path / "model"), str(tmp_path / "times.json"), *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "times.json").exists()
    assert main(["latency", str(tmp_path / "model"), str(tmp_path / "no" / "times.json"), *FLAGS]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_experts_are_refused():
    with pytest.raises(StructPruneError, match="none in experts"):
        measure_latency(build("mixtral"), targets=["mlp"], **SHORT)
