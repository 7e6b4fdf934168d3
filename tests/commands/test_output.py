"""Test the output of commands: results on the standard output, all other text on the standard error."""

import io
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub.utils as hub
import pytest
import torch
from helpers import error_line, save_desk
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from optimum_structprune import StructPruneError, __version__
from optimum_structprune.commands import output
from optimum_structprune.commands.arguments import Command
from optimum_structprune.commands.cli import execute, main
from optimum_structprune.commands.flags import COMMANDS
from optimum_structprune.commands.output import Result, check_file


OFFLINE = OSError("offline")
OFFLINE.__cause__ = ConnectionError("no route")
DISK_FULL = OSError(28, "No space left on device", "/out/model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("output"), count=200)


def command_lines(folder):
    """Return one command line for each command, by the name of the command."""
    model = str(folder / "model")
    pruned = str(folder / "pruned")
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24"]
    samples = ["--num-samples", "6"]
    cpu = ["--device", "cpu"]
    training = ["--training", "learning_rate=1e-3", "--lora", "r=2", "--tokens", "96"]

    inspect = ["inspect", model]
    plan = ["plan", model, "--width", "mlp=24"]
    prune = ["prune", model, pruned, "--width", "mlp=24", "--skip-layer", "0"] + text + samples + cpu
    export = ["export", pruned, str(folder / "padded"), "--pad-uniform"] + cpu
    evaluate = ["evaluate", pruned, "--against", model] + text + samples + cpu
    recover = ["recover", pruned, str(folder / "trained")] + text + training + cpu
    teacher = ["teacher", model, str(folder / "a.jsonl"), str(folder / "teacher"), "--seq-length", "24"] + cpu
    return {line[0]: line for line in (inspect, plan, prune, export, evaluate, recover, teacher)}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_command_prints_its_result_as_text_or_as_one_json_document(folder, tmp_path, capsys):
    lines = command_lines(folder)
    assert lines.keys() == {command.name for command in COMMANDS}

    for name, line in lines.items():
        json_file = tmp_path / f"{name}.json"
        file_flags = ["--json", str(json_file)]
        assert main(line + file_flags) == 0, name
        printed = capsys.readouterr()
        assert printed.out.strip(), name
        assert not printed.out.startswith("{"), name
        assert "%|" not in printed.err, name
        assert ("Pruning …" in printed.err) == (name == "prune")

        overwrite = []
        if name in ("prune", "export", "recover"):
            overwrite = ["--overwrite"]
        assert main(line + ["--json", "--quiet"] + overwrite) == 0, name
        printed = capsys.readouterr()
        values = json.loads(printed.out)
        assert isinstance(values, dict), name
        assert len(values) > 1, name
        assert "%|" not in printed.err, name
        assert "…" not in printed.err, name

        if name == "teacher":
            assert values["output"] == line[3]
        elif not overwrite:
            assert json.loads(json_file.read_text()) == values
        else:
            assert values["output"] == line[2]
        if name == "inspect":
            assert values["spaces"]["attention"] == {"units": [4], "parameters": 6144, "legal": [1, 2, 4]}


@pytest.mark.parametrize(("name", "place"), [("prune", 2), ("export", 2), ("recover", 2), ("teacher", 3)])
def test_an_output_that_cannot_be_written_is_named_and_no_text_is_read(folder, capsys, monkeypatch, name, place):
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", Mock(side_effect=AssertionError("text is tokenized")))
    line = command_lines(folder)[name]
    line[1] = str(folder / "model")
    line[place] = "/proc/none/out"

    assert main(line) == 2
    assert error_line(capsys).startswith("structprune: error: /proc/none/out cannot be written: ")


@given(st.binary(min_size=1, max_size=40))
@example(b"model,parameters,accuracy of my exam\nalpha,1,0.7\n")
@example(b'{\n  "structprune": "what I tried by hand",\n  "hours": 40\n}\n')
@example(b'{"structprune": "0.1.0"}')
def test_a_file_with_any_content_is_replaced_only_on_request(content):
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)

        with pytest.raises(StructPruneError, match="--json a exists. Choose another .*--overwrite"):
            check_file(file.name, "--json a")
        check_file(file.name, "--json a", overwrite=True)

        assert Path(file.name).read_bytes() == content


class Terminal(io.StringIO):
    def isatty(self):
        return True


def parsed_arguments(run, quiet=False, as_json=False):
    return Namespace(run=run, quiet=quiet, json=as_json, command=Command("work", "", "", {}, models=()))


