"""Print a first description of an unknown architecture, for a person to check.

    python examples/tools/stub.py MODEL [--trust-remote-code] > mine.yaml

Once it is checked, each command of `structprune` takes the file with `--arch mine.yaml`.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from optimum_structprune.arch.family import FAMILIES_FOLDER, builtin_families
from optimum_structprune.arch.load import resolve
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.arch.spaces import TensorShapes, heads_of
from optimum_structprune.config.fields import parse_yaml
from optimum_structprune.errors import StructPruneError


Roles = dict[str, dict[str, list[str]]]

IN_A_LIST = re.compile(r"(.+?)\.(\d+)\.(.+)")
WIDTH_KEY = re.compile(r"intermediate|ffn|ff_|inner|d_ff|shared")
UNKNOWN_KEY = "WHICH_CONFIG_KEY"


def stub(model: PreTrainedModel) -> str:
    """Return a file for `arch/families`, made from the model's tensor-parallel plan and the shapes of its weights.

    Without a plan, it is made from the nearest family.

    The package never uses a stub by itself: the plan does not say how rows fall into units or what else is coupled.
    Matrices that no space takes are listed as comments.
    """
    config = model.config.get_text_config()
    shapes = {
        name.removeprefix(f"{model.base_model_prefix}."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    near = nearest(config, shapes) or "none"
    path, tensors = _layer_tensors(shapes)
    if not tensors:
        raise StructPruneError(
            f"{config.model_type!r} has no list of layers to make a stub from; the nearest family is {near}, start "
            "from its file in arch/families."
        )
    roles = _roles(getattr(config, "base_model_tp_plan", None) or {}, tensors)
    files = [parse_yaml(path.read_text(encoding="utf-8")) for path in FAMILIES_FOLDER.glob("*.yaml")]
    entries = [entry for described in files for entry in described if near in entry["model_types"]]
    spaces = dict(_spaces(roles, tensors, config)) or (entries[0].get("spaces", {}) if entries else {})
    head = [
        f"# A stub for {config.model_type}: check every line, then pass the file as --arch.",
        f"# The nearest family by names and shapes is {near}.",
    ]
    if not roles:
        head.append("# transformers has no tensor-parallel plan of its layers: the spaces are the nearest family's.")
    taken = {name for space in spaces.values() for name in _names(space)}
    head += [
        f"# No space has {name.removesuffix('.weight')}, {' x '.join(map(str, shape))}."
        for name, shape in tensors.items()
        if len(shape) > 1 and name.removesuffix(".weight") not in taken
    ]
    entry = [{"model_types": [config.model_type], "layer_path": path, "spaces": spaces}]
    return "\n".join([*head, yaml.safe_dump(entry, sort_keys=False).rstrip()])


def _names(space: Mapping[str, Any]) -> list[str]:
    """The modules and parameters that a space names, from the layer."""
    prefix = f"{space['experts']}." if "experts" in space and "router" not in space else ""
    return [f"{prefix}{name}" for name in (*space.get("producers", ()), *space.get("consumers", ()))]


def nearest(config: PretrainedConfig, shapes: TensorShapes) -> str | None:
    """The described model type most of whose tensors are there in the right shape; None where none fits."""
    best: tuple[int, str | None] = (0, None)
    for model_type, family in builtin_families().items():
        try:
            fitting = len({axis.param for space in resolve(family, config, shapes).spaces for axis in space.axes})
        except Exception:  # a template that does not fit a config may raise anything
            continue
        best = max(best, (fitting, model_type), key=lambda pair: pair[0])
    return best[1]


def _layer_tensors(shapes: TensorShapes) -> tuple[str, dict[str, tuple[int, ...]]]:
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


def _roles(plan: Mapping[str, str], tensors: TensorShapes) -> Roles:
    """For each module, the names of its projections that split by rows (producers) and by columns (consumers); modules
    that lack one of the two are left out.
    """
    roles: Roles = {}
    for pattern, style in plan.items():
        name = pattern.partition(".*.")[2]
        side = "producers" if "colwise" in style else "consumers" if "rowwise" in style else None
        if side and (name in tensors or f"{name}.weight" in tensors):
            roles.setdefault(name.rpartition(".")[0], {"producers": [], "consumers": []})[side].append(name)
    return {owner: role for owner, role in roles.items() if role["producers"] and role["consumers"]}


def _spaces(roles: Roles, tensors: TensorShapes, config: PretrainedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for owner, role in roles.items():
        if role["consumers"][0] in tensors:
            yield f"{owner.replace('.', '_')}_mlp", _inside_experts(owner, role, tensors, config)
        elif "attn" in owner or "attention" in owner:
            yield "attention", _heads(role, tensors, config)
        else:
            size = tensors[f"{role['consumers'][0]}.weight"][1]
            rows = {name: tensors[f"{name}.weight"][0] for name in role["producers"]}
            yield owner.rpartition(".")[2] or "mlp", _channels(config, size, rows, role["consumers"])


def _heads(role: Mapping[str, list[str]], tensors: TensorShapes, config: PretrainedConfig) -> dict[str, Any]:
    try:
        heads, groups, head_dim = heads_of(config.per_layer_config[0] if config.is_heterogeneous else config)
    except (AttributeError, TypeError, ZeroDivisionError):
        heads, groups, head_dim = 1, 1, 0
    query, packed = heads * head_dim, (heads + 2 * groups) * head_dim

    def unit(name: str) -> str | list[str]:
        rows = tensors[f"{name}.weight"][0]
        if rows == packed:
            return ["q", "kv", "kv"]
        if rows == 2 * query and heads != groups:
            return "q_gate"
        return "q" if rows > groups * head_dim or heads == groups else "kv"

    return {
        "size": "num_key_value_heads",
        "also": ["num_attention_heads"],
        "pin": ["head_dim"],
        "producers": {name: unit(name) for name in role["producers"]},
        "consumers": dict.fromkeys(role["consumers"], "q"),
    }


def _inside_experts(
    owner: str, role: Mapping[str, list[str]], tensors: TensorShapes, config: PretrainedConfig
) -> dict[str, Any]:
    """The space of the channels inside the experts that the parameters of a module stack."""
    first, into = tensors[role["producers"][0]], tensors[role["consumers"][0]]
    transposed = first[1] == into[2]  # the residual stream comes first where it is stored (in, out)
    out = {name.removeprefix(f"{owner}."): tensors[name][2 if transposed else 1] for name in role["producers"]}
    names = [name.removeprefix(f"{owner}.") for name in role["consumers"]]
    space = _channels(config, into[1 if transposed else 2], out, names)
    return {**space, "experts": owner, **({"transposed": True} if transposed else {})}


def _channels(config: PretrainedConfig, size: int, rows: Mapping[str, int], into: list[str]) -> dict[str, Any]:
    """A space of single channels; a producer of twice as many rows has two packed parts."""
    keys = [key for key, value in config.to_dict().items() if value == size and key != "vocab_size"]
    return {
        "size": next((key for key in keys if WIDTH_KEY.search(key)), keys[0] if keys else UNKNOWN_KEY),
        "producers": {name: ["unit"] * (count // size) if count > size else "unit" for name, count in rows.items()},
        "consumers": dict.fromkeys(into, "unit"),
    }


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model id or folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    print(stub(meta_model(config, trust_remote_code=args.trust_remote_code)))


if __name__ == "__main__":
    main()
