"""The snippets in docs/extending.md work as a third-party package on the command line and in Python."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import put_into, ran, save_desk
from models import build
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneConfig


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "my-pruning"
version = "1.0"

[tool.hatch.build.targets.wheel]
include = ["my_pruning.py"]

"""


@pytest.mark.slow
def test_a_third_partys_criterion_on_the_command_line(tmp_path):
    source = tmp_path / "source"
    installed = tmp_path / "target"
    entry_points = re.search(r"^```toml\n(.*?)^```", PAGE, re.M | re.S)[1]
    put_into(source, {"my_pruning.py": "\n\n".join(CODE), "pyproject.toml": PROJECT + entry_points})
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", installed]
    ran([sys.executable, "-m", "pip", "install", *options, source], timeout=120)

    save_desk(tmp_path)
    (tmp_path / "run.yaml").write_text("num_samples: 6\nseq_length: 24\n")
    command = [Path(sys.executable).parent / "structprune", "prune", "model", "out", "--device", "cpu"]
    command += ["--config", "run.yaml", "--criterion", "redundancy", "--width", "mlp=24", "--domain", "a=a.jsonl"]
    paths = os.pathsep.join([str(installed), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    output = ran(command, cwd=tmp_path, env=environment, timeout=180)

    assert "\na " in output
    assert "from_pretrained" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24
    assert json.loads((tmp_path / "out" / "structprune_config.json").read_text())["criterion"] == "redundancy"


def test_the_pruner_of_the_page_stops_early_and_saves_an_ordinary_model(tmp_path):
    namespace = {}
    exec(CODE[1], namespace)
    perplexities = iter([10.0, 15.0, 30.0, 30.0])
    namespace["perplexity"] = lambda model, samples: next(perplexities)
    config = StructPruneConfig(widths={"mlp": 24}, num_samples=6, seq_length=24)
    pruner = namespace["Careful"](config)
    pruned = pruner.prune_model(build("llama-tied"), inputs={"a": torch.randint(64, (8, 24))})

    # It stops after two of four geometric steps from 40 to 24.
    assert pruned.config.intermediate_size == pruner.result.report.widths["mlp"][0] == 31
    assert pruner.result.report.domains["a"].perplexity.pruned > 0

    pruner.save(pruned, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 31
