"""A callback's place among those of a Trainer, so that TensorBoard, W&B and the like see what it logs."""

from __future__ import annotations

import sys
from types import FrameType

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


def go_first(callback: TrainerCallback) -> None:
    """Put a callback before all others of the Trainer that is calling it; without one, nothing happens.

    All callbacks of a Trainer share one dict of logs and are asked in order, those of `report_to` before those in
    `callbacks=[…]`. What a later one adds, the earlier ones never see. A callback is told everything but the list that
    it stands in, so the list is looked up in the handler whose call this is.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back
