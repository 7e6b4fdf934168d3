"""Run and quantize GGUF files with a real llama.cpp. The npm package node-llama-cpp contains it in compiled form.

`make llama-cpp` installs the package into `node_modules`. The variable NODE_MODULES names another folder.
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
    """Contains the first fields of llama.cpp's `llama_model_quantize_params`, and space for the remaining fields."""

    _fields_ = [
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("head_type", ctypes.c_int32),
        ("embedding_type", ctypes.c_int32),
        ("requantize", ctypes.c_bool),
        ("head", ctypes.c_bool),
        ("copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("remaining_fields", ctypes.c_byte * 492),
    ]


def modules() -> Path:
    """Return the folder of the npm packages. It may not exist."""
    return Path(os.environ.get("NODE_MODULES", SCRIPT.parents[2] / "node_modules"))


def missing() -> str | None:
    """Return the reason why llama.cpp cannot run, or None if it can."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (modules() / "node-llama-cpp").is_dir() or not _binaries():
        return f"there is no node-llama-cpp in {modules()}; `make llama-cpp` installs it"
    return None


def _binaries() -> list[Path]:
    names = {"x86_64": "x64", "aarch64": "arm64"}
    machine = names.get(platform.machine(), platform.machine())
    return sorted(modules().glob(f"@node-llama-cpp/linux-{machine}/bins/*/libllama.*"))


def ask(file: str | Path, **request: Any) -> dict[str, Any]:
    """Evaluate or tokenize text with llama.cpp.

    Args:
        file: The GGUF file.
        request: The parts of the request; see `llama_cpp.mjs`.

    Returns:
        `tokens`, `bos`, `logprobs` and `written`.
    """
    command = ["node", SCRIPT, modules(), str(file)]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr.strip() or f"node ended with {process.returncode}")
    return json.loads(process.stdout)


def quantize(source: str | Path, target: str | Path, kind: str) -> None:
    """Quantize a file, as `llama-quantize SOURCE TARGET KIND` does. "KIND pure" adds the option `--pure`.

    Args:
        source: A GGUF file with 16 or 32 bits.
        target: The file to write.
        kind: One of `FILE_TYPES`, or one of them with " pure" for all matrices in this type.
    """
    binary = _binaries()[0]

    library = ctypes.CDLL(str(binary))
    log_function = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    # The variable keeps the function alive while llama.cpp may call it.
    silent = log_function(lambda *_: None)
    library.llama_log_set(silent, None)

    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.ggml_backend_load_all_from_path(str(binary.parent).encode())

    params = library.llama_model_quantize_default_params()
    params.threads = 1
    params.file_type = FILE_TYPES[kind.removesuffix(" pure")]
    params.pure = kind.endswith(" pure")
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize {source}")
