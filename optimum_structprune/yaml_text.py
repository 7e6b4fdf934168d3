"""YAML that means what it says: plain values only, and no key twice in a mapping."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: If it is not YAML, asks for more than plain values, or has a key twice in a mapping, which YAML
            forbids and PyYAML lets pass.
    """
    _refuse_twins(yaml.compose(text, Loader=yaml.SafeLoader))
    return yaml.safe_load(text)


def _refuse_twins(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} stands {count} times", problem_mark=node.start_mark
                )
        for _, value in node.value:
            _refuse_twins(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_twins(value)
