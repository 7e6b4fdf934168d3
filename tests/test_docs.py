"""Every snippet in the README and the docs runs, and every command in them has valid flags."""

import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import fields
from functools import cache
from io import StringIO
from itertools import islice, pairwise
from pathlib import Path
from runpy import run_path
from shutil import copytree

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import save_with_tokenizer, with_long, write_texts
from models import GROUPED, PLAIN, TOKENS, real_text_model
from optimum.commands.optimum_cli import main as optimum_main
from torch.distributed.run import get_args_parser
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import optimum_structprune
from optimum_structprune import StructPruneConfig
from optimum_structprune.arch.family import builtin_families
from optimum_structprune.commands.cli import add_commands, main
from optimum_structprune.commands.flags import COMMANDS
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.evaluation.answers import read_questions


ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
TASKS = [ROOT / "docs" / f"{name}.md" for name in ("tour", "which_command", "vocabulary", "extending")]
# Pages with commands for real models. Each command gets more flags, which make it fast.
TOURS = [ROOT / "README.md", ROOT / "docs" / "teacher_file.md", *TASKS, *GUIDES]
FAST_FLAGS = {
    "prune": "--num-samples 6 --seq-length 64 --round-to 8",
    "evaluate": "--num-samples 2 --seq-length 64 --repeats 2 --prompt 8 --new-tokens 2",
    "plan": "--num-samples 6 --seq-length 64",
    "recover": "--tokens 400 --seq-length 32 --training per_device_train_batch_size=2",
}
# The small models that stand for the models of the pages need smaller files.
SMALLER = {"file=80MB": "file=0.28MB", "file=105MB": "file=0.3MB"}
# The output of these pages must match: the same lines and words, but not the same numbers.
PRINTED = [ROOT / "README.md", ROOT / "docs" / "tour.md"]
# Lines that depend on the size of the model.
BY_SIZE = re.compile(
    "^Verdict: |^Next: |^Languages checked|^# test questions|^Words now split|tokens have # of|rules out GPTQ|"
    "rules out llama|significantly more|were calibrated on|^Letters that can no longer"
)
UNKNOWN = "diffllama"  # No family describes this model type.


def snippets(page: Path, languages: str) -> list[tuple[str, str]]:
    """Return the language and the code of each snippet of a page in certain languages, such as `python|bash`."""
    return re.findall(rf"^```({languages})\n(.*?)^```", page.read_text(), re.M | re.S)


def snippets_with_output(page: Path) -> list[tuple[str, str, str]]:
    """Return the language, the code and the printed output of each Python and bash snippet of a page.

    The output is the block without a language after the snippet, or empty. Blocks in `NOT_RUN` are left out.
    """
    blocks = snippets(page, r"\w*")
    blocks.append(("", ""))
    result = []
    for (language, code), (next_language, next_block) in pairwise(blocks):
        if language in RUN and reason_not_to_run(page, language, code) is None:
            output = "" if next_language else next_block
            result.append((language, code, output))
    return result


# The languages of the blocks that are run. A `py` block continues the block before it, and may use a `trainer`.
RUN = ("python", "py", "bash")
# The blocks in these and other languages that are not run here: the page, the beginning, and the reason.
NOT_RUN = [
    ("tour.md", "The capital of France", "the printed answers of a real model"),
    ("evaluation.md", '{"prompt": ', "a file of questions, which a test below reads"),
    ("extending.md", "[project.entry-points", "`test_extending.py` builds the package"),
    ("recovery_many_gpus.md", "# fsdp2.yaml", "needs 8 GPUs; `test_examples.py` runs it with 2 processes"),
    ("recovery_many_gpus.md", "accelerate merge-weights", "`test_examples.py` runs it"),
    ("recovery_many_gpus.md", "# zero3.yaml", "needs 8 GPUs; `test_examples.py` runs it with 2 processes"),
    ("recovery_many_gpus.md", "#!/bin/bash\n#SBATCH", "needs Slurm; `test_examples.py` runs it with 2 processes"),
    ("scaling.md", "torchrun ", "starts 8 processes; a test below parses the lines"),
    ("serving.md", "llama-cli ", "needs llama.cpp; `test_llama_cpp.py` runs its programs"),
    ("serving.md", "pip install .    # in a clone", "needs vLLM; `test_vllm.py` runs it"),
    ("serving.md", "vllm serve ", "needs vLLM; `test_vllm.py` runs it"),
    ("serving.md", "import torch\nfrom torchao", "needs torchao; `test_deployment.py` runs it"),
    (
        "serving.md",
        "from pathlib import Path\n\nfrom compressed_tensors",
        "needs llm-compressor; `test_deployment.py` runs it",
    ),
]


