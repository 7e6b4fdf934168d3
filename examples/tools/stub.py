"""Print a first description of an unknown architecture, which you have to check.

    python examples/tools/stub.py MODEL [--trust-remote-code] > mine.yaml

Check the file, then pass it to any command of `structprune` with `--arch mine.yaml`.
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
from optimum_structprune.system.errors import StructPruneError


Roles = dict[str, dict[str, list[str]]]

IN_A_LIST = re.compile(r"(.+?)\.(\d+)\.(.+)")
WIDTH_KEY = re.compile(r"intermediate|ffn|ff_|inner|d_ff|shared")
UNKNOWN_KEY = "WHICH_CONFIG_KEY"
# The style of stacked experts, and the dimensions of their weights: experts, rows, columns.
EXPERT_STYLE = "grouped_gemm"
EXPERT_DIMS = 3


def stub(model: PreTrainedModel) -> str:
    """Return a first description of a model, in the format of the files in `arch/families`.

    The spaces come from the tensor-parallel plan of the model and from the shapes of its weights. Without a plan, they
    are the spaces of the nearest family. Matrices that belong to no space are listed in comments.

    The package never uses a stub by itself, because a plan does not say how rows are grouped into units or which other
    weights are coupled.
    """
    config = model.config.get_text_config()
    prefix = f"{model.base_model_prefix}."
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    family = nearest(config, shapes) or "none"

    layer_path, tensors = _layer_tensors(shapes)
    if not tensors:
        raise StructPruneError(
            f"{config.model_type!r} has no list of layers to make a stub from; the nearest family is {family}, start "
            "from its file in arch/families."
        )

    roles = _roles(_parallel_plan(config), tensors)
    spaces = dict(_spaces(roles, tensors, config))
    if not spaces:
        spaces = _spaces_of_family(family)

    lines = [
        f"# A stub for {config.model_type}: check every line, then pass the file as --arch.",
        f"# The nearest family by names and shapes is {family}.",
    ]
    if not roles:
        lines.append("# transformers has no tensor-parallel plan of its layers: the spaces are the nearest family's.")
    lines.extend(_comments_on_other_matrices(spaces, tensors))

    entry = {"model_types": [config.model_type], "layer_path": layer_path, "spaces": spaces}
    lines.append(yaml.safe_dump([entry], sort_keys=False).rstrip())
    return "\n".join(lines)


def _spaces_of_family(model_type: str) -> dict[str, Any]:
    """Return the spaces in the description of a model type, or no spaces if the model type is not described."""
    for path in FAMILIES_FOLDER.glob("*.yaml"):
        for entry in parse_yaml(path.read_text(encoding="utf-8")):
            if model_type in entry["model_types"]:
                return entry.get("spaces", {})
    return {}


def _comments_on_other_matrices(spaces: Mapping[str, Any], tensors: TensorShapes) -> Iterator[str]:
    """Yield a comment for each matrix of a layer that belongs to no space."""
    names_in_spaces: set[str] = set()
    for space in spaces.values():
        names_in_spaces.update(_names(space))

    for tensor_name, shape in tensors.items():
        name = tensor_name.removesuffix(".weight")
        if len(shape) > 1 and name not in names_in_spaces:
            sizes = " x ".join(map(str, shape))
            yield f"# No space has {name}, {sizes}."


def _names(space: Mapping[str, Any]) -> list[str]:
    """Return the names of the modules and parameters of a space, relative to the layer."""
    names = list(space.get("producers", ())) + list(space.get("consumers", ()))
    if "experts" in space and "router" not in space:
        return [f"{space['experts']}.{name}" for name in names]
    return names


def nearest(config: PretrainedConfig, shapes: TensorShapes) -> str | None:
    """Return the described model type that shares the most tensors with a model, or None if none shares a tensor."""
    nearest_type = None
    most_tensors = 0

    for model_type, family in builtin_families().items():
        try:
            spaces = resolve(family, config, shapes).spaces
        except Exception:  # A description of another architecture may raise any error.
            continue

        params: set[str] = set()
        for space in spaces:
            params.update(axis.param for axis in space.axes)
        if len(params) > most_tensors:
            nearest_type = model_type
            most_tensors = len(params)

    return nearest_type


def _layer_tensors(shapes: TensorShapes) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Return the path of the largest list of layers, and the shapes of the tensors of its layers by name."""
    num_params: Counter[str] = Counter()
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = IN_A_LIST.fullmatch(name)
        if match is not None:
            path, _, name_in_layer = match.groups()
            num_params[path] += prod(shape)
            tensors.setdefault(path, {}).setdefault(name_in_layer, shape)

    if not num_params:
        return "", {}
    largest_path = num_params.most_common(1)[0][0]
    return largest_path, tensors[largest_path]


def _parallel_plan(config: PretrainedConfig) -> dict[str, str]:
    """Return the style of each projection in the plans of transformers.

    From transformers 5.25, only the plan of expert parallelism has the weights of the experts.
    """
    plan: dict[str, str] = dict(getattr(config, "base_model_ep_plan", None) or {})
    plan.update(getattr(config, "base_model_tp_plan", None) or {})
    return plan


