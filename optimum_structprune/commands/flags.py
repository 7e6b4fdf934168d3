"""The commands and their flags, as tables. `optimum-cli` imports this module, so it imports nothing heavy."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Collection, Mapping
from typing import Any

from ..saving.gguf_types import GGUF_TYPES
from .arguments import SOURCES, Command, Flags, domain, positive_int, text_files, text_source, token_setting


def switch(text: str) -> dict[str, Any]:
    """Return a flag without a value."""
    return {"action": "store_true", "help": text}


def number(text: str, **options: Any) -> dict[str, Any]:
    """Return a flag with a whole number, 1 or more."""
    return _flag(options, help=text, metavar="N", type=positive_int)


def choice(text: str, choices: Collection[str], **options: Any) -> dict[str, Any]:
    """Return a flag whose value is one of some words."""
    return _flag(options, help=text, choices=choices)


def option(metavar: str, text: str, **options: Any) -> dict[str, Any]:
    """Return a flag whose value has a name in the help."""
    return _flag(options, help=text, metavar=metavar)


def _flag(options: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    """Return arguments of `add_argument`, with options in their place."""
    arguments.update(options)
    return arguments


# Flags of several commands. The flags of `Loading` come first.
TRUST = {"--trust-remote-code": switch("Run code that comes with the model.")}
ARCH = {"--arch": option("FILE", "A YAML file that describes architectures of your own.", dest="arch_file")}
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOADING: Flags = {
    "--dtype": choice("The dtype; auto uses the dtype of the files.", DTYPES, default="auto"),
    "--device": "The device, such as cpu or cuda; by default cuda if there is a GPU.",
    **TRUST,
}
ATTENTION = {
    "--attn-implementation": option("NAME", "The attention implementation, such as sdpa, eager or flash_attention_2.")
}
OFFLOADS = ("cpu", "disk")
OFFLOAD_FLAGS = {
    "--offload": choice(
        "Keep the layers in the CPU's memory or on the disk, and load one at a time to the device. Use it for models "
        "that are larger than the memory of the device.",
        OFFLOADS,
    )
}
OVERWRITE = {"--overwrite": switch("Replace the output.")}
QUALITY: Flags = {
    "--domain": option(
        "NAME=SOURCE",
        f"Text for perplexity, read in the order of the source. Repeatable. {SOURCES}",
        type=domain,
        **{"action": "append", "default": []},
    ),
    "--text": {"help": "Files of your own text. The short form of --domain.", "dest": "domain", **text_files()},
    "--answers": {
        "help": "Ask the built-in questions, or questions from a FILE in lines of JSON, and judge the answers.",
        **{"nargs": "?", "const": "builtin", "metavar": "builtin|FILE.jsonl"},
    },
    "--pairs": option(
        "FILE",
        "For encoders: a file with a text and its translation in each line of JSON, to measure how many translations "
        "are the nearest text. Repeatable.",
        **{"action": "append", "default": []},
    ),
    "--max-new-tokens": number("Maximum number of tokens per answer (120).", default=120),
    "--seq-length": number("Tokens per sample; by default 512, or the positions of the models if these are fewer."),
    "--num-samples": number("Maximum number of samples per domain; by default each domain is read to its end."),
    "--limit": number("Maximum number of questions; by default all of them."),
    "--batch-size": number("Sequences per forward pass; by default 1 on a CPU, and up to 16 on a GPU."),
}
SPEED: Flags = {
    "--speed": switch("Measure the speed of reading prompts and generating tokens. The models take turns."),
    "--prompt": number("Tokens in each prompt (128). Repeatable.", action="append"),
    "--new-tokens": number("Tokens to generate after the prompt (32).", default=32),
    "--repeats": number("Timed runs of each model (9).", default=9),
    "--clock": choice(
        "wall: elapsed time (default); cpu: processor time, for machines that run other jobs too.",
        ("wall", "cpu"),
        default="wall",
    ),
}

# The flags of `prune`, all of which `plan` takes too.
PRUNE_FLAGS: Flags = {
    "--recover": switch("Train the pruned model afterwards, with the original model as the teacher; see --recovery."),
    "--recovery-tokens": option(
        "N",
        "Like --recover, with this number of training tokens: short for --recovery tokens=N.",
        type=token_setting,
        **{"dest": "recovery", "action": "append", "default": SUPPRESS},
    ),
    "--base-model": option("OWNER/NAME", "The original model's id on the Hub, for the model card."),
    "--license": option(
        "ID", "The original model's licence, for the model card; by default the licence in the original model's card."
    ),
    "--resume": switch(
        "Save every finished layer in a folder next to the output, and resume from there if a run with the same "
        "settings was killed."
    ),
    **OVERWRITE,
    **LOADING,
    **ATTENTION,
    **OFFLOAD_FLAGS,
}
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"

COMMANDS = (
    Command(
        "prune",
        "prune.prune",
        "Prune a model and save one that plain from_pretrained loads.",
        {"model": "Model id or folder.", "output": "Folder for the pruned model.", **PRUNE_FLAGS},
        examples=(
            f"structprune prune {SMOLLM} small --budget parameters=0.9 --target mlp --text notes.jsonl",
            "structprune prune intfloat/multilingual-e5-small mine --budget parameters=0.4 --target vocab "
            "--languages de,en",
        ),
        config="StructPruneConfig",
    ),
    Command(
        "plan",
        "shapes.plan",
        "A dry run: show the widths, parameters and memory of the model that `prune` would save with the same "
        "arguments. It needs no weights and writes no model.",
        {
            "model": "Model id or folder; config.json is enough.",
            "output": {"help": "The output of `prune`, which `plan` does not write.", "nargs": "?", "default": "OUT"},
            "--cost": switch("Also show the memory that the pruning needs."),
            "--tokens": switch(
                "Show the share of the text (--text) and of --languages that keeps its tokens in vocabularies of "
                "eight sizes. It also needs the tokenizer."
            ),
            **PRUNE_FLAGS,
        },
        examples=(
            f"structprune plan {SMOLLM} --budget parameters=0.9 --target mlp --cost",
            "structprune plan google/gemma-3-270m --tokens --languages de,en --text notes.jsonl",
        ),
        config="StructPruneConfig",
        reads_text=False,
    ),
    Command(
        "recover",
        "recover.recover",
        "Train a pruned model, with or without a teacher, and save it.",
        {
            "model": "Folder or id of the pruned model.",
            "output": "Folder for the recovered model.",
            "--teacher": option("MODEL", "The model to learn from, usually the original model."),
            "--teacher-cache": option(
                "FOLDER",
                "A folder for the teacher's predictions, which is written if it does not exist. The training then has "
                "no teacher in memory, and later trainings with other widths or learning rates read it.",
            ),
            "--resume": switch("Resume from the last checkpoint of the same command."),
            **OVERWRITE,
            **ARCH,
            **LOADING,
            **ATTENTION,
        },
        examples=(f"structprune recover small small-recovered --teacher {SMOLLM} --tokens 200000",),
        config="RecoveryConfig",
        models=("model", "teacher"),
    ),
    Command(
        "teacher",
        "teacher.teacher",
        "Write the predictions of a teacher on training text to disk. attach_teacher trains from them without the "
        "teacher in memory. Run the same command again to resume it.",
        {
            "model": "Model id or folder of the teacher.",
            "domain": {
                "help": "Files of training text, or a mapping such as '{name: a, source: a.jsonl, template: chat}'.",
                **{"nargs": "+", "type": text_source, "metavar": "DATA"},
            },
            "output": "Folder for the teacher file.",
            "--seq-length": number(
                "Maximum number of tokens of a document; by default 1,024, or the positions of the model if fewer."
            ),
            "--top": number("Most probable tokens to store at each position (16).", default=16),
            "--samples": number("Tokens to sample from the rest at each position (16).", default=16),
            "--temperature": option("X", "The temperature of the training (1.0).", type=float, **{"default": 1.0}),
            **ARCH,
            **LOADING,
            **ATTENTION,
            **OFFLOAD_FLAGS,
        },
        examples=(f"structprune teacher {SMOLLM} notes.jsonl smollm2-teacher",),
    ),
    Command(
        "evaluate",
        "measure.evaluate",
        "Measure the perplexity, the answers and the speed of models, alone or against the original model. Without "
        "such flags, show their sizes.",
        {
            "models": option("model", "Model ids or folders.", nargs="+"),
            "--against": option("ORIGINAL", "The original model to compare with."),
            **QUALITY,
            **SPEED,
            "--html": switch("Save the numbers in the folder of the pruned model, and update its report.html."),
            **ARCH,
            **LOADING,
            **ATTENTION,
        },
        examples=(f"structprune evaluate small --against {SMOLLM} --text notes.jsonl --answers",),
        models=("models", "against"),
    ),
    Command(
        "inspect",
        "shapes.inspect",
        "Show a model's family, spaces, units, legal widths and parameter shares.",
        {"model": "Model id or folder.", **ARCH, **TRUST},
        examples=(f"structprune inspect {SMOLLM}",),
        reads_text=False,
    ),
    Command(
        "export",
        "export.export",
        "Write a model for llama.cpp (OUT.gguf), or pad the layers of a model to one width (--pad-uniform).",
        {
            "model": "Folder or id of the pruned model.",
            "output": "File for llama.cpp, which ends in .gguf; with --pad-uniform, a folder.",
            "--pad-uniform": switch("Pad narrower layers with zeros, for runtimes that support only one width."),
            **OVERWRITE,
            **ARCH,
            **LOADING,
            "--dtype": choice(
                "The dtype; auto uses the dtype of the files. A GGUF file also takes llama.cpp's types.",
                (*DTYPES, *GGUF_TYPES),
                default="auto",
            ),
        },
        examples=("structprune export small small.gguf --dtype q8_0",),
        reads_text=False,
    ),
)
