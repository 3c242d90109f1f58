"""The command line. Each verb imports what it needs when it runs, so `--help` loads neither torch nor transformers."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape

from tersekv import __version__
from tersekv.bench.verbs import bench
from tersekv.calibrate.verbs import calibrate
from tersekv.errors import TersekvError
from tersekv.terminal import Json, Stages, show

app = App(name="tersekv", help="The KV cache of language models in 1 to 8 bits.", version=__version__)
app.command(bench)
app.command(calibrate)

DEFAULT_MODEL = "smollm2"


@app.command(name="try")
def try_(
    *words: str,
    model: str = DEFAULT_MODEL,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 48,
    dtype: str = "auto",
    device: str = "cpu",
    json: Json = False,
) -> None:
    """Generate with the dense cache and with packed ones, and show what each costs.

    Parameters
    ----------
    words
        Specs such as terse4 or "k=rotated:bits=4 v=rotated:bits=2", and at the end a prompt. Default: terse4 and
        a prompt of some 2,000 tokens from this project's documents.
    model
        smollm2, qwen2.5-coder-1.5b, gemma3-270m, a hub id, a local folder or a GGUF file.
    prompt
        The prompt, if it could be taken for a spec.
    file
        A text file to use as the prompt.
    max_new_tokens
        Tokens to generate at most.
    dtype
        bfloat16, float16, float32, or auto: bfloat16 where the device computes in it, float32 elsewhere.
    device
        cpu or cuda.
    """
    from tersekv.errors import InputError
    from tersekv.models import load
    from tersekv.trial import run, split_words

    specs, last = split_words(words)
    if file is not None:
        try:
            last = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--file {file} cannot be read as text: {error}.") from error
    with Stages() as stages:
        result = run(load(model, _dtype(dtype, device), stages, device), specs, prompt or last, max_new_tokens, stages)
    show(result, json)


def _dtype(name: str, device: str) -> str:
    from tersekv.doctor import best_dtype

    return best_dtype(device) if name == "auto" else name


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """Every codec with its options, and every preset."""
    from tersekv.describe import listing

    show(listing(), json)


@app.command
def info(
    spec: str = "terse4",
    *,
    head_dim: int | None = None,
    model: str | None = None,
    context: int | None = None,
    json: Json = False,
) -> None:
    """Planes, bits a value and bytes a token of a spec, with a picture of its page.

    Parameters
    ----------
    spec
        A preset or spec.
    head_dim
        Default: the model's, or 128.
    model
        Also show what a context costs on this model, dense and packed.
    context
        Tokens of that context. Default: the model's limit, at most 32,768.
    """
    from tersekv.describe import info as describe

    with Stages() as stages:
        result = describe(spec, head_dim, model, context, stages)
    show(result, json)


@app.command
def plan(
    model: str,
    *,
    memory: str,
    context: int | None = None,
    users: int = 1,
    weight_bits: float = 16,
    reserve: float = 0.1,
    json: Json = False,
) -> None:
    """How many tokens and users of each cache fit into a memory beside the weights.

    Parameters
    ----------
    model
        smollm2, qwen2.5-coder-1.5b, gemma3-270m, a hub id (its configuration is enough) or a local folder.
    memory
        Of the device, such as 80GB or 24GiB.
    context
        Tokens of each user. Default: the model's limit, at most 32,768.
    users
        Also show how many tokens each has if so many share the memory.
    weight_bits
        Bits a weight is held in.
    reserve
        Share of the memory that is kept free for activations and the engine.
    """
    from tersekv.plan import plan as make

    with Stages() as stages:
        result = make(model, memory, context, users, weight_bits, reserve, stages)
    show(result, json)


@app.command
def doctor(*, json: Json = False) -> None:
    """Versions, devices, which implementation runs, and why another cannot."""
    from tersekv.doctor import diagnose

    show(diagnose(), json)


@app.command(name="eval")
def eval_(
    run: Path,
    *,
    text: str | None = None,
    data: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    jobs: int = 1,
    directory: Annotated[Path | None, Parameter(name="--dir")] = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Measure specs beside the dense cache: tensors, next-token distributions, tasks, memory and speed.

    Parameters
    ----------
    run
        A TOML run file, see runs/ and docs/evaluation.md.
    text
        The text to use, if not the run file's.
    data
        The folder with the items of tasks, if not the run file's. Without one they come from the hub.
    model
        The model to use, if not the run file's.
    dtype
        bfloat16, float16 or float32, if not the run file's.
    device
        cpu or cuda, if not the run file's.
    jobs
        Processes that measure samples at the same time, each with the model in memory and its share of the processors.
    directory
        Where the samples are kept: the same command goes on where it was stopped. Default: evaluations/RUN.
    out
        Write the record to this JSON file; of a run of several models, one file each into this folder.
    """
    from tersekv.eval.run import run as measure
    from tersekv.eval.runfile import read_run
    from tersekv.record import write_all
    from tersekv.reports.tables import Results

    settings = read_run(run, text=text, data=data, model=model, dtype=dtype, device=device)
    with Stages() as stages:
        records = measure(settings, directory or Path("evaluations") / run.stem, stages, jobs)
    if out is not None:
        write_all(records, out)
    show(Results(list(records.values())), json)


@app.command
def report(*records: Path, out: Path = Path("report"), reference: str | None = None, check: bool = False) -> None:
    """Records as tables, pictures and one HTML page; without records, the generated parts of this project's pages.

    Parameters
    ----------
    records
        JSON files that `tersekv eval --out` wrote.
    out
        The folder to write index.html and the pictures to.
    reference
        A spec of the records: also show what all others differ from it by, paired by sample. Default: the run file's.
    check
        Write nothing: name the generated parts of README and docs that are stale, and exit with status 1 if there
        are any.
    """
    if not records:
        from tersekv.pages import update

        sys.exit(update(check))
    from tersekv.errors import InputError
    from tersekv.record import read
    from tersekv.reports.page import write_report
    from tersekv.reports.tables import Results

    if check:
        raise InputError("--check looks at README and docs, whose records lie in results/. Give no records with it.")
    found = [read(path) | ({"reference": reference} if reference else {}) for path in records]
    write_report(found, out)
    show(Results(found), False)
    Console(stderr=True).print(f"written: {out / 'index.html'}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An error of ours is one line on standard error and exit status 2; Ctrl-C is 130."""
    try:
        app(arguments)
    except TersekvError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
