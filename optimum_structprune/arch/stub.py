"""A first description of an unknown architecture, for a person to check."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import yaml
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import StructPruneError
from .families import builtin_families
from .load import resolve
from .shrink import text_config
from .spaces import Shapes, heads_of


Roles = dict[str, dict[str, list[str]]]

IN_A_LIST = re.compile(r"(.+?)\.(\d+)\.(.+)")
# The last parts of the names of projections that write to the residual stream; what else reads it is a producer.
CONSUMER = re.compile(
    r"(o_proj|out_proj|c_proj|down_proj|out|wo|Wo|w2|fc2|fc_out|lin2|dense|dense_4h_to_h|\w*output\w*)$"
)
# Tensors that only state-space mixers, linear attention and convolutions have.
MIXER = re.compile(r"(A_log|dt_bias|(^|\.)conv\w*\.weight)$")
EXPERT_KEY = re.compile(r"expert")
WIDTH_KEY = re.compile(r"intermediate|ffn|ff_|inner|d_ff|shared")
UNKNOWN_KEY = "WHICH_CONFIG_KEY"


def stub(model: PreTrainedModel) -> str:
    """YAML in the form of `families.yaml`, made from the model's tensor-parallel plan and its weights' names and
    shapes.

    What the plan names comes first; elsewhere, and without a plan, a projection that reads the residual stream is a
    producer, and one that writes it a consumer. The package never uses a stub by itself: neither the plan nor a name
    says how rows fall into units or what else is coupled. Matrices that no space takes are listed as comments.
    """
    config = text_config(model.config)
    shapes = {
        name.removeprefix(f"{model.base_model_prefix}."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    near = nearest(config, shapes) or "none"
    path, tensors = _layer_tensors(shapes)
    if not tensors:
        raise StructPruneError(
            f"{config.model_type!r} has no list of layers to make a stub from; the nearest family is {near}, start "
            "from its entry in families.yaml."
        )
    width = _residual_width(model, tensors)
    plan = _by_plan(getattr(config, "base_model_tp_plan", None) or {}, tensors)
    spaces = dict(_spaces({**_by_shape(tensors, width), **plan}, tensors, config))
    spaces.update(_experts(tensors, width, config))
    entry = [{"model_types": [config.model_type], "layer_path": path, "spaces": spaces}]
    head = [
        f"# A stub for {config.model_type}: check every line, then pass the file as --arch.",
        f"# The nearest family by names and shapes is {near}.",
    ]
    rest = [name for name, shape in tensors.items() if len(shape) > 1 and _module(name) not in _taken(spaces)]
    if not plan:
        head.append("# transformers has no tensor-parallel plan for it: all roles are guessed from names and shapes.")
    head += [f"# No space has {_module(name)}, {' x '.join(map(str, tensors[name]))}." for name in rest]
    return "\n".join([*head, yaml.safe_dump(entry, sort_keys=False).rstrip()])


def nearest(config: PretrainedConfig, shapes: Shapes) -> str | None:
    """The described model type most of whose tensors are there in the right shape; None where none fits."""
    best: tuple[int, str | None] = (0, None)
    for model_type, family in builtin_families().items():
        try:
            fitting = len({axis.param for space in resolve(family, config, shapes).spaces for axis in space.axes})
        except Exception:  # an odd config fails in a way of its own with every template that does not fit it
            continue
        best = max(best, (fitting, model_type), key=lambda pair: pair[0])
    return best[1]


def _layer_tensors(shapes: Shapes) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The path of the list of layers with the most parameters, and the shape of every tensor that some layer has."""
    params: Counter[str] = Counter()
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := IN_A_LIST.fullmatch(name):
            path, _, rest = match.groups()
            params[path] += prod(shape)
            tensors.setdefault(path, {}).setdefault(rest, shape)
    if not params:
        return "", {}
    path = params.most_common(1)[0][0]
    return path, tensors[path]


