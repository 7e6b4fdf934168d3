"""Whether pictures can be drawn here: matplotlib is an extra."""

from importlib.util import find_spec


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None
