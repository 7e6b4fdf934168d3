"""The rules for the code of the package that a machine can check."""

import ast
import re
import sys
from pathlib import Path

import pytest

import optimum_structprune
from optimum_structprune.commands.flags import COMMANDS


PACKAGE = Path(optimum_structprune.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
# The folders from the lowest layer to the highest. A folder imports only lower folders. A file at the root that
# imports a folder is just below `commands`; other files at the root are the lowest.
ORDER = (
    "system config arch domains method widths criteria record vocabulary measure saving distillation recovery steps "
    "pruning search evaluation commands"
).split()


def module_name(path: Path) -> tuple[str, ...]:
    """Return the name of a module inside the package, in parts."""
    names = path.relative_to(PACKAGE).with_suffix("").parts
    if names[-1] == "__init__":
        return names[:-1]
    return names


def type_checking_nodes(tree) -> set[int]:
    """Return the ids of all nodes inside `if TYPE_CHECKING` blocks."""
    nodes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes.update(id(inner) for inner in ast.walk(node))
    return nodes


def is_module(name: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*name)
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path, typing: bool = False) -> list[tuple[str, ...]]:
    """Return the modules of the package that a file imports. `typing` includes imports for type checkers."""
    tree = TREES[path]
    nodes_for_typing = type_checking_nodes(tree)
    package = path.relative_to(PACKAGE).parts[:-1]

    modules = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if id(node) in nodes_for_typing and not typing:
            continue
        names = (node.module or "").split(".")
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif names[0] == "optimum_structprune":
            base = ()
            names = names[1:]
        else:
            continue

        for alias in node.names:
            module = (*base, *names, alias.name)
            module = tuple(name for name in module if name)
            while module and not is_module(module):  # The last name is a function or a class.
                module = module[:-1]
            modules.append(module)
    return modules


def layer_numbers() -> dict[str, float]:
    """Return the number of the layer of each folder and of each file at the root."""
    numbers = {name: number for number, name in enumerate(ORDER, start=1)}
    for path in PACKAGE.glob("*.py"):
        imports_folder = any(module and module[0] in ORDER for module in imports(path))
        numbers[path.stem] = numbers["commands"] - 0.5 if imports_folder else 0
    return numbers


def test_all_folders_have_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == set(ORDER)


def test_modules_import_only_lower_layers():
    """This holds for imports for type checkers too, because a reader has to know their names."""
    numbers = layer_numbers()
    for path in FILES:
        # `__init__` exports names of all layers, and `__main__` starts the highest layer.
        if path.name in ("__init__.py", "__main__.py"):
            continue
        name = module_name(path)
        for imported in imports(path, typing=True):
            if imported and imported[0] != name[0]:
                assert numbers[imported[0]] <= numbers[name[0]], f"{name} imports {imported}, which is a higher layer"


def test_only_the_command_prune_imports_another_command():
    commands = {("commands", command.function.split(".")[0]) for command in COMMANDS}
    for path in FILES:
        name = module_name(path)
        if name in commands and name != ("commands", "prune"):
            assert commands.isdisjoint(imports(path)), path


def test_the_method_imports_only_the_architecture():
    """A reader can understand and use the method without text, records and the steps of a run."""
    for path in sorted((PACKAGE / "method").glob("*.py")):
        folders = {module[0] for module in imports(path, typing=True) if module}
        assert folders <= {"method", "arch", "config", "system"}, f"{path.stem} imports {folders}"


def test_there_are_no_circular_imports():
    graph = {}
    for path in FILES:
        name = module_name(path)
        graph[name] = {module for module in imports(path) if module != name}
    visited = set()
    chain = []

    def visit(module):
        circle = [".".join(name) for name in chain + [module]]
        assert module not in chain, " -> ".join(circle)
        if module in visited or not module:
            return

        chain.append(module)
        for imported in graph.get(module, ()):
            visit(imported)
        chain.pop()
        visited.add(module)

    for module in graph:
        visit(module)


# Packages by the modules that have another name.
PACKAGE_NAMES = {"yaml": "pyyaml"}
# Optional packages: `make deepspeed`, the extra `languages`, and sentence-transformers.
OPTIONAL = {"deepspeed", "wordfreq", "sentence_transformers"}


def test_every_imported_package_is_declared():
    imported = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {"optimum_structprune", *sys.stdlib_module_names}
    packages = {PACKAGE_NAMES.get(module, module) for module in imported}

    project = (PACKAGE.parent / "pyproject.toml").read_text()
    requirements = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.M | re.S)[1]
    assert packages - OPTIONAL == set(re.findall(r"^    \"([\w-]+)", requirements, re.M))


def test_every_folder_has_a_docstring():
    for name in ORDER:
        tree = ast.parse((PACKAGE / name / "__init__.py").read_text())
        assert ast.get_docstring(tree), name


# Forbidden patterns, with the reason, and the beginnings of the names of modules that may contain them.
RULES = {
    r"register_\w*hook": ("hooks are registered in arch/hooks.py only", ("arch.hooks",)),
    r"(gate|up|down|[qkvo])_proj": ("names of projections", ("arch.",)),
    r"[\"'](llama|qwen\w*|gemma\w*|mistral|gpt2|opt)[\"']": ("names of families", ("arch.",)),
    r"nn\.Parameter\(": (
        "parameters are created where modules are replaced and layers shrink",
        ("arch.modules", "method.shrink", "method.resize", "steps."),
    ),
    r"torch\.load\(|pickle|torch\.save\(|yaml\.(full_|unsafe_)load\(": ("files hold data, not code", ()),
    r"(?<![\w.])(eval|exec|compile)\(": ("text is never run as code", ()),
    r"TODO|FIXME|XXX|except:": ("finished code", ()),
    r"(?m)^\s*print\(": ("only commands print", ("commands.",)),
}


def test_no_module_contains_a_forbidden_pattern():
    for path in FILES:
        text = path.read_text()
        name = ".".join(module_name(path))
        for pattern, (reason, allowed) in RULES.items():
            if name.startswith(allowed):
                continue
            match = re.search(pattern, text)
            assert not match, f"{name}: {match[0]!r}: {reason}"


def methods_of(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [member for member in node.body if isinstance(member, ast.FunctionDef)]


def documented_methods(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Return the names of the methods with a docstring, in a class or in one of its base classes in the package."""
    names = {method.name for method in methods_of(node) if ast.get_docstring(method)}
    for base in node.bases:
        base_name = ast.unparse(base)
        if base_name in classes:
            names |= documented_methods(classes[base_name], classes)
    return names


def undocumented(node, classes) -> list[str]:
    """Return the name of a function or class without a docstring, and of its public methods without one."""
    names = []
    if not ast.get_docstring(node):
        names.append(node.name)

    if isinstance(node, ast.ClassDef):
        documented = documented_methods(node, classes)
        for method in methods_of(node):
            if not method.name.startswith("_") and method.name not in documented:
                names.append(f"{node.name}.{method.name}")
    return names


def is_overload(node) -> bool:
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def test_public_functions_and_classes_have_docstrings():
    nodes = []
    classes = {}
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                nodes.append((path, node))
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node

    names = []
    for path, node in nodes:
        # The function itself has the docstring of its overloads.
        if not node.name.startswith("_") and not is_overload(node):
            module = ".".join(module_name(path))
            names += [f"{module}.{name}" for name in undocumented(node, classes)]
    assert not names


def test_every_public_name_resolves():
    for name in optimum_structprune.__all__:
        assert callable(getattr(optimum_structprune, name)), name

    with pytest.raises(AttributeError, match="nothing_such"):
        _ = optimum_structprune.nothing_such
