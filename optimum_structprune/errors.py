"""What goes wrong, in words a user can act on."""


class StructPruneError(ValueError):
    """A mistake in the input. The message names the thing, what was found and the nearest legal choice."""


class InPlaceError(RuntimeError):
    """Pruning stopped half-way through a model that was being changed in place: reload it."""
