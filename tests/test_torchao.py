"""The recipe of docs/serving.md that quantises a pruned model with torchao, which `make torchao` installs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import real_text_model
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "torchao"
CHECK = """
import optimum_structprune

inputs = tokenizer("One and one is two", return_tensors="pt")
again = AutoModelForCausalLM.from_pretrained("smollm2-8")
whole, first, second = (model(**inputs).logits for model in (pruned, small, again))
assert torch.equal(first, second) and again.config.is_heterogeneous
error = (first - whole).norm() / whole.norm()
assert 0 < error < 0.05, error
"""


@pytest.mark.nightly
@pytest.mark.skipif(not (FOLDER / "torchao").is_dir(), reason=f"no torchao in {FOLDER}; `make torchao` installs it")
def test_the_recipe_prunes_quantises_saves_and_loads(tmp_path):
    for saved in real_text_model():
        saved.save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (recipe,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S)
    paths = os.pathsep.join(filter(None, (str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", recipe + CHECK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, small = (load_file(tmp_path / f"smollm2-{bits}" / "model.safetensors") for bits in (32, 8))
    assert sum(map(_size, small.values())) < 0.6 * sum(map(_size, whole.values()))


def _size(tensor) -> int:
    return tensor.numel() * tensor.element_size()
