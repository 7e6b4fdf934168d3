"""Run and quantise GGUF files with a real llama.cpp, without compiling one: that of the npm package node-llama-cpp.

`make llama-cpp` installs it into `node_modules`; the variable NODE_MODULES names another folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any


SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
# Numbers of llama.cpp's enum `llama_ftype`.
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q6_K": 18}


class QuantizeParams(ctypes.Structure):
    """The first fields of llama.cpp's `llama_model_quantize_params`, and room for those that follow."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "head_type", "embedding_type")),
        *((name, ctypes.c_bool) for name in ("requantize", "head", "copy", "pure")),
        ("rest", ctypes.c_byte * 492),
    ]


def modules() -> Path:
    """The folder that the npm packages are in; it need not exist."""
    return Path(os.environ.get("NODE_MODULES", SCRIPT.parents[2] / "node_modules"))


def missing() -> str | None:
    """What llama.cpp lacks to run here; None if nothing."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (modules() / "node-llama-cpp").is_dir() or not [*_binaries()]:
        return f"there is no node-llama-cpp in {modules()}; `make llama-cpp` installs it"
    return None


def _binaries() -> list[Path]:
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return sorted(modules().glob(f"@node-llama-cpp/linux-{machine}/bins/*/libllama.*"))


def ask(file: str | Path, **request: Any) -> dict[str, Any]:
    """What llama.cpp makes of a file; `llama_cpp.mjs` says what can be requested.

    Args:
        file: The GGUF file.
        request: The parts of the request.

    Returns:
        `tokens`, `bos`, `logprobs` and `written`.
    """
    done = subprocess.run(
        ["node", SCRIPT, modules(), str(file)], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"node ended with {done.returncode}")
    return json.loads(done.stdout)


def quantize(source: str | Path, target: str | Path, kind: str) -> None:
    """Quantise a file, as `llama-quantize SOURCE TARGET KIND` does; "KIND pure" is its option `--pure`.

    Args:
        source: A GGUF file with 16 or 32 bits.
        target: The file to write.
        kind: One of `FILE_TYPES`, with " pure" behind it for all matrices in that form.
    """
    library = ctypes.CDLL(str(_binaries()[0]))
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.llama_log_set(silent, None)
    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.ggml_backend_load_all_from_path(str(_binaries()[0].parent).encode())
    params = library.llama_model_quantize_default_params()
    params.threads, params.file_type, params.pure = 1, FILE_TYPES[kind.split()[0]], kind.endswith(" pure")
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantise {source}")
