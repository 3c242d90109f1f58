"""The verbs of `tersekv calibrate`. As in `cli`, each imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from tersekv.terminal import Json, Stages, show

# Options that verbs share, and what `--help` says of them.
Model = Annotated[
    str, Parameter(help="smollm2, qwen2.5-coder-1.5b, gemma3-270m, a hub id, a local folder or a GGUF file.")
]
Text = Annotated[Path, Parameter(help="The calibration text, a UTF-8 file. Do not evaluate on it.")]
Windows = Annotated[int, Parameter(help="Windows of the text, drawn without replacement.")]
HeldOut = Annotated[int, Parameter(help="Windows of the text, drawn without replacement; a fifth of them is held out.")]
Window = Annotated[int, Parameter(help="Tokens of a window.")]
Follow = Annotated[int, Parameter(help="Tokens after the window, by which it is judged.")]
GradientsDirectory = Annotated[
    Path | None,
    Parameter(
        name="--dir",
        help="Where windows are kept: the same command goes on where it was stopped, and other methods that ask for "
        "gradients reuse them. Default: calibrations/gradients/MODEL.",
    ),
]
Seed = Annotated[int, Parameter(help="Of windows, and of whatever else is drawn.")]
Rope = Annotated[str, Parameter(help="before or after: where keys are stored.")]
Device = Annotated[str, Parameter(help="cpu or cuda.")]
calibrate = App(name="calibrate", help="Fit a policy to a model, on a text, by measurement.")


@calibrate.command
def adaptive(
    model: Model,
    *,
    text: Text,
    spec: str = "rotated:bits=3",
    windows: Windows = 24,
    tokens: int = 64,
    cost: Annotated[float, Parameter(help="Weight of expected bits beside that of labels, 1, in training.")] = 0.1,
    quality: Annotated[float, Parameter(help="Weight of the expected loss of quality.")] = 1.0,
    window: Window = 384,
    follow: Follow = 32,
    seed: Seed = 0,
    device: Device = "cpu",
    directory: Annotated[Path | None, Parameter(name="--dir")] = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Train the controller of policy=adaptive: which tokens of this model are worth their bits.

    Parameters
    ----------
    spec
        The codec, and as its bits the average that labels are made for. Other averages work too.
    tokens
        Tokens measured in each: every precision of each, alone.
    directory
        Where measurements are kept: the same command goes on where it was stopped, and other weights reuse them.
        Default: calibrations/adaptive/MODEL.
    out
        The controller. Default: controllers/MODEL.safetensors.
    """
    from tersekv.calibrate.adaptive import calibrate as run
    from tersekv.calibrate.session import Settings
    from tersekv.calibrate.training import Weights

    settings, name = Settings(model, text, spec, windows, window, follow, seed, device), Path(model).name
    folder, out = directory or Path(f"calibrations/adaptive/{name}"), out or Path(f"controllers/{name}.safetensors")
    with Stages() as stages:
        result = run(settings, tokens, folder, out, stages, Weights(cost, quality))
    show(result, json)


