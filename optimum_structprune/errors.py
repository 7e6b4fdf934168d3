"""What goes wrong, in words a user can act on."""


class StructPruneError(ValueError):
    """A mistake in the input. The message names the thing, what was found and the nearest legal choice. Nothing has
    changed, unless it is an `InPlaceError`.
    """


class InPlaceError(StructPruneError, RuntimeError):
    """Pruning stopped after a model that was to be changed in place had begun to change: load the model again."""
