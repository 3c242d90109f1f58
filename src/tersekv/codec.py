"""What a codec is. A new method is one frozen dataclass in `codecs/` and one line in `spec.CODECS`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tersekv.errors import SpecError, did_you_mean
from tersekv.layout import Layout
from tersekv.ops import repack, rotate, unrotate
from tersekv.ops.encoders import Encoder
from tersekv.ops.recipe import Recipe
from tersekv.packed import Packed


@dataclass(frozen=True)
class Fitted:
    """What was fitted to a model and is held beside the pages: whose it is, which it is, how many bytes it has.

    `seconds`: how long fitting took, where the file says it.
    """

    fingerprint: str  # of the model, see `files.fingerprint`
    model: str
    digest: str
    nbytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Codec(ABC):
    """How the keys or the values of one block become planes and back. The fields are the configuration.

    Values live in two domains: the model's, and the *folded* one in which codes are taken. `decode` returns to the
    model's; attention stays in the folded one, because `q . k = fold_query(q) . k_folded` and the output of folded
    values is brought back once a step by `unfold_output`. The folded domain may have more channels than the model's.
    """

    side_defaults: ClassVar[dict[str, dict[str, Any]]] = {}  # option defaults that differ for "k" and "v"

    @abstractmethod
    def layout(self, d: int) -> Layout:
        """Planes for head dim `d`. Raises SpecError if `d` does not fit the options."""

    @abstractmethod
    def recipe(self, d: int) -> Recipe:
        """Which arithmetic turns the planes into folded values."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        """Each block on its own, so that any chunking of the input gives the same bytes."""

    def encode_for(self, x: Float[Tensor, "*lead block d"], asked: Float[Tensor, "*#lead d d"] | None) -> Packed:
        """The same planes for keys that are read by the queries of which `asked` is made, if a codec can do that."""
        if asked is not None:
            raise SpecError(f"{type(self).__name__} cannot encode for queries. Use a codec that can, such as rotated.")
        return self.encode(x)

    def rounded(self, x: Float[Tensor, "b h t d"], counted: Bool[Tensor, "b h t"]) -> Float[Tensor, "b h t d"]:
        """What all `counted` tokens together would be read as in fp32, by ranges of the whole sequence.

        For evaluation only, see `policy.wholesequence`: a block knows nothing of other blocks.
        """
        raise SpecError(f"{self} has no form of a whole sequence. Use direction by channels, or another policy.")

    @property
    def whole(self) -> bool:
        """Whether only `rounded` can do what the options say, and no block on its own."""
        return False

    def check_blocks(self) -> None:
        """Raises SpecError if it cannot encode blocks."""
        if self.whole:
            raise SpecError(
                f"{self} is of a whole sequence, for evaluation only: no block can be encoded so. Add "
                "policy=wholesequence."
            )

    @property
    def positional(self) -> bool:
        """Whether codes depend on where a block begins: then `encode_at` is called in place of `encode`."""
        return False

    def encode_at(self, x: Float[Tensor, "*lead block d"], starts: Int[Tensor, "*lead"]) -> Packed:
        """As `encode`, for blocks of consecutive tokens, of which the first has the position `starts`."""
        return self.encode(x)

    def asked(self, moments: Float[Tensor, "*lead d d"]) -> Float[Tensor, "*lead d d"]:
        """What `encode_for` needs to know of queries, in fp16, from sums of q' q of folded ones."""
        raise SpecError(f"{type(self).__name__} cannot encode for queries. Use a codec that can, such as rotated.")

    @property
    def encodes_for_queries(self) -> bool:
        return type(self).encode_for is not Codec.encode_for

    def encoder(self, d: int) -> Encoder | None:
        """What `encode` does, as data for native code that gives the same bytes; None: only `encode` does it."""
        return None

    def with_bits(self, bits: int) -> "Codec":
        """The same with other bits. Raises SpecError where there is no such option, or not so many."""
        if "bits" not in {f.name for f in fields(self)}:
            raise SpecError(f"{type(self).__name__} has no option bits. Use a codec that has, such as rotated.")
        return replace(self, **{"bits": bits})  # pyright: ignore[reportCallIssue]

    @property
    def fitted(self) -> Fitted | None:
        """What it needs of a file that was made for one model; None: it takes any. Each KV head then has its own, so
        `encode` is given all heads: (*lead, h, blocks, block, d).
        """
        return None

    def at(self, layer: int) -> "Codec":
        """The codec of one layer of a model."""
        return self

    def decode(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        """fp32 values in the model's domain, whatever order the codes are stored in."""
        return self.unfold_output(self.recipe(packed.layout.d).values(repack(packed, "linear")))

    @property
    def rotation(self) -> int | None:
        """The seed of the signed Hadamard rotation that leads to the folded domain; None: it is the model's."""
        return None

    @property
    def folds_by_rotation(self) -> bool:
        """Whether `rotation` says it all, so that kernels can fold; who overrides the two methods below knows more."""
        mine = type(self)
        return mine.fold_query is Codec.fold_query and mine.unfold_output is Codec.unfold_output

    def fold_query(self, q: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead folded"]:
        return q if self.rotation is None else rotate(q, self.rotation)

    def unfold_output(self, o: Float[Tensor, "*lead folded"]) -> Float[Tensor, "*lead d"]:
        return o if self.rotation is None else unrotate(o, self.rotation)


def check_bits(bits: int, low: int, high: int) -> None:
    if not low <= bits <= high:
        raise SpecError(f"bits={bits} is out of range. Allowed: {low} to {high}.")


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{option}={value} is unknown. {did_you_mean(value, allowed)}")
