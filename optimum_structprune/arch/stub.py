"""A first description of an unknown architecture, for a person to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import StructPruneError
from .families import builtin_families
from .load import resolve
from .shrink import text_config
from .spaces import Shapes, heads_of


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Roles = dict[str, dict[str, list[str]]]


def stub(model: PreTrainedModel) -> str:
    """YAML in the form of `families.yaml`, made from the model's tensor-parallel plan and its weights' shapes.

    The package never uses a stub by itself: the plan says which projections produce and consume, but neither how rows
    fall into units nor what else is coupled.

    Raises:
        StructPruneError: If transformers has no tensor-parallel plan for the model; the message names the nearest
            family, to start from.
    """
    config = text_config(model.config)
    base = f"{model.base_model_prefix}."
    shapes = {name.removeprefix(base): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    near = nearest(config, shapes)
    plan = getattr(config, "base_model_tp_plan", None) or {}
    path, roles = _roles(plan)
    if not roles:
        raise StructPruneError(
            f"transformers has no tensor-parallel plan for {config.model_type!r} to make a stub from; the nearest "
            f"family is {near or 'none'}, start from its entry in families.yaml."
        )
    spaces = {
        _name(owner): _space(owner, role, shapes, f"{path}.0.", config)
        for owner, role in roles.items()
        if role["out"] and role["in"]
    }
    entry = [{"model_types": [config.model_type], "layer_path": path, "spaces": spaces}]
    head = (
        f"# A stub for {config.model_type}: check every line, then pass the file as --arch.\n"
        f"# The nearest family by names and shapes is {near or 'none'}.\n"
    )
    return head + yaml.safe_dump(entry, sort_keys=False).rstrip()


def nearest(config: PretrainedConfig, shapes: Shapes) -> str | None:
    """The described model type most of whose tensors are there in the right shape; None where none fits.

    Args:
        config: The config of the unknown model.
        shapes: The name and shape of its tensors, named from the base model.
    """
    best: tuple[int, str | None] = (0, None)
    for model_type, family in builtin_families().items():
        try:
            fitting = len({axis.param for space in resolve(family, config, shapes).spaces for axis in space.axes})
        except (StructPruneError, AttributeError, ZeroDivisionError, IndexError):
            continue
        best = max(best, (fitting, model_type), key=lambda pair: pair[0])
    return best[1]


def _roles(plan: Mapping[str, str]) -> tuple[str, Roles]:
    """The path of the layers, and for each module the names of its projections that split by rows (producers) and by
    columns (consumers).
    """
    layer_path = ""
    roles: Roles = {}
    for pattern, style in plan.items():
        path, _, rest = pattern.partition(".*.")
        owner, _, leaf = rest.rpartition(".")
        side = {"colwise": "out", "rowwise": "in"}.get(style.removesuffix("_rep").removesuffix("_gather_output"))
        if leaf and side:
            layer_path = path
            roles.setdefault(owner, {"out": [], "in": []})[side].append(rest)
    return layer_path, roles


def _name(owner: str) -> str:
    return "attention" if "attn" in owner or "attention" in owner else owner.rpartition(".")[2] or "mlp"


def _space(
    owner: str, role: Mapping[str, list[str]], shapes: Shapes, layer: str, config: PretrainedConfig
) -> dict[str, Any]:
    names = {side: [name for name in role[side] if f"{layer}{name}.weight" in shapes] for side in ("out", "in")}
    if _name(owner) == "attention":
        heads, groups, head_dim = heads_of(config)
        projections = {
            side: {
                name: "q" if shapes[f"{layer}{name}.weight"][dim] > groups * head_dim or heads == groups else "kv"
                for name in names[side]
            }
            for side, dim in (("out", 0), ("in", 1))
        }
        size: dict[str, Any] = {"size": "num_key_value_heads", "also": ["num_attention_heads"], "pin": ["head_dim"]}
        return {**size, **projections}
    rows = shapes[f"{layer}{names['in'][0]}.weight"][1] if names["in"] else 0
    keys = [key for key, value in config.to_dict().items() if value == rows and key not in ("vocab_size",)]
    units = {side: dict.fromkeys(names[side], "unit") for side in ("out", "in")}
    return {"size": keys[0] if keys else "WHICH_CONFIG_KEY", **units}