def reason_not_to_run(page: Path, language: str, code: str) -> str | None:
    """Return the reason why a block is not run, or None if it is run or read."""
    if language == "mermaid":
        return "a picture"
    for name, start, reason in NOT_RUN:
        if page.name == name and code.startswith(start):
            return reason
    return None


def test_every_block_is_run_or_has_a_reason():
    """A YAML block is a config. A block without a language is the printed output of the block before it."""
    reasons = set()
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"^ +```|^~~~|^```\w*[^\w\n]", text, re.M), f"{page.name} has a block that no test finds"
        for language, code in snippets(page, r"\w*"):
            reason = reason_not_to_run(page, language, code)
            reasons.add(reason)
            assert reason or language in (*RUN, "yaml", ""), f"{page.name}: nothing runs\n{code}"

    assert {reason for _, _, reason in NOT_RUN} <= reasons


def test_lines_for_launchers_have_valid_flags():
    """The lines start 8 processes, so they are only parsed."""
    parser = ArgumentParser()
    add_commands(parser)
    ((_, code),) = [block for block in snippets(ROOT / "docs" / "scaling.md", "text") if "torchrun" in block[1]]
    for line in code.splitlines():
        words = shlex.split(line)
        launcher = get_args_parser() if words[0] == "torchrun" else launch_command_parser()
        arguments = launcher.parse_args(words[1:] if words[0] == "torchrun" else words[2:])
        assert arguments.module
        assert arguments.training_script == "optimum_structprune"
        assert parser.parse_args(arguments.training_script_args).command.name == "prune"


def test_configs_of_accelerate_are_read(tmp_path):
    for _, text in snippets(ROOT / "docs" / "recovery_many_gpus.md", "yml"):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        assert load_config_from_file(str(file)).num_processes == 8


def test_the_file_of_questions_is_read(tmp_path):
    ((_, text),) = snippets(ROOT / "docs" / "evaluation.md", "json")
    (tmp_path / "questions.jsonl").write_text(text)
    assert len(read_questions(tmp_path / "questions.jsonl", [])) == len(text.splitlines())


def test_commands_in_comments_have_valid_flags():
    """They stand below a table, with names in capitals for models and data, and … for further domains."""
    parser = ArgumentParser()
    add_commands(parser)
    for page in PAGES:
        for _, code in snippets(page, "bash"):
            for line in re.findall(r"^# structprune (.*)$", code, re.M):
                parser.parse_args(shlex.split(line.removesuffix("…")))


# Parts of an output that depend on the number of samples or on the speed, and their replacements.
REPLACEMENTS = [
    (r" \(few documents\)|; few documents: fewer than 12|warning: |; a smaller .*| in steps of \d+", ""),
    (r"BertModel\.from_pretrained", "SentenceTransformer"),  # the small encoder has no modules
    (r"Requested", "requested"),
    (r"model\)\.", "model)"),
    (r"\(sampled from the original model\)|\(built-in\)", ""),
    (r"(?m) in (bfloat16|float32)$", ""),
    (r" ± [\d.]+", ""),
    (r" \((calibration domain|unseen)\)", ""),
    (r"(\d+ h )?(\d+ min )?(\d+(\.\d+)?) s\b", r"\3 s"),
    (r"[-+]?\d[\d,]*(\.\d+)?[%×]?(?: [kMG]i?B)?", "#"),
]


def normalized_lines(text: str) -> list[str]:
    """Return the lines of an output without parts that depend on the run, and with # in place of numbers."""
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)

    lines = []
    for line in text.splitlines():
        line = " ".join(line.split())
        line = re.sub(r"#[-, #]*#", "#", line)
        if line and not BY_SIZE.search(line):
            lines.append(line)
    return lines


