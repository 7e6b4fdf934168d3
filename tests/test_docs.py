"""Every snippet in the README and the docs runs, and every command in them takes the flags that it is given."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import fields
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from shutil import copytree

import pytest
import yaml
from helpers import save_with_tokenizer, with_long
from models import GROUPED, PLAIN, TOKENS, real_text_model
from optimum.commands.optimum_cli import main as optimum_main
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import optimum_structprune
from optimum_structprune import StructPruneConfig
from optimum_structprune.arch.family import builtin_families
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.sources import builtin_documents


ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
# Pages that lead from one command to the next: each runs as a whole.
TOURS = [
    ROOT / "docs" / "tour.md",
    ROOT / "docs" / "which_command.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
# Pages whose outputs are those of today: the same lines and words, whatever the numbers.
PRINTED = [ROOT / "README.md", ROOT / "docs" / "tour.md"]
# Lines that depend on the size of the model.
BY_SIZE = re.compile(
    "^Verdict: |^Next: |^Languages checked|^# test questions|^Words now split|tokens have # of|has no GPTQ|"
    "has no llama|significantly more|were calibrated on"
)
# What follows the flags of a command in them, which are those for real models.
SMALL = {
    "prune": "--num-samples 6 --seq-length 64 --round-to 8",
    "evaluate": "--num-samples 2 --seq-length 64 --repeats 2 --prompt 8 --new-tokens 2",
    "plan": "--num-samples 6 --seq-length 64",
    "recover": "--tokens 400 --seq-length 32 --training per_device_train_batch_size=2",
}
UNKNOWN = "flint"  # a model type that no family describes
# The console scripts that have our commands, as functions that read `sys.argv`.
OWN = {"structprune": lambda: main(sys.argv[1:]), "optimum-cli": optimum_main}


def snippets(page: Path, languages: str) -> list[tuple[str, str]]:
    """The snippets of a page in certain languages, `python|bash` for two, each with its language."""
    return re.findall(rf"^```({languages})\n(.*?)^```", page.read_text(), re.M | re.S)


def with_output(page: Path) -> list[tuple[str, str, str]]:
    """The snippets of a page that run, each with the block behind it that has no language: what it prints."""
    blocks = [*re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S), ("", "")]
    return [
        (language, code, output if not kind else "")
        for (language, code), (kind, output) in pairwise(blocks)
        if language in ("python", "bash")
    ]


def form(text: str) -> list[str]:
    """The words of each line of an output, with one # for numbers that stand together."""
    text = re.sub(
        r" \(few documents\)|; few documents: fewer than 12|warning: |; a smaller .*| in steps of \d+", "", text
    )
    text = re.sub(r"Requested|requested", "requested", text).replace("model).", "model)")
    text = re.sub(r"\(sampled from the original model\)|\(built-in\)", "", text)  # by the number of samples
    text = re.sub(r" in (bfloat16|float32)$", "", text, flags=re.M)
    text = re.sub(r" ± [\d.]+", "", text)  # fewer samples have no standard error
    text = re.sub(r" \((calibration domain|unseen)\)", "", text)  # fewer samples may share no document
    text = re.sub(r"(\d+ h )?(\d+ min )?(\d+(\.\d+)?) s\b", r"\3 s", text)
    text = re.sub(r"[-+]?\d[\d,]*(\.\d+)?[%×]?(?: [kMG]i?B)?", "#", text)
    lines = [re.sub(r"#[-, #]*#", "#", " ".join(line.split())) for line in text.splitlines() if line.strip()]
    return [line for line in lines if not BY_SIZE.search(line)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder in which the names that the snippets use exist, so that they run as they stand."""
    folder = tmp_path_factory.mktemp("inputs")
    model, tokenizer = deepcopy(real_text_model(1600, "prose"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    save_with_tokenizer(model, folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct", tokenizer)
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen2.5-7B-Instruct").symlink_to("../HuggingFaceTB/SmolLM2-135M-Instruct")
    assert UNKNOWN not in builtin_families(), "take another type that is not described"
    bart = {"d_model": 32, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_layers": 1, "decoder_layers": 1}
    bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    # Rows without a token go first, so that a quarter of some models can go.
    for name, auto, model_type, rows, sizes in (
        ("allenai/OLMoE-1B-7B-0924", AutoModelForCausalLM, "olmoe", 1, {**GROUPED, "num_experts": 64}),
        ("google/gemma-3-270m", AutoModelForCausalLM, "llama", 2, GROUPED),
        ("intfloat/multilingual-e5-small", AutoModel, "bert", 4, PLAIN),
        ("other-model", AutoModelForCausalLM, UNKNOWN, 1, GROUPED),
        ("facebook/nllb-200-distilled-600M", AutoModelForSeq2SeqLM, "m2m_100", 4, {**TOKENS, **bart}),
    ):
        if model_type == "m2m_100":
            tokenizer.add_special_tokens({"additional_special_tokens": ["eng_Latn", "deu_Latn"]})
        more = {"vocab_size": rows * len(tokenizer), "max_position_embeddings": 1024}
        model = auto.from_config(AutoConfig.for_model(model_type, **{**sizes, **more}))
        save_with_tokenizer(model, folder / name, tokenizer)
    lines = [json.dumps({"text": text}) for _, text in zip(range(400), builtin_documents("math", 7), strict=False)]
    for name, part in {"notes": lines, "notes-prune": lines[:300], "notes-test": lines[300:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    ((_, settings),) = snippets(ROOT / "docs" / "api.md", "yaml")
    (folder / "run.yaml").write_text(settings)
    return folder


def ran(run, words: list[str]) -> str:
    """What a command prints that runs in this process, where torch need not be imported anew; it has to succeed."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
        patch.setattr(sys, "argv", words)
        try:
            code = run()
        except SystemExit as end:
            code = end.code
    assert not code, shlex.join(words)
    return shown.getvalue()


def ran_script(words: list[str]) -> str:
    """What a Python script of the repository prints, by its path and its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend((ROOT / words[0]).parent)
        return ran(lambda: run_path(str(ROOT / words[0]), run_name="__main__") and None, words)


@cache
def help_of(script: str, *command: str) -> str:
    """What a Python script of the repository, and the command of it that is named, says with --help."""
    return ran_script([script, *command, "--help"])


def unknown_flags(words: list[str]) -> list[str]:
    """The flags of a line `python SCRIPT …` that the script does not have."""
    script, arguments = words[1], words[2:]
    modes = re.findall(r"\{([\w,]+)\}", help_of(script))
    command = arguments[:1] if arguments and any(arguments[0] in some.split(",") for some in modes) else []
    known = re.findall(r"--[\w-]+", help_of(script, *command))
    flags = [word for word in arguments if word.startswith("--") and " " not in word]  # and no value that has flags
    return [flag for flag in flags if flag.partition("=")[0] not in known]


def run_line(line: str, flags: dict[str, str]) -> str:
    """What a line of a bash snippet prints, with `flags` behind each command's; large runs are only checked."""
    shown = ""
    line, _, file = line.partition(" > ")
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        assert words[1] in targets(), f"{words[1]} is no target of the Makefile"
    elif words and words[0] in OWN:
        shown = ran(OWN[words[0]], [*words, *shlex.split(flags.get(words[1], ""))])
    elif words[:1] == ["python"] and words[1].startswith("examples/tools/"):
        shown = ran_script(words[1:])
    elif words[:2] == ["python", "-m"]:
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, f"{line}\n{done.stderr}"
    elif words[:1] == ["python"]:
        assert not unknown_flags(words), line
    elif words:
        raise AssertionError(f"nothing checks {line!r}")
    if file:
        Path(file).write_text(shown)
    return "" if file else shown


# `make test` runs what a stranger reads first.
PARTS = with_long((page for page in PAGES if snippets(page, "python|bash")), PAGES[:1])


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.name)
def test_a_page_leads_from_its_first_snippet_to_its_last(page, inputs, tmp_path, monkeypatch):
    """In one folder: some snippets read what an earlier one of the page has written."""
    monkeypatch.chdir(copytree(inputs, tmp_path / "desk", symlinks=True))
    for language, code, output in with_output(page):
        if language == "python":
            with redirect_stdout(StringIO()) as text:
                exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
            shown = text.getvalue()
        else:
            shown = "".join(
                run_line(line, SMALL if page in (ROOT / "README.md", *TOURS) else {}) for line in code.splitlines()
            )
        if output and page in PRINTED:
            assert form(shown) == form(output), f"{page.name} shows another output of\n{code}"


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(inputs, tmp_path, monkeypatch):
    """Its cells are plain Python, in one namespace; what it has kept of outputs is little."""
    monkeypatch.chdir(copytree(inputs, tmp_path / "desk", symlinks=True))
    notebook = ROOT / "examples" / "first_steps.ipynb"
    cells = [
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    names: dict = {"__name__": "__main__"}
    with redirect_stdout(StringIO()) as shown:
        for cell in cells:
            exec(compile(cell, str(notebook), "exec"), names)
    assert len(cells) == 4 and "as Q8_0" in shown.getvalue() and notebook.stat().st_size < 20_000


def targets() -> list[str]:
    """What the Makefile can be asked for."""
    return re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()


def test_make_help_names_every_target():
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in shown.splitlines() if len(line.split()) > 3] == targets()


