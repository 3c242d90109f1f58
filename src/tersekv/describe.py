"""`tersekv list` and `tersekv info`: what there is, what a page looks like, what a context costs."""

from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tersekv.errors import SpecError
from tersekv.layout import Layout
from tersekv.ops import implementation, refusals
from tersekv.ops.recipe import Recipe
from tersekv.registry import POLICIES, PRESETS
from tersekv.spec import Spec, codec_class, codecs, option_text, parse, parse_codec, policy_class
from tersekv.terminal import bytes_text

PICTURE_WIDTH = 64
PLACE = ("layer", "side")  # options of a codec that say where it is, which the spec and the store fill in
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass(frozen=True)
class Listing:
    """Every codec and policy with its options and their defaults, and every preset."""

    codecs: list[dict[str, Any]]
    policies: list[dict[str, Any]]
    presets: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        methods = _options_table("codec", self.codecs, "codecs: k=NAME:option=value,... v=...")
        policies = _options_table("policy", self.policies, "policies: policy=NAME option=value ...")
        presets = Table("preset", "stands for", title="presets, chosen by measurement: docs/presets.md")
        for name, text in self.presets.items():
            presets.add_row(name, text)
        return Group(methods, policies, presets)


def _options_table(what: str, rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(what, "what it is", "options (default)", title=title)
    for row in rows:
        table.add_row(row["name"], row["summary"], ", ".join(f"{k}={v}" for k, v in row["options"].items()))
    return table


def listing() -> Listing:
    rows = [_row(name, codec_class(name), _options(name)) for name in sorted(codecs())]
    policies = []
    for name in POLICIES:
        cls = policy_class([f"policy={name}"])
        policies.append(_row(name, cls, {f.name: option_text(f.default) for f in fields(cls)}))
    return Listing(rows, policies, PRESETS)


def _row(name: str, cls: type, options: dict[str, str]) -> dict[str, Any]:
    summary = (import_module(cls.__module__).__doc__ or cls.__doc__ or "").strip().splitlines()[0]
    return {"name": name, "summary": summary.removeprefix(f"`{name}`: "), "options": options}


def _options(name: str) -> dict[str, str]:
    """Each option that users choose, and its default as a spec writes it; where the sides differ, both."""
    k, v = parse_codec(name, "k"), parse_codec(name, "v")
    names = [f.name for f in fields(k) if f.name not in PLACE]
    texts = {name: (option_text(getattr(k, name)), option_text(getattr(v, name))) for name in names}
    return {option: a if a == b else f"{a} for k, {b} for v" for option, (a, b) in texts.items()}


@dataclass(frozen=True)
class Info:
    """A spec at one head dim: its planes, and for a model what `context` tokens cost."""

    spec: Spec
    head_dim: int
    model: dict[str, Any] | None = None

    @property
    def layouts(self) -> dict[str, Layout]:
        return {"k": self.spec.k.layout(self.head_dim), "v": self.spec.v.layout(self.head_dim)}

    @property
    def sides(self) -> dict[str, tuple[Layout, Recipe]]:
        recipes = {"k": self.spec.k.recipe(self.head_dim), "v": self.spec.v.recipe(self.head_dim)}
        return {side: (layout, recipes[side]) for side, layout in self.layouts.items()}

    @property
    def attention(self) -> str:
        """What attends to these pages on a processor, and why nothing faster does."""
        return self._attention("cpu", implementation("cpu"))

    @property
    def attention_cuda(self) -> str:
        """The same on an NVIDIA GPU, whether there is one or not."""
        return self._attention("cuda", "CUDA")

    def _attention(self, device: str, kernels: str) -> str:
        if self.spec.policy.evaluation_only:
            return "reference (for evaluation only: no page is made, and no byte saved)"
        reasons = refusals(self.sides, device)
        return f"reference ({reasons})" if reasons else kernels

    @property
    def page_bytes(self) -> int:
        return sum(layout.nbytes for layout in self.layouts.values())

    def as_dict(self) -> dict[str, Any]:
        planes = [asdict(p) | {"side": s, "bytes": p.nbytes} for s, x in self.layouts.items() for p in x.planes]
        block = self.layouts["k"].block
        return {
            "spec": str(self.spec),
            "head_dim": self.head_dim,
            "block": block,
            "page_bytes": self.page_bytes,
            "bytes_per_token": self.page_bytes / block,
            "nominal_bits": {side: layout.nominal_bits for side, layout in self.layouts.items()},
            "bits_per_value": {side: layout.bits_per_value for side, layout in self.layouts.items()},
            "planes": planes,
            "recipes": {side: recipe.name for side, (_, recipe) in self.sides.items()},
            "attention": self.attention,
            "attention_cuda": self.attention_cuda,
            "model": self.model,
        }

    def __rich__(self) -> Group:
        block = self.layouts["k"].block
        head = (
            f"{self.spec} at head dim {self.head_dim}: a page of {block} tokens is {self.page_bytes:,} bytes, "
            f"{self.page_bytes / block:.2f} bytes a token and head (bf16: {4 * self.head_dim})\n"
            f"recipes: {', '.join(f'{recipe.name} for {side}' for side, (_, recipe) in self.sides.items())}; "
            f"attention on a processor by {self.attention}; on an NVIDIA GPU by {self.attention_cuda}"
        )
        parts = [head, self._planes(), self._picture()]
        return Group(*parts, *([self._cost(self.model)] if self.model else []))

    def _planes(self) -> Table:
        table = Table("side", "plane", "rows x cols", "kind", "bytes", "bits a value", title="planes of a page")
        for side, layout in self.layouts.items():
            values = layout.block * layout.d
            for plane in layout.planes:
                kind = f"{plane.bits}-bit codes" if plane.kind == "code" else plane.kind
                shape = f"{plane.rows} x {plane.cols}"
                table.add_row(side, plane.name, shape, kind, f"{plane.nbytes:,}", f"{8 * plane.nbytes / values:.3f}")
            padding = layout.nbytes - sum(p.nbytes for p in layout.planes)
            table.add_row(side, "padding", "", "", f"{padding:,}", f"{8 * padding / values:.3f}")
            table.add_row(
                side,
                "all",
                "",
                f"nominal {layout.nominal_bits:g}",
                f"{layout.nbytes:,}",
                f"{layout.bits_per_value:.3f}",
            )
        return table

    def _picture(self) -> Text:
        """The page as it lies in memory, one letter for every 1/64 of its bytes, at least one a plane."""
        bar, legend = Text("\n|"), Text("\n")
        planes = [(side, p) for side, layout in self.layouts.items() for p in layout.planes]
        for number, (side, plane) in enumerate(planes):
            letter, colour = chr(ord("A") + number), COLOURS[number % len(COLOURS)]
            bar.append(letter * max(1, round(PICTURE_WIDTH * plane.stride / self.page_bytes)), style=colour)
            legend.append(f"  {letter} {side}.{plane.name}", style=colour)
        return bar.append("|") + legend

    def _cost(self, model: dict[str, Any]) -> Table:
        table = Table("", "layers", "dense", "packed", "ratio", title=f"{model['name']}, {model['context']:,} tokens")
        dense, packed, window = model["dense"], model["packed"], model["window"]
        table.add_row(
            "packed layers", f"{model['packed_layers']}", bytes_text(dense), bytes_text(packed), f"{dense / packed:.2f}"
        )
        table.add_row("other layers", f"{model['other_layers']}", bytes_text(window), bytes_text(window), "1.00")
        total = dense + window, packed + window
        table.add_row("all", "", *map(bytes_text, total), f"{total[0] / total[1]:.2f}")
        return table


def info(spec: str, head_dim: int | None, model: str | None, context: int | None, progress: Any = None) -> Info:
    """Raises SpecError or ModelError. With a model its head dim and context limit are the defaults."""
    parsed = parse(spec)
    if parsed.layers:
        raise SpecError(f"Each layer of {spec} has pages of its own. Ask for one, such as {parsed.at(0)}.")
    if model is None:
        return Info(parsed, 128 if head_dim is None else head_dim)
    from tersekv.hf.cost import model_cost
    from tersekv.models import config

    costs = model_cost(config(model, progress), parsed, context)
    return Info(parsed, costs["head_dim"] if head_dim is None else head_dim, {"name": model} | costs)
