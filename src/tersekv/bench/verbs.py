"""The verbs of `tersekv bench`. As in `cli`, each imports what it needs when it runs."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path

from cyclopts import App

from tersekv.terminal import Json, Stages, show

bench = App(name="bench", help="Measure speed: parity first, then medians of interleaved runs.")


def _refuse(device: str, given: dict[str, object], defaults: dict[str, object], instead: str) -> None:
    """Raise InputError for options that a benchmark of a GPU would not look at."""
    from tersekv.errors import InputError

    for name, value in given.items():
        if value != defaults[name]:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} {value} does not apply with --device {device}. Leave it out: {instead}.")


def _defaults(verb: Callable[..., object]) -> dict[str, object]:
    return {name: parameter.default for name, parameter in signature(verb).parameters.items()}


@bench.command(name="encode")
def bench_encode(
    *,
    bits: int = 3,
    d: int = 128,
    vectors: int | None = None,
    device: str = "cpu",
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Vectors a second of the NumPy, torch and native encoders, or of the CUDA kernels.

    Parameters
    ----------
    bits
        Bits of a code; on a GPU several codecs run instead.
    d
        Head dim.
    vectors
        How many vectors to encode in each round: fp32, by default 131,072; on a GPU bf16, by default 4,194,304.
    device
        cpu or cuda.
    out
        Write the record to this JSON file.
    """
    from tersekv.record import write

    if device == "cpu":
        from tersekv.bench.encode import encode

        with Stages() as stages:
            result = encode(bits, d, vectors or 131_072, stages)
    else:
        from tersekv.bench import gpu_run
        from tersekv.bench.gpu_tables import GpuResult

        _refuse(device, {"bits": bits}, _defaults(bench_encode), f"the codecs are {', '.join(gpu_run.CODECS)}")
        result = GpuResult(gpu_run.encode(d, vectors or 4_194_304, device))
    if out is not None:
        write(result.as_dict(), out)
    show(result, json)


@bench.command(name="attend")
def bench_attend(
    run: Path | None = None,
    *,
    bits: str = "4,3,2",
    d: str = "128",
    heads: str = "32/8",
    tokens: str = "1024,4096,32768",
    new_tokens: str = "1",
    rounds: int = 11,
    threads: int = 1,
    isa: str = "",
    device: str = "cpu",
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Attention of one layer over packed pages beside PyTorch's and llama.cpp's, from a cold cache.

    Parameters
    ----------
    run
        A TOML run file with grids of cases, see runs/attend.toml, or runs/attend-cuda.toml for a GPU. Without one, the
        next six options make a grid.
    bits
        Bits of our codes. This and the next four are lists with commas: every combination is a case.
    d
        Head dims.
    heads
        Query heads / KV heads.
    tokens
        Cached tokens.
    new_tokens
        New tokens that attend to them at once.
    rounds
        Times each contestant runs, in turn with the others.
    threads
        Threads of every contestant.
    isa
        Our instruction sets, the first one for all rows. Default: the best one, and avx2.
    device
        cpu or cuda.
    out
        Write the record to this JSON file.
    """
    from tersekv.record import write

    lists = {"bits": bits, "d": d, "heads": heads, "tokens": tokens, "new_tokens": new_tokens}
    with Stages() as stages:
        if device == "cpu":
            from tersekv.bench.attend import attend, grid_of, read_grids
            from tersekv.bench.attend_tables import AttendResult

            grids = read_grids(run) if run else [grid_of(lists, rounds)]
            result = AttendResult(attend(grids, threads, [name for name in isa.split(",") if name], stages))
        else:
            from tersekv.bench import gpu_run
            from tersekv.bench.gpu_tables import GpuResult

            no_cpu = {"threads": threads, "isa": isa}
            _refuse(device, no_cpu, _defaults(bench_attend), "it is of the CPU")
            gpu_grids = gpu_run.read_grids(run) if run else [gpu_run.grid_of(lists, rounds)]
            result = GpuResult(gpu_run.attend(gpu_grids, device, stages))
    if out is not None:
        write(result.as_dict(), out)
    show(result, json)


@bench.command(name="decode")
def bench_decode(
    *,
    model: str = "smollm2",
    contexts: str = "512,1024,2048,8192",
    specs: str = "terse4,terse3,terse2",
    dtypes: str = "bfloat16,float32",
    new_tokens: int = 32,
    threads: int = 1,
    memory: bool = True,
    llama_cpp: bool = True,
    device: str = "cpu",
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Tokens a second of a whole model beside the dense cache, quanto and llama.cpp, and the memory of the process.

    With `--device cuda` other options than --out and --json are refused: a model of the shape of Llama-3-8B with random
    weights decodes in CUDA graphs with dense and packed caches, and each kind is filled until 80 GB are full.

    Parameters
    ----------
    model
        smollm2, qwen2.5-coder-1.5b, gemma3-270m or a GGUF file, so that llama.cpp runs the same weights.
    contexts
        Context lengths, with commas; each ends with the new tokens.
    specs
        Our caches: presets or specs, with a semicolon between them if one has a comma.
    dtypes
        Of the model. The dense cache runs in each of them, all others in the first.
    new_tokens
        Tokens that each contestant decodes, in turn with the others.
    threads
        Threads of every contestant.
    memory
        Also measure the peak memory of a process with the dense cache and with each of ours.
    llama_cpp
        Whether llama.cpp takes part: its prefill of 8,192 tokens takes minutes for each kind of cache.
    device
        cpu or cuda.
    out
        Write the record to this JSON file.
    """
    from tersekv.bench.attend import whole_numbers
    from tersekv.bench.decode import decode
    from tersekv.bench.decode_tables import DecodeResult
    from tersekv.record import write

    if device != "cpu":
        from tersekv.bench import gpu_decode
        from tersekv.bench.gpu_tables import GpuResult

        given = {"model": model, "contexts": contexts, "specs": specs, "dtypes": dtypes, "new_tokens": new_tokens}
        given |= {"threads": threads, "memory": memory, "llama_cpp": llama_cpp}
        _refuse(device, given, _defaults(bench_decode), "what runs is fixed, so that records compare")
        with Stages() as stages:
            on_gpu = GpuResult(gpu_decode.decode(gpu_decode.Plan(), device, stages))
        if out is not None:
            write(on_gpu.as_dict(), out)
        return show(on_gpu, json)
    asked = [spec.strip() for spec in specs.split(";" if ";" in specs else ",")]
    lengths = list(whole_numbers("contexts", contexts))
    with Stages() as stages:
        found = decode(model, lengths, asked, dtypes.split(","), stages, new_tokens, threads, memory, llama_cpp)
    result = DecodeResult(found)
    if out is not None:
        write(result.as_dict(), out)
    return show(result, json)


@bench.command(name="generate")
def bench_generate(*, device: str = "cuda", out: Path | None = None, json: Json = False) -> None:
    """The time of a token of transformers' generate on a GPU: a dense cache, ours eagerly, and ours in CUDA graphs.

    Parameters
    ----------
    device
        cuda, or one of several: cuda:1.
    out
        Write the record to this JSON file.
    """
    from tersekv.bench import gpu_generate
    from tersekv.bench.gpu_tables import GpuResult
    from tersekv.record import write

    with Stages() as stages:
        result = GpuResult(gpu_generate.generate(gpu_generate.Plan(), device, stages))
    if out is not None:
        write(result.as_dict(), out)
    show(result, json)