def test_python_lines_inside_sentences_take_their_flags():
    """Commands that stand in a sentence, where nothing runs them."""
    for page in PAGES:
        for line in re.findall(r"`((?:\w+=\w+ )?(?:python|bash) examples/[^`]*)`", page.read_text()):
            words = shlex.split(line)
            words = words[1:] if "=" in words[0] else words
            script = words[:2]
            if words[0] == "bash":
                name = "recover_sft" if words[2] == "sft" else "prune_and_recover"
                script = ["python", f"examples/{name}.py"]
            assert (ROOT / words[1]).exists() and not unknown_flags([*script, *words[2:]]), f"{page.name}: {line}"


def test_links_at_the_top_lead_somewhere():
    """Those inside docs/ are checked by `mkdocs build --strict`."""
    for page in PAGES[:3]:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_every_public_name_and_every_option_is_documented_and_configs_are_read():
    shown = re.findall(r"^::: optimum_structprune\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert sorted(shown) == optimum_structprune.__all__
    text = "\n".join(page.read_text() for page in PAGES)
    assert [field.name for field in fields(StructPruneConfig) if not re.search(rf"\b{field.name}\b", text)] == []
    for _, settings in (snippet for page in PAGES for snippet in snippets(page, "yaml")):
        StructPruneConfig.from_dict(yaml.safe_load(settings))
