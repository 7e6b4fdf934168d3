"""The figures of a pruning, a training and an evaluation, and their printed form."""

from . import comparison, view  # noqa: F401 - they register the printed forms of the records
