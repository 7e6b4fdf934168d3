"""The benchmark of a GPU runs with one command and writes all figures into one file."""

import json

import pytest
from gpu.simulator import simulated_gpus
from helpers import main_of
from models import real_text_model


STAGES = ["load", "prune", "save", "load original", "recover", "save recovered", "evaluate", "speed"]
SMALL = "--num-samples 8 --seq-length 32 --tokens 1024 --eval-samples 2 --prompt 8 --new-tokens 2 --repeats 1"


@pytest.mark.nightly
def test_every_stage_of_every_model_is_measured(tmp_path):
    model, reader = real_text_model()
    model.save_pretrained(tmp_path / "model")
    reader.save_pretrained(tmp_path / "model")
    command = [str(tmp_path / "model"), str(tmp_path / "none"), "--output", str(tmp_path / "gpu.json")]
    command += SMALL.split()
    command += ["--batch-sizes", "1", "2"]
    with simulated_gpus():
        assert main_of("benchmark_gpu")(command) == 1
    record = json.loads((tmp_path / "gpu.json").read_text())

    assert record["same_as_cpu"]["other_units"] == 0
    assert record["same_as_cpu"]["largest_difference"] < 1e-3
    assert record["device"] == {"name": "Simulated GPU", "total_bytes": record["device"]["total_bytes"]}
    assert record["versions"]["torch"]
    assert record["versions"]["transformers"]

    model, missing = record["models"]
    assert "error" not in model, model["error"]
    assert list(model["stages"]) == STAGES
    for figures in model["stages"].values():
        assert figures["seconds"] > 0
        assert figures["peak_bytes"] > 0

    assert model["parameters"]["pruned"] < model["parameters"]["original"]
    assert model["recovery"]["tokens"] == 1_024
    assert {"original", "pruned"} <= set(model["evaluation"]["perplexity"])
    assert len(model["speed"]["decode"]) == 2

    assert list(missing["stages"]) == ["load"]
    assert "none" in missing["error"]


def test_a_machine_without_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        main_of("benchmark_gpu")([])
    assert "There is no GPU here." in capsys.readouterr().err