BART_SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
}
# Models that the snippets name: the name, the class, the model type, the rows per token, and the sizes.
# Vocabulary trimming removes rows without a token first, so a vocabulary with such rows can shrink by a quarter.
MODELS = [
    ("allenai/OLMoE-1B-7B-0924", AutoModelForCausalLM, "olmoe", 1, GROUPED | {"num_experts": 64}),
    ("google/gemma-3-270m", AutoModelForCausalLM, "llama", 2, GROUPED),
    ("intfloat/multilingual-e5-small", AutoModel, "bert", 4, PLAIN),
    ("other-model", AutoModelForCausalLM, UNKNOWN, 1, GROUPED),
    ("facebook/nllb-200-distilled-600M", AutoModelForSeq2SeqLM, "m2m_100", 4, TOKENS | BART_SIZES),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Make a folder with small models and texts under the names that the snippets use."""
    folder = tmp_path_factory.mktemp("inputs")
    model, tokenizer = deepcopy(real_text_model(1600, "prose"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    save_with_tokenizer(model, folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct", tokenizer)
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen2.5-7B-Instruct").symlink_to("../HuggingFaceTB/SmolLM2-135M-Instruct")

    assert UNKNOWN not in builtin_families(), "take another type that is not described"
    for name, auto, model_type, rows_per_token, sizes in MODELS:
        if model_type == "m2m_100":
            tokenizer.add_special_tokens({"additional_special_tokens": ["eng_Latn", "deu_Latn"]})
        text_sizes = {"vocab_size": rows_per_token * len(tokenizer), "max_position_embeddings": 1024}
        model = auto.from_config(AutoConfig.for_model(model_type, **(sizes | text_sizes)))
        save_with_tokenizer(model, folder / name, tokenizer)

    documents = list(islice(builtin_documents("math", 7), 400))
    write_texts(folder / "notes.jsonl", documents)
    write_texts(folder / "notes-prune.jsonl", documents[:300])
    write_texts(folder / "notes-test.jsonl", documents[300:])
    ((_, settings),) = snippets(ROOT / "docs" / "api.md", "yaml")
    (folder / "run.yaml").write_text(settings)
    return folder


def output_of(function, words: list[str]) -> str:
    """Call a function that reads `sys.argv`, fail unless it succeeds, and return its output.

    A call in this process saves the time to import torch.
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.setattr(sys, "argv", words)
        try:
            code = function()
        except SystemExit as end:
            code = end.code

    assert not code, shlex.join(words)
    return output.getvalue()


def output_of_script(words: list[str]) -> str:
    """Run a Python script of the repository with arguments, and return its output."""
    script = ROOT / words[0]

    def run_script():
        run_path(str(script), run_name="__main__")

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)
        return output_of(run_script, words)


@cache
def help_of(script: str, *command: str) -> str:
    """Return the help of a Python script of the repository, or of a command of the script."""
    return output_of_script([script, *command, "--help"])


def unknown_flags(script: str, arguments: list[str]) -> list[str]:
    """Return the flags in `arguments` that a script does not have."""
    commands = []
    for choices in re.findall(r"\{([\w,]+)\}", help_of(script)):
        commands += choices.split(",")
    command = [word for word in arguments[:1] if word in commands]
    script_flags = re.findall(r"--[\w-]+", help_of(script, *command))

    # A value with a space may contain flags of another program.
    flags = [word for word in arguments if word.startswith("--") and " " not in word]
    return [flag for flag in flags if flag.partition("=")[0] not in script_flags]


def run_structprune():
    return main(sys.argv[1:])


# The console scripts with the commands of the package, as functions that read `sys.argv`.
CONSOLE_SCRIPTS = {"structprune": run_structprune, "optimum-cli": optimum_main}


def run_line(line: str, flags: dict[str, str]) -> str:
    """Run a line of a bash snippet, with `flags` after the arguments of each command, and return its output.

    Of other Python scripts than tools, only the flags are checked.
    """
    output = ""
    line, _, file = line.partition(" > ")
    words = shlex.split(line, comments=True)
    if not words:
        return ""

    if words[0] == "make":
        assert words[1] in make_targets(), f"{words[1]} is no target of the Makefile"
    elif words[0] in CONSOLE_SCRIPTS:
        words = [SMALLER.get(word, word) for word in words]
        fast_flags = shlex.split(flags.get(words[1], ""))
        output = output_of(CONSOLE_SCRIPTS[words[0]], words + fast_flags)
    elif words[0] == "python" and words[1].startswith("examples/tools/"):
        output = output_of_script(words[1:])
    elif words[:2] == ["python", "-m"]:
        process = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, f"{line}\n{process.stderr}"
        assert process.stdout, line
    elif words[0] == "python":
        assert not unknown_flags(words[1], words[2:]), line
    else:
        raise AssertionError(f"nothing checks {line!r}")

    if file:
        Path(file).write_text(output)
        return ""
    return output


