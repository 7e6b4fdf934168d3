"""Every snippet in the README and the docs runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import real_text_model

from optimum_structprune import StructPruneConfig
from optimum_structprune.domains.builtin import builtin_documents


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent


def snippets(language: str):
    for page in PAGES:
        for number, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)):
            yield pytest.param(page, match[1], id=f"{page.name}-{number}")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which the names that the snippets use exist, so that they run as they stand."""
    import json

    folder = tmp_path_factory.mktemp("desk")
    model, tokenizer = real_text_model()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    lines = (json.dumps({"text": text}) for _, text in zip(range(400), builtin_documents("math", 7), strict=False))
    (folder / "notes.jsonl").write_text("\n".join(lines))
    items = ({"query": "Question: One and one?", "choices": ["two", "three"], "gold": i % 2} for i in range(4))
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, items)))
    readme = (ROOT / "README.md").read_text()
    (folder / "run.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", readme, re.M | re.S)[1])
    return folder


@pytest.mark.parametrize(("page", "code"), snippets("python"))
def test_python(page, code, desk, monkeypatch):
    monkeypatch.chdir(desk)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "code"), snippets("bash"))
def test_bash(page, code, desk):
    makefile = (ROOT / "Makefile").read_text()
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), f"{words[1]} is no target of the Makefile"
        elif words and (BIN / words[0]).exists() and words[0] not in ("python", "pip"):
            done = subprocess.run([BIN / words[0], *words[1:]], cwd=desk, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
        elif words and words[0] == "python":
            assert (ROOT / words[1]).exists(), f"{words[1]} does not exist"
        elif words:
            raise AssertionError(f"{page.name}: nothing checks {line!r}")


@pytest.mark.parametrize(("page", "text"), snippets("yaml"))
def test_yaml(page, text):
    StructPruneConfig.from_dict(yaml.safe_load(text))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_documented():
    import optimum_structprune

    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in optimum_structprune.__all__ if name not in text] == []
