"""The picture of a record: bytes held against KL, one marker family a codec; or times. Needs the extra `plots`."""

import json
from collections import defaultdict
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from tersekv.bench.picture import draw_attention
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


def caption(record: dict[str, Any]) -> str:
    """What exactly a record measured, in one paragraph."""
    versions = ", ".join(f"{name} {text}" for name, text in record["versions"].items())
    where = f"{record['device']}, ops: {record['implementation']}, {versions}"
    made = f"{where}, commit {record['commit'][:10]}, {record['date']}."
    if threads := record.get("settings", {}).get("threads"):
        made = f"{threads} thread{'s' * (threads > 1)} of {made}"
    if "run" not in record:
        return made
    run, rows = record["run"], record["rows"]
    errors = [row["kl_standard_error"] / row["kl_mean"] for row in rows if row["kl_mean"] > 0]
    worst = 100 * max(errors, default=0)
    return (
        f"{run['model']} ({record['model']['source']}) in {run['dtype']}, the first {run['tokens']:,} tokens "
        f"of {run['text']} in one piece, {rows[0]['positions']:,} positions scored, each token seeing what "
        "decoding would show it. Held: bytes of every tensor of the cache after the last token. KL: KL(dense "
        "|| packed) of the next-token distribution in nats; its standard error is at most "
        f"{worst:.0f} % of it. {made}"
    )


def family_and_label(spec: str) -> tuple[str, str]:
    """Marker family and point label of a spec: its codecs without their bits, and the bits."""
    parsed = parse(spec)
    families, bits = [], []
    for side, codec in (("k", parsed.k), ("v", parsed.v)):
        name, _, options = print_codec(codec, side).partition(":")
        kept = [option for option in options.split(",") if option and not option.startswith("bits=")]
        families.append(" ".join([name, *kept]))
        bits.append(f"{codec.layout(64).nominal_bits:g}")
    k, v = families
    policy = [word for word in spec.split() if word.startswith(("sink=", "recent="))]
    family = k if k.startswith(v) else f"{k} / {v}"
    return " ".join([family, *policy]), f"{bits[0]}" if bits[0] == bits[1] else f"K{bits[0]} V{bits[1]}"


def digest(source: Path) -> str:
    return sha256(source.read_bytes()).hexdigest()


def is_fresh(picture: Path, source: Path) -> bool:
    """Whether the picture was drawn from this very record; the picture's metadata holds the record's hash."""
    return picture.is_file() and digest(source) in picture.read_text(encoding="utf-8")


def svg(source: Path) -> bytes:
    """The picture of the record in `source`; the same bytes every time with one version of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    record = json.loads(source.read_text())
    with matplotlib.rc_context({"svg.hashsalt": "tersekv", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained", facecolor="white")
        draw = draw_attention if record.get("bench") == "attend" else _draw
        draw(figure.add_subplot(), record)
        out = BytesIO()
        about = {
            "Title": caption(record),
            "Source": f"sha256 {digest(source)}",
            "Date": None,
            "Creator": None,
        }
        figure.savefig(out, format="svg", metadata=about)
    return out.getvalue()


def _draw(axes: Any, record: dict[str, Any]) -> None:
    points: dict[str, list[tuple[float, float, float, str]]] = defaultdict(list)
    for row in record["rows"]:
        if row["kl_mean"] > 0:
            family, label = family_and_label(row["spec"])
            share = 100 * row["held"] / row["dense"]
            points[family].append((share, row["kl_mean"], row["kl_standard_error"], label))
    for (family, found), style in zip(sorted(points.items()), STYLES * 9, strict=False):
        _family(axes, family, sorted(found), *style)
    run = record["run"]
    title = f"{run['model']}, {run['tokens']:,} tokens of {run['text']}; {DENSE}"
    axes.set_title(title, fontsize=9)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"bytes held, % of the dense {run['dtype']} cache",
        ylabel="KL to the dense cache, nats",
    )
    low, high = axes.get_xlim()
    axes.set_xticks([share for share in SHARES if low <= share <= high])
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(frameon=False, title="codec; beside each point the bits of its codes", title_fontsize=9)


def _family(axes: Any, name: str, found: list[Any], colour: str, marker: str, side: tuple[int, int]) -> None:
    """One codec's points with standard errors; a line joins those with as many bits for K as for V."""
    x, y, error, _ = zip(*found, strict=True)
    axes.errorbar(x, y, error, fmt=marker, color=colour, markersize=6, capsize=2, linewidth=1, label=name)
    even = [point[:2] for point in found if point[3].isdigit()]
    axes.plot(*zip(*even, strict=True) if even else ([], []), color=colour, linewidth=0.6)
    for *at, _, label in found:
        offset = side if label.isdigit() else (7, -9)
        axes.annotate(label, at, offset, textcoords="offset points", color=colour, fontsize=8.5)