def set_switches(enabled):
    """Enable or disable the progress bars of datasets, transformers and huggingface_hub."""
    if enabled:
        datasets.enable_progress_bars()
        logging.enable_progress_bar()
    else:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def read_switches():
    return logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled(), datasets.is_progress_bar_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_bars_are_off_without_a_terminal_and_the_switches_are_restored(fails, monkeypatch):
    switches_inside = []

    def run(args):
        switches_inside.append(read_switches())
        print("a library prints")
        if fails:
            raise StructPruneError("no")
        return Result("text", {})

    expected_code = 0
    expected_output = "text\ntext\n"
    if fails:
        expected_code = 2
        expected_output = ""
    for errors, quiet in [(Terminal(), False), (Terminal(), True), (io.StringIO(), False)]:
        printed = io.StringIO()
        monkeypatch.setattr(sys, "stderr", errors)
        monkeypatch.setattr(sys, "stdout", printed)

        for enabled in (True, False):
            set_switches(enabled)
            switches_before = read_switches()
            assert switches_before == (enabled, not enabled, enabled)

            assert execute(parsed_arguments(run, quiet)) == expected_code

            bars = enabled and errors.isatty() and not quiet
            assert switches_inside.pop() == (bars, not bars, bars)
            assert read_switches() == switches_before

        set_switches(True)
        assert ("a library prints" in errors.getvalue()) is not quiet
        assert printed.getvalue() == expected_output


def test_numbers_that_json_lacks_are_null(capsys):
    values = {"a": float("nan"), 1: [float("inf"), (1, "x", None, True)], "path": Path("p")}

    assert execute(parsed_arguments(lambda args: Result("", values), as_json=True)) == 0

    printed = json.loads(capsys.readouterr().out)
    assert printed == {"structprune": __version__, "a": None, "1": [None, [1, "x", None, True]], "path": "p"}


def test_characters_that_a_terminal_lacks_are_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))

    assert execute(parsed_arguments(lambda args: Result("0.5 ± 0.1", {}))) == 0

    assert raw.getvalue() == b"0.5 ? 0.1\n"


def test_control_codes_are_spelled_out(capsys):
    name = "a\x1b[31m\x07\x9b2J\té\n"
    spelled_out = "a\\x1b[31m\\x07\\x9b2J\té\n"

    def run(args):
        output.note(args, name)
        return Result(name, {"name": name})

    assert execute(parsed_arguments(run)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{spelled_out}\n"
    assert printed.err == f"{spelled_out}\n"

    fail = Mock(side_effect=StructPruneError(name))
    assert execute(parsed_arguments(fail)) == 2
    assert "a\\x1b[31m\\x07\\x9b2J é" in capsys.readouterr().err


def test_a_closed_standard_output_is_no_error(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    assert main(["inspect", str(folder / "model")]) == 0


def test_a_reader_that_stops_early_is_no_error():
    code = (
        "from argparse import Namespace; from optimum_structprune.commands.cli import execute; import sys; "
        "from optimum_structprune.commands.arguments import Command; "
        "from optimum_structprune.commands.output import Result; work = Command('work', '', '', {}, models=()); "
        "run = lambda args: Result('x' * 10**6, {}); "
        "sys.exit(execute(Namespace(run=run, command=work, quiet=False, json=False)))"
    )
    script = f'"{sys.executable}" -c "{code}" | true; echo ${{PIPESTATUS[0]}}'

    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True)

    assert process.stdout == "0\n"
    assert process.stderr == "Loading libraries …\n"


@pytest.mark.parametrize(("error", "message"), [
    (OFFLINE, "OSError: offline (because of ConnectionError: no"),
    (DISK_FULL, "/out/model.safetensors: No space left on device."),
    (MemoryError(), "There is not enough memory: MemoryError"),
    (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), "There is not enough memory: unable to"),
    (ImportError("a.so: failed to map segment from shared object"), "There is not enough memory: a.so: failed"),
    (StructPruneError("Two\n lines."), "structprune: error: Two lines."),
    (torch.OutOfMemoryError("CUDA out of memory."), "There is not enough memory: CUDA out of memory."),
])  # fmt: skip
def test_errors_of_the_input_and_the_machine_are_one_line_and_exit_code_2(error, message, capsys):
    assert execute(parsed_arguments(Mock(side_effect=error))) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("structprune: error: ")
    assert message in line
    assert "unexpected" not in line


def test_bugs_are_one_line_with_a_hint(capsys, monkeypatch):
    monkeypatch.delenv("STRUCTPRUNE_DEBUG", raising=False)

    for fail in (lambda args: 1 / 0, lambda args: torch.zeros(2) @ torch.zeros(3)):
        assert execute(parsed_arguments(fail)) == 1

        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("please report it with what STRUCTPRUNE_DEBUG=1 in the environment shows.")


def test_the_debug_switch_shows_the_traceback(capsys, monkeypatch):
    for switch, error, code in (("1", KeyError("a"), 1), ("1", DISK_FULL, 2), ("0", DISK_FULL, 2)):
        monkeypatch.setenv("STRUCTPRUNE_DEBUG", switch)

        assert execute(parsed_arguments(Mock(side_effect=error))) == code

        assert ("Traceback" in capsys.readouterr().err) == (switch == "1")
