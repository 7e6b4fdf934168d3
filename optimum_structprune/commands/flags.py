"""The commands and their flags, as tables: `optimum-cli` imports this on every call, and nothing that is heavy."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Collection
from typing import Any

from ..saving.gguf_types import GGUF_TYPES
from .arguments import SOURCES, Command, Flags, domain, positive_int, text_files, token_setting


def switch(text: str) -> dict[str, Any]:
    """A flag without a value."""
    return {"action": "store_true", "help": text}


def number(text: str, **more: Any) -> dict[str, Any]:
    """A flag with a whole number, 1 or more."""
    return {"help": text, "metavar": "N", "type": positive_int, **more}


def choice(text: str, among: Collection[str], **more: Any) -> dict[str, Any]:
    """A flag whose value is one of some words."""
    return {"help": text, "choices": among, **more}


def named(metavar: str, text: str, **more: Any) -> dict[str, Any]:
    """A flag whose value has a name in the help."""
    return {"help": text, "metavar": metavar, **more}


# Flags of several commands; those of `Loading` first.
TRUST = {"--trust-remote-code": switch("Run code that comes with the model.")}
ARCH = {"--arch": named("FILE", "A YAML file that describes architectures of your own.", dest="arch_file")}
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOADING: Flags = {
    "--dtype": choice("The dtype; auto is that of the files.", DTYPES, default="auto"),
    "--device": "The device, such as cpu or cuda; by default cuda where there is one.",
    **TRUST,
}
ATTENTION = {
    "--attn-implementation": named(
        "NAME", "The attention kernels, as `from_pretrained` takes them, such as sdpa, eager or flash_attention_2."
    )
}
OFFLOADS = ("cpu", "disk")
OFFLOAD = {
    "--offload": choice(
        "Keep the layers in the CPU's memory or on the disk, and bring in one at a time: for models that are larger "
        "than the memory of the device.",
        OFFLOADS,
    )
}
OVERWRITE = {"--overwrite": switch("Replace the output.")}
RESULT: Flags = {
    **OVERWRITE,
    "--push-to-hub": named(
        "OWNER/NAME",
        "Upload the result to this repository of the Hub once it is complete on the disk, with the token of `hf auth "
        "login` or of HF_TOKEN.",
    ),
    "--private": switch("The repository is private."),
}
QUALITY: Flags = {
    "--domain": named(
        "NAME=SOURCE",
        f"Text that is read in its own order. Repeatable. {SOURCES}",
        type=domain,
        **{"action": "append", "default": []},
    ),
    "--text": {"help": "Files of your own text. The short form of --domain.", "dest": "domain", **text_files()},
    "--answers": {
        "help": "Ask questions, the built-in ones or those of a FILE in lines of JSON, and judge the answers.",
        **{"nargs": "?", "const": "builtin", "metavar": "builtin|FILE.jsonl"},
    },
    "--pairs": named(
        "FILE",
        "For encoders: a text and its translation in each line of JSON, which look for each other. Repeatable.",
        **{"action": "append", "default": []},
    ),
    "--max-new-tokens": number("Tokens per answer at most (120).", default=120),
    "--seq-length": number("Tokens per sample (512).", default=512),
    "--num-samples": number("Samples per domain at most; by default each domain is read to its end."),
    "--limit": number("Questions at most; by default all of them."),
    "--batch-size": number("Sequences per forward pass; by default 1 on a CPU, and up to 16 on a GPU."),
}
SPEED: Flags = {
    "--speed": switch("Measure how fast the models read prompts and write tokens, in turns."),
    "--prompt": number("Tokens in each prompt (128). Repeatable.", action="append"),
    "--new-tokens": number("Tokens to write after it (32).", default=32),
    "--repeats": number("Timed runs of each model, in turns (9).", default=9),
    "--clock": choice(
        "wall (default), or cpu: time of the processor, where other jobs run too.", ("wall", "cpu"), default="wall"
    ),
}

COMMANDS = (
    Command(
        "prune",
        "prune.prune",
        "Prune a model and save one that plain from_pretrained loads.",
        {
            "model": "Model id or folder.",
            "output": "Folder for the pruned model.",
            "--recover": switch("Train afterwards, with the dense model as the teacher; see --recovery."),
            "--recovery-tokens": named(
                "N",
                "The same, with this number of training tokens: short for --recovery tokens=N.",
                type=token_setting,
                **{"dest": "recovery", "action": "append", "default": SUPPRESS},
            ),
            "--gguf": named(
                "TYPE",
                "Also write the result for llama.cpp, to OUT-TYPE.gguf: q8_0, q4_0, f16 …, or q4_k_m where llama.cpp "
                "is installed.",
                type=str.lower,
            ),
            "--base-model": named("OWNER/NAME", "The dense model's id on the Hub, for the model card."),
            "--license": named("ID", "Its licence, for the model card; by default what the dense model's card says."),
            "--resume": switch(
                "Remember every finished layer in a folder beside the output, and go on from there if a run with the "
                "same settings was killed."
            ),
            **RESULT,
            **LOADING,
            **ATTENTION,
            **OFFLOAD,
        },
        config="StructPruneConfig",
    ),
    Command(
        "plan",
        "shapes.plan",
        "A dry run: show the widths, parameters and memory that `prune` would give with the same settings. Needs no "
        "weights, and writes no model.",
        {
            "model": "Model id or folder; config.json is enough.",
            "--dtype": choice("The dtype in which memory is counted; auto is the model's.", DTYPES, default="auto"),
            "--cost": switch("Show the memory and the time that the pruning takes as well."),
            "--offload": choice("With --cost: where the layers are while they do not run.", OFFLOADS),
            "--tokens": switch(
                "Show how much of the text (--text) and of --languages keeps its tokens in a vocabulary of each of "
                "eight sizes; needs the tokenizer too."
            ),
            **TRUST,
        },
        config="StructPruneConfig",
        reads_text=False,
        json_file=True,
    ),
    Command(
        "recover",
        "recover.recover",
        "Train a pruned model, with or without a teacher, and save it.",
        {
            "model": "Folder or id of the pruned model.",
            "output": "Folder for the recovered model.",
            "--teacher": named("MODEL", "The model to agree with, usually the dense one."),
            "--resume": switch("Go on from the last checkpoint of the same command."),
            **RESULT,
            **ARCH,
            **LOADING,
            **ATTENTION,
        },
        config="RecoveryConfig",
        models=("model", "teacher"),
    ),
    Command(
        "evaluate",
        "measure.evaluate",
        "Measure models by perplexity, answers and speed, alone or against the dense one; without such flags, "
        "show their sizes. Several models stand side by side.",
        {
            "models": named("model", "Model ids or folders.", nargs="+"),
            "--against": named("DENSE", "The dense model to compare with."),
            **QUALITY,
            **SPEED,
            "--html": switch("Keep the numbers in the folder of the pruned model, and write its report.html anew."),
            **ARCH,
            **LOADING,
            **ATTENTION,
        },
        json_file=True,
        models=("models", "against"),
    ),
    Command(
        "inspect",
        "shapes.inspect",
        "Show a model's family, spaces, units, legal widths and parameter shares.",
        {"model": "Model id or folder.", **ARCH, **TRUST},
        reads_text=False,
    ),
    Command(
        "export",
        "export.export",
        "Write a model for llama.cpp (OUT.gguf), or a non-uniform one with one width for all layers (--pad-uniform).",
        {
            "model": "Folder or id of the pruned model.",
            "output": "File for llama.cpp, which ends in .gguf; with --pad-uniform, a folder.",
            "--pad-uniform": switch("Fill narrower layers up with zeros, for runtimes that take one width only."),
            **OVERWRITE,
            **ARCH,
            **LOADING,
            "--dtype": choice(
                "The dtype; auto is that of the files. A GGUF file also takes llama.cpp's types.",
                (*DTYPES, *GGUF_TYPES),
                default="auto",
            ),
        },
        reads_text=False,
    ),
)