# `make test` runs the README only.
RUNNABLE_PAGES = with_long([page for page in PAGES if snippets_with_output(page)], [ROOT / "README.md"])


def small_trainer() -> Trainer:
    """Return a Trainer of the model of the snippets, with other weights, on text of the package."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    ids = AutoTokenizer.from_pretrained(name)("".join(islice(builtin_documents("prose"), 4)))["input_ids"]
    rows = [{"input_ids": ids[start : start + 512], "labels": ids[start : start + 512]} for start in (0, 512)]
    arguments = TrainingArguments(
        "trainer", max_steps=10, per_device_train_batch_size=2, save_strategy="no", report_to="none", use_cpu=True
    )
    model = AutoModelForCausalLM.from_pretrained(name)
    model.lm_head.weight.data.mul_(1.01)
    return Trainer(model, arguments, train_dataset=rows)


@pytest.mark.parametrize("page", RUNNABLE_PAGES, ids=lambda page: page.name)
def test_all_snippets_of_a_page_run_in_order(page, inputs, tmp_path, monkeypatch):
    """They run in one folder, because some snippets read a file that an earlier snippet wrote."""
    monkeypatch.chdir(copytree(inputs, tmp_path / "desk", symlinks=True))
    flags = FAST_FLAGS if page in TOURS else {}
    namespace = {}

    for language, code, expected_output in snippets_with_output(page):
        if language != "bash":
            if language == "python":
                namespace = {"__name__": "__main__"}
            elif "trainer = " not in code:
                namespace["trainer"] = small_trainer()
                code += "trainer.train()"
            with redirect_stdout(StringIO()) as stdout:
                exec(compile(code, str(page), "exec"), namespace)
            output = stdout.getvalue()
        else:
            output = "".join(run_line(line, flags) for line in code.splitlines())

        if expected_output and page in PRINTED:
            message = f"{page.name} shows another output of\n{code}"
            assert normalized_lines(output) == normalized_lines(expected_output), message


@pytest.mark.slow
def test_the_examples_of_the_help_run_in_order(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(copytree(inputs, tmp_path / "desk", symlinks=True))
    for command in COMMANDS:
        for example in command.examples:
            run_line(example, FAST_FLAGS)


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(copytree(inputs, tmp_path / "desk", symlinks=True))
    notebook = ROOT / "examples" / "first_steps.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]

    namespace = {"__name__": "__main__"}
    with redirect_stdout(StringIO()) as output:
        for source in sources:
            exec(compile(source, str(notebook), "exec"), namespace)

    assert len(sources) == 4
    assert "as Q8_0" in output.getvalue()
    assert notebook.stat().st_size < 20_000, "the notebook contains long outputs"


def make_targets() -> list[str]:
    """Return the targets of the Makefile."""
    return re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()


def test_make_help_names_every_target():
    command = ["make", "--no-print-directory", "help"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout

    lines = [line.split() for line in output.splitlines()]
    assert [words[0] for words in lines if len(words) > 3] == make_targets()


def test_commands_inside_sentences_have_valid_flags():
    """No other test runs these commands."""
    for page in PAGES:
        for line in re.findall(r"`((?:\w+=\w+ )?(?:python|bash) examples/[^`]*)`", page.read_text()):
            words = shlex.split(line)
            if "=" in words[0]:  # An environment variable.
                words = words[1:]
            program, script, *arguments = words
            assert (ROOT / script).exists(), f"{page.name}: {line}"

            if program == "bash":  # The shell script passes its arguments to a Python script.
                name = "recover_sft" if arguments[0] == "sft" else "prune_and_recover"
                script = f"examples/{name}.py"
            assert not unknown_flags(script, arguments), f"{page.name}: {line}"


def test_links_of_the_top_pages_lead_to_files():
    """`mkdocs build --strict` checks the links inside docs/."""
    for page in PAGES[:3]:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    names = re.findall(r"^::: optimum_structprune\.(\w+)$", reference, re.M)
    assert sorted(names) == optimum_structprune.__all__


def test_every_option_is_documented():
    text = "\n".join(page.read_text() for page in PAGES)
    names = [field.name for field in fields(StructPruneConfig)]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_yaml_snippets_are_valid_configs():
    for page in PAGES:
        for _, settings in snippets(page, "yaml"):
            StructPruneConfig.from_dict(yaml.safe_load(settings))
