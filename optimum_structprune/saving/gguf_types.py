"""Names of GGUF data types. `optimum-cli` imports this module, so it imports nothing heavy."""

from __future__ import annotations

import shutil

from ..system.errors import StructPruneError
from ..system.registry import did_you_mean


WHOLE = ("f32", "f16", "bf16")
# Blocks of 32 values, which the package gguf quantizes.
BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# Only this program of llama.cpp quantizes to K-quants.
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
QUANTISER = "llama-quantize"
GGUF_TYPES = (*WHOLE, *BLOCKS, *K_QUANTS)


def check_gguf_type(kind: str) -> None:
    """Raise `StructPruneError` if a data type is unknown, or needs a program that is not installed."""
    if kind not in GGUF_TYPES:
        raise StructPruneError(f"GGUF has no data type {kind!r}.{did_you_mean(kind, GGUF_TYPES)}")

    if kind in K_QUANTS and shutil.which(QUANTISER) is None:
        raise StructPruneError(
            f"{kind} requires llama.cpp's program {QUANTISER}, which is not on the PATH. Install llama.cpp (brew, "
            f"winget or github.com/ggml-org/llama.cpp/releases), or use {BLOCKS[-1]}, which needs no program."
        )
