"""NVRTC through NVIDIA's Python packages: text to machine code at first use, kept on disk, loaded once a process."""

import hashlib
from ctypes import Structure, addressof, c_void_p
from functools import cache, lru_cache
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
    if (found := _whole(path)) is not None:
        return found
    cubin = compiled(text, arch, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as part:
            part.write(_head(cubin) + cubin)
        Path(part.name).replace(path)  # in one step: another process never reads half a file
    except OSError:
        return cubin  # a home that cannot be written costs a compilation in each process
    return cubin


def _head(cubin: bytes) -> bytes:
    """What stands before machine code on disk: its length and its hash."""
    return len(cubin).to_bytes(8, "little") + hashlib.sha256(cubin).digest()


def _whole(path: Path) -> bytes | None:
    """The machine code of a file; None if there is none, or if it is not what was written: it is compiled again."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = len(_head(b""))
    return content[size:] if content[:size] == _head(content[size:]) else None


class Kernel:
    """A loaded kernel of one device, which must be the current one while it is made."""

    def __init__(self, cubin: bytes, name: str, device: int, shared_bytes: int) -> None:
        driver = _bindings("driver")
        module = _checked(driver.cuModuleLoadData(cubin))
        self.function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        self.device, self.shared_bytes, self._driver = device, shared_bytes, driver
        self._overlaps = torch.cuda.get_device_capability(device)[0] >= 9
        self._config = lru_cache(maxsize=64)(self._overlapping)
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self.function, most, shared_bytes))

    def __call__(self, grid: tuple[int, int, int], threads: int, arguments: Structure, overlap: bool = False) -> None:
        """Launch on PyTorch's current stream of the kernel's device. The kernel takes the structure by value.

        `overlap`: the launch may begin before the one ahead of it ends, and waits in the kernel (see `waiting.cuh`).
        """
        if torch.cuda.current_device() != self.device:  # the driver launches in the current context
            with torch.cuda.device(self.device):
                return self(grid, threads, arguments, overlap)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        pointers = (c_void_p * 1)(addressof(arguments))
        if overlap and self._overlaps:
            config = self._config(grid, threads, stream)
            (code,) = self._driver.cuLaunchKernelEx(config, self.function, addressof(pointers), 0)
        else:
            shape = (*grid, threads, 1, 1, self.shared_bytes)
            (code,) = self._driver.cuLaunchKernel(self.function, *shape, stream, addressof(pointers), 0)
        if int(code):
            raise TersekvError(f"A CUDA kernel was not launched: {code}. Grid {grid}, {threads} threads.")

        return None

    def _overlapping(self, grid: tuple[int, int, int], threads: int, stream: int) -> Any:
        """A launch whose start is not held up by the end of the one before (programmatic stream serialization)."""
        driver = self._driver
        attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = self.shared_bytes, stream
        config.attrs, config.numAttrs = [attribute], 1
        return config


def architecture(major: int, minor: int) -> str:
    """What to compile for. Hopper's `wgmma` is there only where the code is for that GPU and no newer one."""
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


@cache
def kernel(text: str, name: str, device: int, shared_bytes: int = 0, options: tuple[str, ...] = ()) -> Kernel:
    """The kernel `name` of this source on a device, compiled at the first call."""
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        return Kernel(kept(text, architecture(major, minor), options), name, device, shared_bytes)
