"""What a command shows, and where: the result on the standard output, everything else on the standard error."""

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
from helpers import save_desk
from hypothesis import example, given
from hypothesis import strategies as st
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


def commands(folder):
    model, text = str(folder / "model"), ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24"]
    short, cpu = [*text, "--num-samples", "6"], ["--device", "cpu"]
    training = ["--training", "learning_rate=1e-3", "--lora", "r=2", "--tokens", "96"]
    return {
        "inspect": ["inspect", model],
        "plan": ["plan", model, "--width", "mlp=24"],
        "prune": ["prune", model, str(folder / "pruned"), "--width", "mlp=24", "--skip-layer", "0", *short, *cpu],
        "export": ["export", str(folder / "pruned"), str(folder / "padded"), "--pad-uniform", *cpu],
        "evaluate": ["evaluate", str(folder / "pruned"), "--against", model, *short, *cpu],
        "recover": ["recover", str(folder / "pruned"), str(folder / "trained"), *text, *training, *cpu],
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_command_prints_its_result_as_text_or_as_one_json_document(folder, tmp_path, capsys):
    lines, again = commands(folder), {"prune", "export", "recover"}
    assert lines.keys() == {command.name for command in COMMANDS}
    for name, line in lines.items():
        to_file = ["--json", str(tmp_path / f"{name}.json")] if name in ("plan", "evaluate") else []
        assert main([*line, *to_file]) == 0, name
        text = capsys.readouterr()
        assert text.out.strip() and "%|" not in text.err and not text.out.startswith("{"), name
        assert ("Round 1 …" in text.err) == (name == "prune")
        assert main([*line, "--json", "--quiet", *(["--overwrite"] if name in again else [])]) == 0, name
        shown = capsys.readouterr()
        values = json.loads(shown.out)
        assert isinstance(values, dict) and len(values) > 1 and "%|" not in shown.err and "…" not in shown.err, name
        assert not to_file or json.loads((tmp_path / f"{name}.json").read_text()) == values
        if name in again:
            assert values["output"] == line[2]
        if name == "inspect":
            assert values["spaces"]["attention"] == {"units": [4], "parameters": 6144, "legal": [1, 2, 4]}


@given(st.binary(min_size=1, max_size=40))
@example(b"model,parameters,accuracy of my exam\nalpha,1,0.7\n")
@example(b'{\n  "structprune": "what I tried by hand",\n  "hours": 40\n}\n')
@example(b'{"structprune": "0.1.0"}')
def test_a_file_that_exists_is_replaced_only_on_request_whatever_is_in_it(content):
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        with pytest.raises(StructPruneError, match="--json a exists; name another .*--overwrite"):
            check_file(file.name, "--json a")
        check_file(file.name, "--json a", overwrite=True)
        assert Path(file.name).read_bytes() == content


def switches():
    return logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled(), datasets.is_progress_bar_enabled()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def parsed(run, quiet=False, json_=False):
    return Namespace(run=run, quiet=quiet, json=json_, command=Command("work", "", "", {}, models=()))


@pytest.mark.parametrize("fails", [False, True])
def test_bars_are_off_without_a_terminal_and_the_switches_come_back(fails, monkeypatch):
    seen = []

    def run(args):
        seen.append(switches())
        print("a library prints")
        if fails:
            raise StructPruneError("no")
        return Result("text", {})

    level = output.logging.getLogger("transformers.training_args").level
    for terminal, quiet in [(Terminal(), False), (Terminal(), True), (io.StringIO(), False)]:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
        for before in (True, False):
            (datasets.enable_progress_bars if before else datasets.disable_progress_bars)()
            (logging.enable_progress_bar if before else logging.disable_progress_bar)()
            was = switches()
            assert execute(parsed(run, quiet)) == (2 if fails else 0)
            on = before and terminal.isatty() and not quiet
            assert seen.pop() == (on, not on, on) and switches() == was == (before, not before, before)
            assert output.logging.getLogger("transformers.training_args").level == level
        datasets.enable_progress_bars()
        logging.enable_progress_bar()
        assert ("a library prints" in terminal.getvalue()) is not quiet
        assert shown.getvalue() == ("" if fails else "text\ntext\n")


def test_numbers_that_json_does_not_have_are_null_and_what_a_terminal_cannot_show_is_replaced(capsys, monkeypatch):
    values = {"a": float("nan"), 1: [float("inf"), (1, "x", None, True)], "path": Path("p")}
    assert execute(parsed(lambda args: Result("", values), json_=True)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"structprune": __version__, "a": None, "1": [None, [1, "x", None, True]], "path": "p"}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert execute(parsed(lambda args: Result("0.5 ± 0.1", {}))) == 0
    assert raw.getvalue() == b"0.5 ? 0.1\n"


def test_control_codes_are_spelled_out(capsys):
    name = "a\x1b[31m\x07\x9b2J\té\n"

    def run(args):
        output.note(args, name)
        return Result(name, {"name": name})

    said = "a\\x1b[31m\\x07\\x9b2J\té\n"
    assert execute(parsed(run)) == 0
    assert [*capsys.readouterr()] == [f"{said}\n"] * 2
    fail = Mock(side_effect=StructPruneError(name))
    assert execute(parsed(fail)) == 2 and "a\\x1b[31m\\x07\\x9b2J é" in capsys.readouterr().err


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
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" | true; echo ${{PIPESTATUS[0]}}'],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "0\n" and done.stderr == ""


@pytest.mark.parametrize(("error", "message"), [
    (OFFLINE, "OSError: offline (because of ConnectionError: no"),
    (DISK_FULL, "/out/model.safetensors: No space left on device."),
    (MemoryError(), "There is not enough memory: MemoryError"),
    (StructPruneError("Two\n lines."), "structprune: error: Two lines."),
    (torch.OutOfMemoryError("CUDA out of memory."), "There is not enough memory: CUDA out of memory."),
])  # fmt: skip
def test_errors_of_the_input_and_the_machine_are_one_line_and_exit_code_2(error, message, capsys):
    assert execute(parsed(Mock(side_effect=error))) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more and line.startswith("structprune: error: ") and message in line and "unexpected" not in line


def test_bugs_are_one_line_with_a_hint_and_the_debug_switch_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.delenv("STRUCTPRUNE_DEBUG", raising=False)
    for fail in (lambda args: 1 / 0, lambda args: torch.zeros(2) @ torch.zeros(3)):
        assert execute(parsed(fail)) == 1
        line, *more = capsys.readouterr().err.splitlines()
        assert not more and line.endswith("please report it with what STRUCTPRUNE_DEBUG=1 in the environment shows.")
    for switch, error, code in (("1", KeyError("a"), 1), ("1", DISK_FULL, 2), ("0", DISK_FULL, 2)):
        monkeypatch.setenv("STRUCTPRUNE_DEBUG", switch)
        assert execute(parsed(Mock(side_effect=error))) == code
        assert ("Traceback" in capsys.readouterr().err) == (switch == "1")
