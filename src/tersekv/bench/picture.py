"""Time of a decoding step against context length, from the grid `context` of a record of `tersekv bench attend`."""

from typing import Any

# Contestant, colour and marker, from Okabe and Ito; ours in one colour, so that three lines are one thing.
LINES = {
    "4 bits": ("#0072B2", "o"),
    "3 bits": ("#0072B2", "^"),
    "2 bits": ("#0072B2", "v"),
    "torch bf16 folded": ("#E69F00", "s"),
    "torch fp32 enable_gqa": ("#D55E00", "s"),
    "torch bf16 enable_gqa": ("#CC79A7", "s"),
    "llama.cpp f16": ("#555555", "D"),
    "llama.cpp q8_0": ("#555555", "P"),
    "llama.cpp q4_0": ("#555555", "X"),
}
OURS = "tersekv "


def draw_attention(axes: Any, record: dict[str, Any]) -> None:
    cases = [case for case in record["cases"] if case["grid"] == "context"]
    tokens = [case["t"] for case in cases]
    for name, (colour, marker) in LINES.items():
        rows = [row for case in cases for row in case["rows"] if row["name"] == name]
        if len(rows) != len(cases):
            continue
        label = OURS * (rows[0]["kind"] == "ours") + name
        times = [1e3 * row["seconds"]["median"] for row in rows]
        below = [1e3 * (row["seconds"]["median"] - row["seconds"]["p20"]) for row in rows]
        above = [1e3 * (row["seconds"]["p80"] - row["seconds"]["median"]) for row in rows]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1, "capsize": 2}
        axes.errorbar(tokens, times, (below, above), label=label, **style)
    case, threads = cases[0], record["settings"]["threads"]
    axes.set_title(
        f"Attention of one decoding step, one layer: d={case['d']}, {case['hq']} query and {case['h']} KV heads, "
        f"{threads} thread{'s' * (threads > 1)}, cold cache",
        fontsize=9,
    )
    axes.set(
        xscale="log", yscale="log", xlabel="cached tokens", ylabel="milliseconds, median and 20th to 80th percentile"
    )
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(frameon=False, fontsize=8.5)
