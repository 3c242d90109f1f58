"""The picture of a record: quality against bytes, one marker family a codec; or times. Needs the extra `plots`."""

import json
from collections import defaultdict
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from tersekv.bench.picture import draw_attention
from tersekv.errors import TersekvError
from tersekv.record import headline
from tersekv.registry import PRESETS
from tersekv.reports.captions import caption
from tersekv.reports.cells import shown
from tersekv.reports.models import draw_models
from tersekv.spec import parse, print_codec

# From Okabe and Ito's colours, which colour-blind people can tell apart; the marker says the same once more.
# The last pair is where labels go, in points from the marker: neighbouring families get different sides.
STYLES = (
    ("#0072B2", "o", (5, 5)),
    ("#D55E00", "s", (7, -3)),
    ("#555555", "P", (-4, 7)),
    ("#009E73", "^", (-10, -9)),
    ("#CC79A7", "D", (-12, 3)),
    ("#000000", "v", (8, -3)),
)
SHARES = (10, 15, 20, 30, 40, 50, 75, 100)  # ticks in percent
DENSE = "off the scale: the dense cache, 100 % and KL 0"
Point = tuple[float, float, tuple[float, float], str]  # bytes in percent, KL, its interval, label


def family_and_label(spec: str) -> tuple[str, str]:
    """Marker family and point label of a spec: its codecs without their bits, and the bits."""
    parsed = parse(spec)
    families, bits = [], []
    for side, codec in (("k", parsed.k), ("v", parsed.v)):
        name, _, options = print_codec(codec, side).partition(":")
        kept = [option for option in options.split(",") if option and not option.startswith("bits=")]
        families.append(" ".join([name, *kept]))
        bits.append(f"{codec.layout(64).nominal_bits:g}")
    label = bits[0] if bits[0] == bits[1] else f"K{bits[0]} V{bits[1]}"
    if shown(spec) in PRESETS:
        return "terse, the presets", label
    k, v = families
    policy = [word for word in spec.split() if word.startswith(("policy=", "sink=", "recent=", "keep="))]
    family = k if k.startswith(v) else f"{k} / {v}"
    return " ".join([family, *policy]), label


def digest(source: Path) -> str:
    """Of a record, or of the records in a folder."""
    return sha256(b"".join(path.read_bytes() for path in _records(source))).hexdigest()


def _records(source: Path) -> list[Path]:
    return sorted(source.glob("*.json")) if source.is_dir() else [source]


def is_fresh(picture: Path, source: Path) -> bool:
    """Whether the picture was drawn from this very record; the picture's metadata holds the record's hash."""
    return picture.is_file() and digest(source) in picture.read_text(encoding="utf-8")


def svg(source: Path) -> bytes:
    """The picture of the record in `source`, or of the records of several models in that folder; names their hash."""
    found, name = [json.loads(path.read_text()) for path in _records(source)], f"sha256 {digest(source)}"
    record = found[0]
    if source.is_dir():
        return picture(lambda figure: draw_models(figure, found), caption(record), name, size=(9.6, 4.4))
    draw = draw_attention if record.get("bench") == "attend" else draw_quality
    return picture(lambda figure: draw(figure.add_subplot(), record), caption(record), name)


def picture(
    draw: Callable[[Any], None], title: str, source: str = "", kind: str = "svg", size: tuple[float, float] = (7.2, 4.8)
) -> bytes:
    """What `draw` puts on a figure, as SVG or PNG; the same bytes every time with one version of matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TersekvError('Pictures need matplotlib: pip install "tersekv[plots]".') from error

    with matplotlib.rc_context({"svg.hashsalt": "tersekv", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure)
        about = {"Title": title, "Source": source}
        about |= {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        out = BytesIO()
        figure.savefig(out, format=kind, metadata=about, dpi=160)
    return out.getvalue()


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats: as few bytes and as small an error. Sorted by bytes."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def draw_quality(axes: Any, record: dict[str, Any]) -> None:
    """Bytes held against KL, and the front that no spec of the record beats."""
    points: dict[str, list[Point]] = defaultdict(list)
    for row in record["rows"]:
        found = headline(row)
        if found and found["kl_mean"] > 0:
            family, label = family_and_label(row["spec"])
            share = 100 * found["held"] / found["dense"]
            low, high = found.get("kl_mean_interval") or (found["kl_mean"], found["kl_mean"])
            points[family].append((share, found["kl_mean"], (low, high), label))
    for (family, found), style in zip(sorted(points.items()), STYLES * 9, strict=False):
        _family(axes, family, sorted(found), *style)
    front = pareto([point[:2] for found in points.values() for point in found])
    if front:
        style = {"color": "#999999", "linestyle": ":", "linewidth": 1, "zorder": 0, "drawstyle": "steps-post"}
        axes.plot(*zip(*front, strict=True), **style)
    run, text = record["run"], record["data"]["text"]["name"]
    length = next(iter(record["rows"][0]["logits"]))
    axes.set_title(f"{run['model']}, windows of {int(length):,} tokens of {text}\n{DENSE}", fontsize=9)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"bytes held, % of the dense {run['dtype']} cache\ndotted: the front that nothing here beats",
        ylabel="KL to the dense cache, nats",
    )
    low, high = axes.get_xlim()
    axes.set_xticks([share for share in SHARES if low <= share <= high])
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(frameon=False, title="codec; beside each point the bits of its codes", title_fontsize=9)


def _family(axes: Any, name: str, found: list[Point], colour: str, marker: str, side: tuple[int, int]) -> None:
    """One codec's points with their intervals; a line joins those with as many bits for K as for V."""
    x, y, intervals, _ = zip(*found, strict=True)
    error = [[at - low for at, (low, _) in zip(y, intervals, strict=True)]]
    error += [[high - at for at, (_, high) in zip(y, intervals, strict=True)]]
    axes.errorbar(x, y, error, fmt=marker, color=colour, markersize=6, capsize=2, linewidth=1, label=name)
    even = [point[:2] for point in found if point[3].isdigit()]
    axes.plot(*zip(*even, strict=True) if even else ([], []), color=colour, linewidth=0.6)
    for share, kl, _, label in found:
        offset = side if label.isdigit() else (7, -9)
        axes.annotate(label, (share, kl), offset, textcoords="offset points", color=colour, fontsize=8.5)
