"""Compile and load `runtime.cpp`, before `import torch` looks for devices."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path


SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = Path(__file__).parents[2] / "build" / "simulator"


def torch_folder() -> Path:
    """Return the folder of PyTorch without importing it."""
    return Path(find_spec("torch").origin).parent


def missing() -> str | None:
    """Return the reason why devices cannot be simulated here, or None if they can."""
    if sys.platform != "linux":
        return "simulated GPUs need Linux"
    if shutil.which("c++") is None:
        return "simulated GPUs need a C++ compiler, and there is no `c++`"
    if not (torch_folder() / "include").is_dir():
        return "simulated GPUs need the header files of PyTorch"
    if any((torch_folder() / "lib" / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip")):
        return "simulated GPUs need a build of PyTorch without CUDA"
    return None


def compiled() -> Path:
    """Return the compiled runtime. It is built once for each version of the source and of PyTorch."""
    torch = torch_folder()
    version = (torch / "version.py").read_text()
    digest = hashlib.sha256(f"{SOURCE.read_text()}{version}{torch}".encode()).hexdigest()
    library = BUILD / f"runtime-{digest[:16]}.so"
    if library.exists():
        return library

    BUILD.mkdir(parents=True, exist_ok=True)
    # Several workers may compile at once. Each writes a file of its own, and the last to finish replaces the others.
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = ["c++", "-std=c++20", "-O0", "-shared", "-fPIC"]
    command += ["-I", torch / "include", "-I", torch / "include/torch/csrc/api/include"]
    command += ["-L", torch / "lib", f"-Wl,-rpath,{torch / 'lib'}"]
    command += [SOURCE, "-lc10", "-ltorch_cpu", "-o", unfinished]
    subprocess.run([str(part) for part in command], check=True)
    unfinished.replace(library)
    return library


@cache
def load() -> ctypes.CDLL:
    """Load the runtime into this process before torch."""
    if "torch" in sys.modules:
        raise RuntimeError("Load the simulated GPUs before `import torch`.")
    library = compiled()

    # The symbols of torch must be global, so that the runtime and torch share one registry of devices.
    for pattern in ("libgomp*", "libc10.so", "libtorch_cpu.so"):
        for path in (torch_folder() / "lib").glob(pattern):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))
