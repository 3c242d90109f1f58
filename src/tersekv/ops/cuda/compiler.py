"""NVRTC through NVIDIA's Python packages: text to machine code at first use, kept on disk, loaded once a process."""

import hashlib
from ctypes import Structure, addressof, c_void_p
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from platformdirs import user_cache_path

from tersekv.errors import TersekvError
from tersekv.ops.cuda.source import headers

LEAST = (8, 0)  # Ampere: cp.async, movmatrix and 8-bit matrix instructions of depth 32
INSTALL = 'Install them with pip install "tersekv[cuda]".'


def uncompilable() -> str | None:
    """Why kernels cannot be compiled here, GPU or not, or None."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return f"NVIDIA's Python packages cuda-bindings and nvidia-cuda-nvrtc are not there. {INSTALL}"
    nvrtc = _bindings("nvrtc")
    try:
        _checked(nvrtc.nvrtcVersion())
    except RuntimeError as error:  # cuda-bindings looks for the library at the first call
        return f"NVRTC cannot be loaded ({error}). {INSTALL}"
    return None


@cache
def missing() -> str | None:
    """Why there are no CUDA kernels on this machine at all, or None."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device."
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < LEAST:
        return f"This GPU is of compute capability {major}.{minor}; the kernels need {LEAST[0]}.{LEAST[1]} or newer."
    return uncompilable()


def _bindings(name: str) -> Any:
    """Of NVIDIA's packages, which are not everywhere and carry no types."""
    return import_module(f"cuda.bindings.{name}")


def _checked(returned: tuple[Any, ...]) -> Any:
    """The results of a call of the bindings. Raises RuntimeError for an error code."""
    code, *results = returned
    if int(code):
        raise RuntimeError(str(code))
    return results[0] if len(results) == 1 else tuple(results)


def compiled(text: str, arch: str, options: tuple[str, ...] = ()) -> bytes:
    """Machine code for `arch` such as "sm_90". Raises TersekvError with the compiler's log if it fails."""
    nvrtc = _bindings("nvrtc")
    names, contents = zip(*headers().items(), strict=True)
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"tersekv.cu", len(names), contents, names))
    flags = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", *(option.encode() for option in options)]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(code):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise TersekvError(f"NVRTC {_version()} cannot compile for {arch}: {log.decode()[:2000]}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _version() -> str:
    return ".".join(map(str, _checked(_bindings("nvrtc").nvrtcVersion())))


def kept(text: str, arch: str, options: tuple[str, ...], folder: Path | None = None) -> bytes:
    """As `compiled`, from disk if the same source, headers, options, architecture and compiler were there before."""
    parts = [text.encode(), *headers().values(), arch.encode(), *(o.encode() for o in options), _version().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    path = (folder or user_cache_path("tersekv") / "cuda") / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = compiled(text, arch, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as part:
            part.write(cubin)
        Path(part.name).replace(path)  # in one step: another process never reads half a file
    except OSError:
        return cubin  # a home that cannot be written costs a compilation in each process
    return cubin


class Kernel:
    """A loaded kernel of one device."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int) -> None:
        driver = _bindings("driver")
        module = _checked(driver.cuModuleLoadData(cubin))
        self.function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        self.shared_bytes, self._launch = shared_bytes, driver.cuLaunchKernel
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self.function, most, shared_bytes))

    def __call__(self, grid: tuple[int, int, int], threads: int, arguments: Structure) -> None:
        """Launch on PyTorch's current stream. The kernel takes the structure by value."""
        stream = torch.cuda.current_stream().cuda_stream
        pointers = (c_void_p * 1)(addressof(arguments))
        shape = (*grid, threads, 1, 1, self.shared_bytes)
        (code,) = self._launch(self.function, *shape, stream, addressof(pointers), 0)
        if int(code):
            raise TersekvError(f"A CUDA kernel was not launched: {code}. Grid {grid}, {threads} threads.")


def architecture(major: int, minor: int) -> str:
    """What to compile for. Hopper's `wgmma` is there only where the code is for that GPU and no newer one."""
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


@cache
def kernel(text: str, name: str, device: int, shared_bytes: int = 0, options: tuple[str, ...] = ()) -> Kernel:
    """The kernel `name` of this source on a device, compiled at the first call."""
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        return Kernel(kept(text, architecture(major, minor), options), name, shared_bytes)