@calibrate.command
def budget(
    model: Model,
    *,
    text: Text,
    bits: float,
    spec: str = "rotated",
    windows: Windows = 12,
    window: Window = 384,
    follow: Follow = 32,
    seed: Seed = 0,
    device: Device = "cpu",
    directory: Annotated[Path | None, Parameter(name="--dir")] = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Bits for each layer's keys and values under one budget, as a spec that any cache of this model takes.

    Parameters
    ----------
    bits
        The average over layers, keys and values; nominal, such as 3.0.
    spec
        Codecs and policy, whose bits are to be replaced.
    directory
        Where measurements are kept: the same command goes on where it was stopped, and another --bits reuses them.
        Default: calibrations/budget/MODEL.
    out
        Write all that was measured to this JSON file.
    """
    from tersekv.calibrate.budget import calibrate as run
    from tersekv.calibrate.session import Settings
    from tersekv.record import write

    settings = Settings(model, text, spec, windows, window, follow, seed, device)
    folder = directory or Path("calibrations") / "budget" / Path(model).name
    with Stages() as stages:
        result = run(settings, bits, folder, stages)
    if out is not None:
        write(result.as_dict(), out)
    show(result, json)
    if not json:
        print(*(f"control: {text}" for text in result.controls), f"spec: {result.spec}", sep="\n")


@calibrate.command
def vq(
    model: Model,
    *,
    text: Text,
    dim: int = 8,
    index: int = 8,
    stages: int = 1,
    rope: Rope = "after",
    weights: str = "anchors",
    rounds: int = 12,
    windows: HeldOut = 16,
    window: Window = 1024,
    seed: Seed = 0,
    device: Device = "cpu",
    directory: Annotated[Path | None, Parameter(name="--dir")] = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Codebooks for the keys and values of this model, by k-means weighted with what errors do to attention outputs.

    Parameters
    ----------
    dim
        Values that share an index.
    index
        Bits of an index, up to 8.
    stages
        1, or 2 entries that are added.
    weights
        anchors: by the anchor scores of AnTKV; none: all tokens alike, the control.
    rounds
        Of k-means.
    directory
        Where windows and layers are kept: the same command goes on where it was stopped, and other books reuse the
        windows. Default: calibrations/vq/MODEL.
    out
        The books. Default: codebooks/MODEL.safetensors.
    """
    from tersekv.calibrate.session import Settings
    from tersekv.calibrate.vq import Shape
    from tersekv.calibrate.vq import calibrate as run

    name, shape = Path(model).name, Shape(dim, index, stages, rope, weights, rounds)
    settings = Settings(model, text, "none", windows, window, 1, seed, device)
    folder = directory or Path("calibrations") / "vq" / name
    with Stages() as progress:
        result = run(settings, shape, folder, out or Path("codebooks") / f"{name}.safetensors", progress)
    show(result, json)


@calibrate.command
def klt(
    model: Model,
    *,
    text: Text,
    groups: int = 8,
    weights: str = "fisher",
    windows: HeldOut = 10,
    window: Window = 1024,
    seed: Seed = 0,
    device: Device = "cpu",
    directory: GradientsDirectory = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Channels of this model's keys and values that codes of few bits should have, by what errors along them cost.

    Parameters
    ----------
    groups
        Of channels, each with bits of its own; 1: the same bits for all, which kernels read.
    weights
        fisher: what counts is Fisher information; queries: what queries see of keys, of values all alike.
    out
        The matrices. Default: transforms/MODEL.safetensors.
    """
    from tersekv.calibrate.klt import calibrate as run
    from tersekv.calibrate.session import Settings

    settings, name = Settings(model, text, "none", windows, window, 1, seed, device), Path(model).name
    folder = directory or Path("calibrations") / "gradients" / name
    with Stages() as stages:
        result = run(settings, groups, weights, folder, out or Path("transforms") / f"{name}.safetensors", stages)
    show(result, json)


@calibrate.command
def kvquant(
    model: Model,
    *,
    text: Text,
    bits: int = 3,
    outliers: int = 1,
    rope: Rope = "before",
    weights: str = "fisher",
    rounds: int = 25,
    windows: HeldOut = 10,
    window: Window = 1024,
    seed: Seed = 0,
    device: Device = "cpu",
    directory: GradientsDirectory = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Levels of this model's keys, by channel, and values, by layer, by k-means weighted with Fisher information.

    Parameters
    ----------
    bits
        Of a code.
    outliers
        Of each vector, stored apart.
    weights
        fisher: by the squares of gradients; none: all values alike, the control.
    rounds
        Of k-means.
    out
        The tables. Default: codebooks/MODEL-kvquant.safetensors.
    """
    from tersekv.calibrate.kvquant import Shape
    from tersekv.calibrate.kvquant import calibrate as run
    from tersekv.calibrate.session import Settings

    name, shape = Path(model).name, Shape(bits, outliers, rope, weights, rounds)
    settings = Settings(model, text, "none", windows, window, 1, seed, device)
    folder = directory or Path("calibrations") / "gradients" / name
    with Stages() as stages:
        result = run(settings, shape, folder, out or Path("codebooks") / f"{name}-kvquant.safetensors", stages)
    show(result, json)
