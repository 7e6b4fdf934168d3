"""The recipe of docs/serving.md that quantises a pruned model by GPTQ runs; see `make llm-compressor`."""

import re
import subprocess
from pathlib import Path

import pytest
from helpers import without_refit
from models import documents, real_text_model

from optimum_structprune import Plan


ROOT = Path(__file__).parents[1]
PYTHON = ROOT / "build" / "llm-compressor" / "bin" / "python"
CHECK = """
import torch

inputs = tokenizer("One and one is two", return_tensors="pt")
whole, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("smollm2-32", "smollm2-4"))
whole, first, second = (model(**inputs).logits for model in (whole, model, again))
assert torch.equal(first, second) and again.config.is_heterogeneous
error = (first - whole).norm() / whole.norm()
assert 0 < error < 0.2, error
"""


@pytest.mark.nightly
@pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make llm-compressor` makes it")
def test_layers_that_differ(tmp_path):
    model, tokenizer = real_text_model()
    keep = {(layer, "mlp"): tuple(range(width)) for layer, width in enumerate((512, 1024))}
    without_refit(model, Plan("llama", keep)).save_pretrained(tmp_path / "smollm2-32")
    tokenizer.save_pretrained(tmp_path / "smollm2-32")
    (tmp_path / "calibration.txt").write_text("\n".join(documents(40)))
    (recipe,) = re.findall(r"^```python3\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S)
    done = subprocess.run([PYTHON, "-c", recipe + CHECK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [(tmp_path / f"smollm2-{bits}" / "model.safetensors").stat().st_size for bits in (32, 4)]
    assert sizes[1] < 0.4 * sizes[0]