def _roles(plan: Mapping[str, str], tensors: TensorShapes) -> Roles:
    """Return the producers and the consumers of each module that has both.

    Producers are the projections that the plan splits by rows, consumers the projections that it splits by columns.
    The plan of expert parallelism does not split a projection, so the name of the projection decides.
    """
    roles: Roles = {}
    for pattern, style in plan.items():
        name = pattern.partition(".*.")[2]
        is_expert = style == EXPERT_STYLE and len(tensors.get(name, ())) == EXPERT_DIMS
        if "colwise" in style or (is_expert and "down" not in name):
            side = "producers"
        elif "rowwise" in style or is_expert:
            side = "consumers"
        else:
            continue

        if name in tensors or f"{name}.weight" in tensors:
            module = name.rpartition(".")[0]
            role = roles.setdefault(module, {"producers": [], "consumers": []})
            role[side].append(name)

    return {module: role for module, role in roles.items() if role["producers"] and role["consumers"]}


def _spaces(roles: Roles, tensors: TensorShapes, config: PretrainedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the description of the space of each module."""
    for module, role in roles.items():
        consumer = role["consumers"][0]
        if consumer in tensors:
            name = f"{module.replace('.', '_')}_mlp"
            yield name, _inside_experts(module, role, tensors, config)
        elif "attn" in module or "attention" in module:
            yield "attention", _heads(role, tensors, config)
        else:
            name = module.rpartition(".")[2] or "mlp"
            size = tensors[f"{consumer}.weight"][1]
            rows = {producer: tensors[f"{producer}.weight"][0] for producer in role["producers"]}
            yield name, _channels(config, size, rows, role["consumers"])


def _heads(role: Mapping[str, list[str]], tensors: TensorShapes, config: PretrainedConfig) -> dict[str, Any]:
    """Return a space of attention heads in KV groups."""
    layer_config = config
    if config.is_heterogeneous:
        layer_config = config.per_layer_config[0]
    try:
        heads, groups, head_dim = heads_of(layer_config)
    except (AttributeError, TypeError, ZeroDivisionError):
        heads = 1
        groups = 1
        head_dim = 0

    query_rows = heads * head_dim
    key_rows = groups * head_dim

    def unit_of(name: str) -> str | list[str]:
        rows = tensors[f"{name}.weight"][0]
        if rows == query_rows + 2 * key_rows:
            return ["q", "kv", "kv"]
        if rows == 2 * query_rows and heads != groups:
            return "q_gate"
        if rows > key_rows or heads == groups:
            return "q"
        return "kv"

    return {
        "size": "num_key_value_heads",
        "also": ["num_attention_heads"],
        "pin": ["head_dim"],
        "producers": {name: unit_of(name) for name in role["producers"]},
        "consumers": dict.fromkeys(role["consumers"], "q"),
    }


def _inside_experts(
    module: str, role: Mapping[str, list[str]], tensors: TensorShapes, config: PretrainedConfig
) -> dict[str, Any]:
    """Return a space of the channels inside experts, whose weights are stacked in the parameters of a module."""
    producer_shape = tensors[role["producers"][0]]
    consumer_shape = tensors[role["consumers"][0]]

    # The weights of an expert are stored as (out, in), or transposed as (in, out).
    is_transposed = producer_shape[1] == consumer_shape[2]
    if is_transposed:
        producer_axis = 2
        consumer_axis = 1
    else:
        producer_axis = 1
        consumer_axis = 2

    rows = {name.removeprefix(f"{module}."): tensors[name][producer_axis] for name in role["producers"]}
    consumers = [name.removeprefix(f"{module}.") for name in role["consumers"]]
    space = _channels(config, consumer_shape[consumer_axis], rows, consumers)
    space["experts"] = module
    if is_transposed:
        space["transposed"] = True
    return space


def _channels(config: PretrainedConfig, size: int, rows: Mapping[str, int], consumers: list[str]) -> dict[str, Any]:
    """Return a space of single channels.

    Args:
        config: The config of the model.
        size: The number of channels.
        rows: The number of rows of each producer. A producer with twice as many rows packs two projections.
        consumers: The names of the consumers.
    """
    producers: dict[str, str | list[str]] = {}
    for name, num_rows in rows.items():
        producers[name] = "unit"
        if num_rows > size:
            producers[name] = ["unit"] * (num_rows // size)

    return {
        "size": _width_key(config, size),
        "producers": producers,
        "consumers": dict.fromkeys(consumers, "unit"),
    }


def _width_key(config: PretrainedConfig, size: int) -> str:
    """Return the key of a config that has a size as its value. A key that sounds like an FFN width is preferred."""
    keys = [key for key, value in config.to_dict().items() if value == size and key != "vocab_size"]
    for key in keys:
        if WIDTH_KEY.search(key):
            return key

    if keys:
        return keys[0]
    return UNKNOWN_KEY


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model id or folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)

    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    model = meta_model(config, trust_remote_code=args.trust_remote_code)
    print(stub(model))


if __name__ == "__main__":
    main()
