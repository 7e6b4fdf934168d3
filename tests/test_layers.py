"""The house rules that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

import optimum_structprune


PACKAGE = Path(optimum_structprune.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up. A module imports only from its own layer's earlier modules and from lower layers.
LAYERS = [
    ["errors"],
    ["registry", "yaml_text", "arch.spec", "arch.depth", "block_init", "calibration.problems", "distill"],
    ["calibration.calls", "calibration.clock"],
    ["schema", "fingerprint", "tasks"],
    ["recovery_config", "calibration.presets", "calibration.templates"],
    ["calibration.packing", "calibration.manifest", "calibration.stats", "arch.families", "config", "plan", "report"],
    ["modeling_file"],
    [
        "heterogeneous",
        "ranking",
        "arch.spaces",
        "arch.shrink",
        "arch.table",
        "calibration.experts",
        "refit",
        "calibration.collect",
        "calibration.builtin",
        "calibration.aggregate",
        "reweight",
        "metrics",
        "adapter",
        "teacher",
    ],
    ["arch.stream"],
    ["arch.load", "arch.meta", "measure", "teacher_logits", "calibration.generated"],
    [
        "arch.stub",
        "calibration.taps",
        "calibration.capture",
        "criteria.base",
        "surgery",
        "allocation",
        "schedule",
        "calibration.sources",
        "calibration.select",
    ],
    ["criteria.flap", "criteria.magnitude", "criteria.obs", "criteria.random", "criteria.taylor", "criteria.wanda"],
    ["criteria", "criteria.layers", "calibration.blocks", "checks", "halving"],
    ["budget", "calibration.evidence", "calibration.passes", "calibration.heldout", "calibration.gradients"],
    ["depth", "hidden", "distill_trainer", "calibration.stored"],
    ["sweep", "hub", "evaluation", "optimizer_state", "averages"],
    ["checkpoint", "coarse", "calibration.record"],
    ["rounds"],
    ["recovery", "export", "sensitivity"],
    ["pruner"],
    ["trainer", "dryrun"],
    ["commands.loading", "commands.arguments"],
    ["commands.recover", "commands.inspect", "commands.evaluate", "commands.export"],
    ["commands.prune"],
    ["commands.plan", "commands.calibrate"],
    ["commands.cli"],
    ["commands.register_structprune"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path):
    """Modules of this package that a file imports at run time, whole names."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    here = list(path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only:
            continue
        if node.level:
            base = here[: len(here) - node.level + 1]
        elif (node.module or "").startswith("optimum_structprune"):
            base = []
        else:
            continue
        module = (node.module or "").removeprefix("optimum_structprune").strip(".")
        whole = ".".join([*base, *filter(None, [module])])
        if whole in RANK:
            yield whole
        else:
            for alias in node.names:
                name = ".".join(filter(None, [whole, alias.name]))
                if name in RANK:
                    yield name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_only_from_lower_layers(path):
    name = module_name(path)
    if name in ("", "arch", "calibration", "commands"):
        assert not list(imports(path)), "a package's own file imports nothing at run time"
        return
    assert name in RANK, f"{name} has no place in LAYERS"
    for other in imports(path):
        assert RANK[other] < RANK[name], f"{name} imports {other}, which is not in a lower layer"


def test_every_module_in_the_layers_exists():
    assert set(RANK) <= {module_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_house_rules(path):
    text = path.read_text()
    name = module_name(path)
    if name != "calibration.collect":
        assert not re.search(r"register_\w*hook", text), "hooks are registered in calibration/collect.py only"
    if not name.startswith("arch"):
        assert not re.search(r"(gate|up|down|[qkvo])_proj|[\"'](llama|qwen\w*|gemma\w*|mistral|gpt2|opt)[\"']", text)
    if name != "surgery":
        assert "nn.Parameter(" not in text, "parameters are created in surgery.py only"
    assert not re.search(r"torch\.load\(|pickle|torch\.save\(|yaml\.load\(", text)
    assert not re.search(r"TODO|FIXME|XXX|except:", text)
    if not name.startswith("commands"):
        assert not re.search(r"^\s*print\(", text, re.MULTILINE)
    assert path.stem not in ("utils", "helpers", "common")
    assert text.count("\n") <= 300


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield path, node


def test_functions_are_short():
    # Docstrings do not count: a long contract is no fault.
    long = []
    for path, node in functions():
        doc = node.body[0] if ast.get_docstring(node) else None
        lines = node.end_lineno - node.body[0].lineno + 1 - ((doc.end_lineno - doc.lineno + 1) if doc else 0)
        if lines > 40:
            long.append(f"{module_name(path)}.{node.name}: {lines}")
    assert not long


def test_public_functions_and_classes_have_docstrings():
    bare = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                members = [n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)]
                public = [n for n in members if isinstance(node, ast.ClassDef) and not n.name.startswith("_")]
                bare += [f"{module_name(path)}.{n.name}" for n in [node, *public] if not ast.get_docstring(n)]
    assert not bare


def test_every_public_name_resolves():
    for name in optimum_structprune.__all__:
        assert callable(getattr(optimum_structprune, name)), name
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = optimum_structprune.nothing_such