def _residual_width(model: PreTrainedModel, tensors: Shapes) -> int:
    """The number of channels of the residual stream: the most frequent dimension of the matrices in the layers, unless
    the config says it.
    """
    config = text_config(model.config)
    stated = getattr(config, "hidden_size", None)
    if isinstance(stated, int):
        return stated
    return Counter(size for shape in tensors.values() if len(shape) == 2 for size in shape).most_common(1)[0][0]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _taken(spaces: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The modules and parameters that the spaces name."""
    names = {
        f"{space['experts']}.{leaf}"
        for space in spaces.values()
        if "out" in space and "experts" in space
        for leaf in (*space["out"], *space["in"])
    }
    names |= {name for space in spaces.values() if "experts" not in space for name in (*space["out"], *space["in"])}
    return names | {space["router"] for space in spaces.values() if "router" in space}


def _by_plan(plan: Mapping[str, str], tensors: Shapes) -> Roles:
    """For each module, the names of its projections that split by rows (producers) and by columns (consumers); modules
    that lack one of the two are left out.
    """
    roles: Roles = {}
    for pattern, style in plan.items():
        name = pattern.partition(".*.")[2]
        side = {"colwise": "out", "rowwise": "in"}.get(style.removesuffix("_rep").removesuffix("_gather_output"))
        if side and f"{name}.weight" in tensors:
            roles.setdefault(name.rpartition(".")[0], {"out": [], "in": []})[side].append(name)
    return {owner: role for owner, role in roles.items() if role["out"] and role["in"]}


def _by_shape(tensors: Shapes, width: int) -> Roles:
    """The same as `_by_plan`, guessed: a producer reads the residual stream, and a consumer writes it. State-space
    mixers, linear attention and convolutions are left out.
    """
    roles: Roles = {}
    mixers = {name.rpartition(".")[0] for name in tensors if MIXER.search(name)}
    mixers |= {owner.rpartition(".")[0] for owner in mixers if owner.rpartition(".")[2].startswith("conv")}
    for name, shape in tensors.items():
        module = _module(name)
        if len(shape) != 2 or module == name or width not in shape:
            continue
        owner, _, leaf = module.rpartition(".")
        writes = shape[0] == width and (shape[1] != width or CONSUMER.search(leaf) is not None)
        if writes or shape[1] == width:
            roles.setdefault(owner, {"out": [], "in": []})["in" if writes else "out"].append(module)
    return _paired({owner: role for owner, role in roles.items() if owner not in mixers})


def _paired(roles: Roles) -> Roles:
    """Roles of modules that have both sides; those with one side are put together in the module that holds them."""
    while alone := {owner for owner, role in roles.items() if owner and not (role["out"] and role["in"])}:
        depth = max(owner.count(".") for owner in alone)
        for owner in [owner for owner in alone if owner.count(".") == depth]:
            role, parent = roles.pop(owner), roles.setdefault(owner.rpartition(".")[0], {"out": [], "in": []})
            for side, modules in role.items():
                parent[side] += modules
    return {owner: role for owner, role in roles.items() if role["out"] and role["in"]}


def _spaces(roles: Roles, tensors: Shapes, config: PretrainedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    names: set[str] = set()
    for owner, role in roles.items():
        kind = "attention" if "attn" in owner or "attention" in owner else owner.rpartition(".")[2] or "mlp"
        name = kind if kind not in names else owner.replace(".", "_")
        names.add(name)
        make = _heads if kind == "attention" else _channels
        space = make(role, tensors, config)
        if space["out"]:
            yield name, space


def _heads(role: Mapping[str, list[str]], tensors: Shapes, config: PretrainedConfig) -> dict[str, Any]:
    try:
        heads, groups, head_dim = heads_of(config.per_layer_config[0] if config.is_heterogeneous else config)
    except (AttributeError, TypeError, ZeroDivisionError):
        heads, groups, head_dim = 1, 1, 0
    query, packed = heads * head_dim, (heads + 2 * groups) * head_dim

    def unit(name: str, dim: int) -> str | list[str]:
        rows = tensors[f"{name}.weight"][dim]
        if dim == 0 and rows == packed:
            return ["q", "kv", "kv"]
        if dim == 0 and rows == 2 * query and heads != groups:
            return "q_gate"
        return "q" if rows > groups * head_dim or heads == groups else "kv"

    return {
        "size": "num_key_value_heads",
        "also": ["num_attention_heads"],
        "pin": ["head_dim"],
        "out": {name: unit(name, 0) for name in role["out"]},
        "in": {name: unit(name, 1) for name in role["in"]},
    }


def _channels(role: Mapping[str, list[str]], tensors: Shapes, config: PretrainedConfig) -> dict[str, Any]:
    size = tensors[f"{role['in'][0]}.weight"][1]
    rows = {name: tensors[f"{name}.weight"][0] for name in role["out"]}
    return {
        "size": _key(config, size),
        "out": {name: _units(count, size) for name, count in rows.items() if count in (size, 2 * size)},
        "in": dict.fromkeys(role["in"], "unit"),
    }


def _units(rows: int, size: int) -> str | list[str]:
    return ["unit", "unit"] if rows == 2 * size else "unit"


def _key(config: PretrainedConfig, size: int, sounds: re.Pattern[str] = WIDTH_KEY) -> str:
    """The config key that has this value; rather one that sounds like what it counts."""
    keys = [key for key, value in config.to_dict().items() if value == size and key != "vocab_size"]
    return next((key for key in keys if sounds.search(key)), keys[0] if keys else UNKNOWN_KEY)


def _experts(tensors: Shapes, width: int, config: PretrainedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The spaces of stacked experts: the channels inside them, and whole experts where a router is found."""
    stacks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if len(shape) == 3 and width in shape[1:] and leaf != "weight":
            stacks.setdefault(owner, {})[leaf] = shape
    for owner, params in stacks.items():
        into = [leaf for leaf in params if CONSUMER.search(leaf)]
        out = [leaf for leaf in params if leaf not in into]
        if not into or not out:
            continue
        transposed = params[into[0]][2] == width != params[into[0]][1]
        rows, columns = (2, 1) if transposed else (1, 2)
        size = params[into[0]][columns]
        yield (
            "expert_mlp" if owner == "" else f"{owner.replace('.', '_')}_mlp",
            {
                "size": _key(config, size),
                "experts": owner,
                **({"transposed": True} if transposed else {}),
                "out": {leaf: _units(params[leaf][rows], size) for leaf in out},
                "in": dict.fromkeys(into, "unit"),
            },
        )
        count = params[into[0]][0]
        beside = owner.rpartition(".")[0]
        routers = [_module(n) for n, s in tensors.items() if s == (count, width) and n.startswith(beside)]
        if routers:
            yield "expert", {"size": _key(config, count, EXPERT_KEY), "router": routers[0], "experts": owner}
