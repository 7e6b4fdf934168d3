"""The recipes of docs/serving.md that quantise a pruned model run; see `make torchao` and `make llm-compressor`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import without_refit
from models import documents, real_text_model

from optimum_structprune import Plan


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()
TORCHAO, GPTQ = ROOT / "build" / "torchao", ROOT / "build" / "llm-compressor" / "bin" / "python"
# It follows a recipe, whose quantised model has this name in it.
CHECK = """
inputs = tokenizer("One and one is two", return_tensors="pt")
whole, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("smollm2-32", "smollm2-{bits}"))
whole, first, second = (each(**inputs).logits for each in (whole, {name}, again))
assert torch.equal(first, second) and again.config.is_heterogeneous
error = (first - whole).norm() / whole.norm()
assert 0 < error < {most}, error
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("language", "needs", "python", "bits", "name", "most"), [
    ("py", TORCHAO / "torchao", sys.executable, 8, "small", 0.05), ("python3", GPTQ, GPTQ, 4, "model", 0.2),
], ids=["torchao", "GPTQ"])  # fmt: skip
def test_layers_that_differ(language, needs, python, bits, name, most, tmp_path):
    if not needs.exists():
        pytest.skip(f"there is no {needs}")
    model, tokenizer = real_text_model()
    keep = {(layer, "mlp"): tuple(range(width)) for layer, width in enumerate((512, 1024))}
    small = without_refit(model, Plan("llama", keep))
    for saved, folder in ((model, "HuggingFaceTB/SmolLM2-135M-Instruct"), (small, "smollm2-32")):
        saved.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "calibration.txt").write_text("\n".join(documents(40)))
    (recipe,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    script = f"import torch\n{recipe}{CHECK.format(bits=bits, name=name, most=most)}"
    paths = [str(TORCHAO), str(ROOT), os.environ.get("PYTHONPATH")] if bits == 8 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([python, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [(tmp_path / f"smollm2-{size}" / "model.safetensors").stat().st_size for size in (32, bits)]
    assert sizes[1] < {8: 0.6, 4: 0.4}[bits] * sizes[0]
