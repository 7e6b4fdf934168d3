"""llama.cpp's names of the types in a GGUF file, for `optimum-cli`, which imports nothing heavy."""

from __future__ import annotations

import shutil

from ..errors import StructPruneError
from ..registry import did_you_mean


WHOLE = ("f32", "f16", "bf16")
BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # blocks of 32 values, which the package gguf quantises
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")  # which only llama.cpp quantises, with this program
QUANTISER = "llama-quantize"
GGUF_TYPES = (*WHOLE, *BLOCKS, *K_QUANTS)


def check_gguf_type(kind: str) -> None:
    """Refuse a type that cannot be written here."""
    if kind not in GGUF_TYPES:
        raise StructPruneError(f"A GGUF file has no type {kind!r}.{did_you_mean(kind, GGUF_TYPES)}")
    if kind in K_QUANTS and shutil.which(QUANTISER) is None:
        raise StructPruneError(
            f"{kind} takes llama.cpp's program {QUANTISER}, which is not on the PATH: install llama.cpp (brew, winget "
            f"or github.com/ggml-org/llama.cpp/releases), or take {BLOCKS[-1]}, which needs nothing."
        )
