"""The house rules that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

import optimum_structprune
from optimum_structprune.commands.flags import COMMANDS


PACKAGE = Path(optimum_structprune.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
# From the ground up. The files at the root lie above `evaluation` if they import a folder, and below `config` if not.
ORDER = (
    "system config arch method forward widths domains vocabulary criteria record sources steps saving recovery "
    "pruning search evaluation commands"
)


def parts(path: Path) -> tuple[str, ...]:
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


def imports(path: Path, typing: bool = False):
    """Modules of this package that a file imports, as tuples of names."""
    tree = TREES[path]
    typed = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (id(node) in typed and not typing):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").partition(".")[0] == "optimum_structprune":
            base = ()
        else:
            continue
        names = tuple(filter(None, (node.module or "").removeprefix("optimum_structprune").split(".")))
        for alias in node.names:
            module = (*base, *names, alias.name)
            while module and not (
                PACKAGE.joinpath(*module).is_dir() or PACKAGE.joinpath(*module).with_suffix(".py").is_file()
            ):
                module = module[:-1]
            yield module


def floors() -> dict[str, int]:
    """Number of the floor of every entry at the root."""
    order = ORDER.split()
    floor = {name: number for number, name in enumerate(order, start=1)}
    for path in PACKAGE.glob("*.py"):
        own = {module[0] for module in imports(path) if module}
        floor[path.stem] = floor["commands"] - 0.5 if own & set(order) else 0
    return floor


def test_imports_go_down_and_only_prune_goes_on_to_another_command():
    floor, modules = floors(), {("commands", command.function.partition(".")[0]) for command in COMMANDS}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {*ORDER.split()}
    for path in FILES:
        own = parts(path)
        assert own not in modules - {("commands", "prune")} or not modules & {*imports(path)}, path
        # An import for type checkers alone goes down as well: the file needs that name to be read.
        for other in imports(path, typing=True):
            # `__init__` names what the layers offer, and `__main__` starts the topmost.
            if own and other and own[0] != other[0] and path.name not in ("__init__.py", "__main__.py"):
                assert floor[other[0]] <= floor[own[0]], f"{own} imports {other}, which lies above it"


def test_the_method_stands_on_the_architecture_alone():
    """So it can be read, and used, without anything else of the package."""
    for path in sorted((PACKAGE / "method").glob("*.py")):
        others = {other[0] for other in imports(path, typing=True) if other}
        assert others <= {"method", "arch", "errors"}, f"{path.stem} imports {others}"


def test_there_are_no_circles():
    graph = {parts(path): {module for module in imports(path) if module != parts(path)} for path in FILES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join(".".join(name) for name in [*path[path.index(module) :], module])
        if module in done or not module:
            return
        path.append(module)
        for other in graph.get(module, ()):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_every_folder_says_what_it_holds():
    for name in ORDER.split():
        assert ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())), name


# What no file may have, what stands for its reason, and the files that may: they begin with one of these names.
RULES = {
    r"register_\w*hook": ("hooks are registered in arch/hooks.py only", ("arch.hooks",)),
    r"(gate|up|down|[qkvo])_proj": ("names of projections", ("arch.",)),
    r"[\"'](llama|qwen\w*|gemma\w*|mistral|gpt2|opt)[\"']": ("names of families", ("arch.",)),
    r"nn\.Parameter\(": (
        "parameters are created where modules are replaced and layers shrink",
        ("arch.modules", "method.shrink", "steps."),
    ),
    r"torch\.load\(|pickle|torch\.save\(|yaml\.(full_|unsafe_)load\(": ("files hold data, not code", ()),
    r"(?<![\w.])(eval|exec|compile)\(": ("text is never run as code", ()),
    r"TODO|FIXME|XXX|except:": ("finished code", ()),
    r"(?m)^\s*print\(": ("only commands print", ("commands.",)),
}


def test_house_rules():
    for path in FILES:
        text, name = path.read_text(), ".".join(parts(path))
        for pattern, (reason, allowed) in RULES.items():
            where = None if name.startswith(allowed) else re.search(pattern, text)
            assert not where, f"{name}: {where[0]!r}: {reason}"


def described_members(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """The methods that a class of the package, or one that it derives from, says something of."""
    own = {member.name for member in node.body if isinstance(member, ast.FunctionDef) and ast.get_docstring(member)}
    bases = [classes[name] for base in node.bases if (name := ast.unparse(base)) in classes]
    return own.union(*(described_members(base, classes) for base in bases))


def test_public_functions_and_classes_have_docstrings():
    classes = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    bare = []
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                    continue  # the docstring is that of the function itself
                described = described_members(node, classes) if isinstance(node, ast.ClassDef) else set()
                members = [n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)]
                public = [n for n in members if isinstance(node, ast.ClassDef) and not n.name.startswith("_")]
                silent = [node, *(member for member in public if member.name not in described)]
                bare += [f"{'.'.join(parts(path))}.{n.name}" for n in silent if not ast.get_docstring(n)]
    assert not bare


def test_every_public_name_resolves():
    for name in optimum_structprune.__all__:
        assert callable(getattr(optimum_structprune, name)), name
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = optimum_structprune.nothing_such
