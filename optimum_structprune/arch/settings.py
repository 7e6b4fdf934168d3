"""Run code under torch's default settings, and restore the settings of the caller."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch


@contextmanager
def own_settings() -> Iterator[None]:
    """Use torch's default settings inside `with` or in a decorated function, and restore the caller's settings.

    The defaults are fp32 as the default dtype, new tensors on the CPU, no autocast, no inference mode, gradients, and
    fp32 products in full precision. The states of the random number generators are restored too.
    """
    with ExitStack() as stack:
        stack.enter_context(_own_random_numbers())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)

        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))

        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_full_precision())
        yield


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after `with`. The Trainer and peft use these generators."""
    devices = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = list(range(torch.cuda.device_count()))

    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 inside `with`.

    TF32 and bf16 have 10 and 7 bits, which is not enough for Gram matrices.
    """
    # torch 2.9 adds a setting for each backend. If a caller has used it, torch raises an error for the old setting.
    backend_precisions: list[tuple[Any, str]] = []
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    for backend in backends:
        if hasattr(backend, "fp32_precision"):
            backend_precisions.append((backend, backend.fp32_precision))

    original_precision: str | None = None
    with suppress(RuntimeError):
        original_precision = torch.get_float32_matmul_precision()

    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if original_precision is not None:
            torch.set_float32_matmul_precision(original_precision)
        for backend, precision in backend_precisions:
            backend.fp32_precision = precision
