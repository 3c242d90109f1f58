"""The verbs of `tersekv bench`. As in `cli`, each imports what it needs when it runs."""

from pathlib import Path

from cyclopts import App

from tersekv.terminal import Json, Stages, show

bench = App(name="bench", help="Measure speed: parity first, then medians of interleaved runs.")


@bench.command(name="encode")
def bench_encode(
    *, bits: int = 3, d: int = 128, vectors: int = 131_072, out: Path | None = None, json: Json = False
) -> None:
    """Vectors a second of the NumPy and torch encoders.

    Parameters
    ----------
    bits
        Bits of a code.
    d
        Head dim.
    vectors
        How many fp32 vectors to encode in each round.
    out
        Write the record to this JSON file.
    """
    from tersekv.bench.encode import encode
    from tersekv.record import write

    with Stages() as stages:
        result = encode(bits, d, vectors, stages)
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
        A TOML run file with grids of cases, see runs/attend.toml. Without one, the next six options make a grid.
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
        cpu. Other devices have no kernels yet.
    out
        Write the record to this JSON file.
    """
    from tersekv.bench.attend import attend, grid_of, read_grids
    from tersekv.bench.attend_tables import AttendResult
    from tersekv.record import write

    lists = {"bits": bits, "d": d, "heads": heads, "tokens": tokens, "new_tokens": new_tokens}
    grids = read_grids(run) if run else [grid_of(lists, rounds)]
    with Stages() as stages:
        result = AttendResult(attend(grids, threads, [name for name in isa.split(",") if name], stages, device=device))
    if out is not None:
        write(result.as_dict(), out)
    show(result, json)
