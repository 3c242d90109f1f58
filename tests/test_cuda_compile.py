"""Every form of the kernels compiles without a GPU, for every architecture, and keeps its numbers in registers."""

import re
import struct
from pathlib import Path

import pytest
from cuda_layouts import layouts

from tersekv.codec import Codec
from tersekv.errors import TersekvError
from tersekv.ops.cuda import (
    attending,
    chunks,
    compiler,
    encoding,
    feedback,
    joining,
    reading,
    shapes,
    source,
    stepping,
    unpacked,
)
from tersekv.spec import parse, parse_codec

pytestmark = pytest.mark.skipif(compiler.uncompilable() is not None, reason=str(compiler.uncompilable()))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SM_BYTES = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # KiB of shared memory of a multiprocessor


def stack_bytes(cubin: bytes) -> int:
    """Of local memory that a thread of the only kernel needs: the minimum stack size in the section .nv.info."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections + i * size) for i in range(count)]
    for _, kind, _, _, at, length, *_ in headers:
        if kind == 0x70000000:  # SHT_CUDA_INFO: records of format, attribute, size, content
            found = _minimum_stack(cubin[at : at + length])
            if found is not None:
                return found
    raise AssertionError("the machine code does not say how large its stack is")


def _minimum_stack(records: bytes) -> int | None:
    at = 0
    while at + 4 <= len(records):
        form, attribute, size = struct.unpack_from("<BBH", records, at)
        if form == 4 and attribute == 0x12:  # EIATTR_MIN_STACK_SIZE: symbol, bytes
            return struct.unpack_from("<II", records, at + 4)[1]
        at += 4 + (size if form == 4 else 0)
    return None


def attend_texts(spec: str, d: int, rows: int, arch: str) -> list[str]:
    """Of every shape that fits."""
    codecs = parse(spec)
    k, v = layouts(codecs, d)
    sm = SM_BYTES[arch] * 1024
    gpu = shapes.Limits(int(arch[3:-1]), 100, sm, sm - 1024)
    found = shapes.fitting(k, v, rows, gpu)
    return [attending.text(k, v, codecs.k.recipe(d), codecs.v.recipe(d), how) for how in found]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("spec", "d", "rows"),
    [
        *((f"rotated:bits={bits}", 128, 4) for bits in (1, 2, 3, 4)),
        *(("rotated:bits=3", d, rows) for d, rows in ((64, 1), (64, 4), (256, 4), (256, 8))),
        ("k=rotated:bits=4 v=rotated:bits=2", 128, 8),
        *(("rotated:bits=4,scale_kind=int8", d, rows) for d, rows in ((64, 1), (128, 4), (256, 8))),
        ("intn:bits=8", 128, 4),
        ("intn:bits=2,axis=channel", 128, 4),
        *((f"k=rotated:bits=2 v=trellis:bits={bits}", 128, 4) for bits in (1, 2, 3, 4)),
        *(("k=rotated:bits=2 v=trellis:bits=1", d, rows) for d, rows in ((64, 1), (128, 8), (256, 8))),
        *(("direction:bits=4", d, rows) for d, rows in ((64, 1), (128, 8), (256, 4))),
        ("twoaxis:bits=2", 128, 4),
    ],
)
def test_attend(spec: str, d: int, rows: int, arch: str) -> None:
    texts = attend_texts(spec, d, rows, arch)
    for text in texts if arch == "sm_90" else texts[:1]:
        assert stack_bytes(compiler.compiled(text, arch)) == 0, text[text.index("HEADS") :][:80]


def chunk_text(spec: str, d: int, rows: int, arch: str) -> str:
    codecs = parse(spec)
    k, v = layouts(codecs, d)
    sm = SM_BYTES[arch] * 1024
    how = chunks.shape(k, v, rows, shapes.Limits(int(arch[3:-1]), 100, sm, sm - 1024))
    return chunks.text(k, v, codecs.k.recipe(d), codecs.v.recipe(d), how)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("spec", "d", "rows"),
    [
        *((f"rotated:bits={bits}", 128, 4096) for bits in (1, 2, 3, 4, 8)),
        ("rotated:bits=4", 128, 64),
        *(("rotated:bits=4", 64, rows) for rows in (64, 4096)),
        ("rotated:bits=8", 64, 4096),
        ("rotated:bits=4", 256, 4096),
        ("rotated:bits=4,scale_kind=int8", 64, 4096),
        ("k=intn:bits=2,axis=channel v=intn:bits=2", 128, 4096),
        *(("direction:bits=4", d, 4096) for d in (64, 128)),
        ("k=twoaxis:bits=2 v=direction:bits=3", 128, 64),
        *((f"k=rotated:bits=2 v=trellis:bits={bits}", d, 4096) for bits, d in ((1, 128), (2, 64), (3, 128), (4, 256))),
    ],
)
def test_chunk(spec: str, d: int, rows: int, arch: str) -> None:
    if d == 256 and arch != "sm_90":
        pytest.skip("at head dim 256 the kernel is for Hopper alone")
    target = compiler.architecture(int(arch[3:-1]), int(arch[-1]))
    assert stack_bytes(compiler.compiled(chunk_text(spec, d, rows, arch), target)) == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", [64, 4096])
@pytest.mark.parametrize("d", reading.CHUNK_HEAD_DIMS)
@pytest.mark.parametrize(
    "spec", ["none", "k=none v=rotated:bits=3", "k=rotated:bits=4,mean=block v=none", "k=none v=trellis:bits=2"]
)
def test_chunk_of_bf16_pages(spec: str, d: int, rows: int, arch: str) -> None:
    """There is room for them everywhere, if only for two pages that are under way."""
    text = chunk_text(spec, d, rows, arch)
    assert f"RAW = {2 if (spec, d, arch) == ('none', 128, 'sm_120') else 3}," in text
    assert stack_bytes(compiler.compiled(text, compiler.architecture(int(arch[3:-1]), int(arch[-1])))) == 0


@pytest.mark.parametrize("arch", ["sm_90"])
@pytest.mark.parametrize(
    "text",
    [
        "rotated:bits=3,mean=block",
        "rotated:bits=4,mean=block,scale_kind=int8",
        "lloydmax:bits=1,norm=fp32",
        "intn:bits=8",
        "intn:axis=channel",
    ],
)
@pytest.mark.parametrize("d", reading.HEAD_DIMS)
def test_encode(d: int, text: str, arch: str) -> None:
    codec: Codec = parse_codec(text, "v")
    encoder, layout = codec.encoder(d), codec.layout(d).ordered("mma_k")
    assert encoder is not None
    cubin = compiler.compiled(encoding.text(encoder, layout, "BF16"), arch, encoding.EXACT)
    assert stack_bytes(cubin) == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("d", "bits", "at_once"), [(64, 3, 32), (128, 1, 32), (128, 2, 16), (256, 4, 32)])
def test_encode_walks(d: int, bits: int, at_once: int, arch: str) -> None:
    codec: Codec = parse_codec(f"trellis:bits={bits}", "v")
    encoder, layout = codec.encoder(d), codec.layout(d).ordered("mma_trellis_v")
    assert encoder is not None
    cubin = compiler.compiled(encoding.text(encoder, layout, "BF16", at_once), arch, encoding.EXACT)
    assert stack_bytes(cubin) == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_others(arch: str) -> None:
    texts = [source.read("merge.cu"), source.read("repack.cu")]
    texts += [encoding.rotation_text(d, "BF16", back) for d in reading.HEAD_DIMS for back in (False, True)]
    texts += [joining.dense_text(d, "BF16", "FP16", rows, rows > 1) for d in reading.HEAD_DIMS for rows in joining.ROWS]
    assert all(stack_bytes(compiler.compiled(text, arch)) == 0 for text in texts)


@pytest.mark.parametrize("kind", ["BF16", "FP32"])
@pytest.mark.parametrize("d", reading.HEAD_DIMS)
def test_a_step(d: int, kind: str) -> None:
    texts = [stepping.storing_text(d, kind, True)]
    texts += [stepping.finishing_text(d, kind, rows, True) for rows in stepping.ROWS]
    assert all(stack_bytes(compiler.compiled(text, "sm_90")) == 0 for text in texts)


def test_a_spill_would_be_seen() -> None:
    text = """extern "C" __global__ void spills(int* x) {
      int a[64] = {};
      for (int j = 0; j < 64; j++) a[x[j] % 64] += x[j + 64];
      for (int j = 0; j < 64; j++) x[j] = a[x[j] % 64];
    }"""
    assert stack_bytes(compiler.compiled(text, "sm_90")) >= 256


def test_machine_code_is_kept(tmp_path: Path) -> None:
    text = source.read("merge.cu")
    first = compiler.kept(text, "sm_90", (), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(compiler._head(b"from disk") + b"from disk")
    assert compiler.kept(text, "sm_90", (), tmp_path) == b"from disk"
    assert compiler.kept(text, "sm_80", (), tmp_path) not in (first, b"from disk")
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_machine_code_is_compiled_again(tmp_path: Path) -> None:
    text = source.read("merge.cu")
    first = compiler.kept(text, "sm_90", (), tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole + b"x", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert compiler.kept(text, "sm_90", (), tmp_path) == first
        assert file.read_bytes() == whole


def test_an_error_carries_the_log() -> None:
    with pytest.raises(TersekvError, match=re.compile("sm_90.*undefined", re.DOTALL)):
        compiler.compiled("int x = y;", "sm_90")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("d", "bits"), [(64, 1), (128, 4), (256, 8)])
def test_feedback(d: int, bits: int, arch: str) -> None:
    assert stack_bytes(compiler.compiled(feedback.text(d, 2 ** (bits - 1)), arch, encoding.EXACT)) == 0


@pytest.mark.parametrize("d", reading.HEAD_DIMS)
@pytest.mark.parametrize(
    "spec",
    [
        "rotated:bits=3",
        "k=intn:bits=2,axis=channel v=trellis:bits=2",
        "rotated:bits=8",
        "none",
        "k=none v=rotated:bits=3",
        "k=rotated:bits=3 v=none",
    ],
)
def test_unpack_pages(spec: str, d: int) -> None:
    if d == 256 and ("8" in spec or "none" in spec):
        pytest.skip("at head dim 256 the CUDA kernels do not read 8 bits of unequal steps, nor bf16")
    codecs = parse(spec)
    text = unpacked.text(*layouts(codecs, d), codecs.k.recipe(d), codecs.v.recipe(d))
    assert stack_bytes(compiler.compiled(text, compiler.architecture(9, 0))) == 0
