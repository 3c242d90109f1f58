"""The kernel test program: golden cases in guarded memory, under sanitizers here, and for ARM in an emulator."""

import shutil
import subprocess
from pathlib import Path

import make_native_golden
import pytest

NATIVE = Path(__file__).parents[1] / "native"
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
INSTALL_ARM = "install Debian's g++-aarch64-linux-gnu and qemu-user-static: .ci/install-arm"


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tool(*names: str, why: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{' or '.join(names)} is not here: {why}")


def build(folder: Path, *options: str) -> Path:
    cmake = tool("cmake", why="the kernel test program is built with it")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    run(cmake, *generator, "-S", NATIVE, "-B", folder, "-DTERSEKV_TESTS=ON", *options)
    run(cmake, "--build", folder)
    return folder / "test_kernels"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "cases"
    make_native_golden.write(path)
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("c++", "g++", "clang++", why="the kernel test program needs a C++ compiler")
    return build(tmp_path_factory.mktemp("sanitized"), "-DTERSEKV_SANITIZE=address,undefined")


@pytest.mark.xdist_group("sanitized")
def test_addresses_and_undefined_behaviour(golden: Path, sanitized: Path) -> None:
    said = run(sanitized, golden)
    assert f"{len(make_native_golden.CASES)} cases, 0 failures" in said and "portable: ran" in said
    for other in ("test_encoders", "test_linear", "test_decoder"):
        assert " 0 failures" in run(sanitized.with_name(other))


@pytest.mark.xdist_group("sanitized")
def test_avx_vnni_is_used_where_it_is_compiled(sanitized: Path) -> None:
    """Few processors can run it, so its instruction is looked for: vpdpbusd in its VEX form, on 256 bits."""
    compiled = sanitized.parent / "CMakeFiles" / "kernels_avxvnni.dir" / "kernels.cpp.o"
    if not compiled.exists():
        pytest.skip("AVX-VNNI is not in a build for this kind of processor")
    objdump = tool("objdump", why="it shows the instructions")
    text = run(objdump, "-d", "--no-show-raw-insn", compiled)
    assert "{vex} vpdpbusd" in text and "%ymm" in text and "%zmm" not in text and "vpmaddubsw" not in text


def test_data_races(golden: Path, tmp_path: Path) -> None:
    """Portable kernels only: the threads are the same for all."""
    tool("c++", "g++", "clang++", why="the kernel test program needs a C++ compiler")
    program = build(tmp_path, "-DTERSEKV_SANITIZE=thread", "-DTERSEKV_PORTABLE=ON")
    assert "0 failures" in run(program, golden)
    for other in ("test_linear", "test_decoder"):
        assert " 0 failures" in run(program.with_name(other))


def test_arm(golden: Path, tmp_path: Path) -> None:
    """NEON with dot products, and a processor that has none of them."""
    compiler = tool(ARM_COMPILER, why=INSTALL_ARM)
    emulator = tool(*ARM_EMULATOR, why=INSTALL_ARM)
    target = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"
    program = build(tmp_path, f"-DCMAKE_CXX_COMPILER={compiler}", *target)
    new = run(emulator, "-cpu", "max", program, golden)
    assert "neon: ran" in new and "0 failures" in new
    coded = run(emulator, "-cpu", "max", program.with_name("test_encoders"))
    assert "neon: ran" in coded and "0 failures" in coded
    for other in ("test_linear", "test_decoder"):
        assert " 0 failures" in run(emulator, "-cpu", "max", program.with_name(other))
    old = run(emulator, "-cpu", "cortex-a53", program, golden)
    assert "neon: ARMv8.2 with dot products" in old and "portable: ran" in old and "0 failures" in old
