"""A decoding step of a whole model as one CUDA graph."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tersekv.device_tail import DeviceTail
from tersekv.errors import ModelError
from tersekv.hf.attention import ROUTES
from tersekv.hf.cache import PackedCache
from tersekv.hf.layer import PackedLayer, restore_layer, state_of

LEAST = 1024  # tokens of room that a host's limit is taken for, where a cache holds fewer than it
OURS = str(Path(__file__).parents[1])
PLAIN = (bool, int, float, str, type(None))  # arguments of a forward pass that can be compared


def refusal(model: PreTrainedModel, cache: PackedCache) -> str:
    """Why a model never decodes in a CUDA graph with a cache; empty if only a step can tell."""
    if (model.config._attn_implementation or "").partition(":")[0] != ROUTES["fused"]:
        return "the model is not attached with route=fused"
    devices = {str(x.device) for x in model.parameters()}
    if len(devices) > 1 or model.device.type != "cuda":
        return f"the model is on {', '.join(sorted(devices))}, not on one CUDA device"
    dense = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, PackedLayer)}
    return f"layers are not packed: {', '.join(sorted(dense))}" if dense else ""


class GraphedForward:
    """`model(**inputs)` for one new token of each sequence.

    A pass that cannot be a replay runs as usual, and the one after it is captured anew: the first one, which moves
    the tokens to where launches can write, and the first one after room is used up or the cache was changed otherwise.
    """

    def __init__(self, model: PreTrainedModel, cache: PackedCache, length: int = 0) -> None:
        """`length`: tokens that the host says a sequence may come to have; 0: it does not say."""
        self.model, self.cache, self.length = model, cache, length
        self.layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
        self.broken = ""  # why the model cannot be captured
        self._forget()

    def _forget(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.said: Any = None
        self.given: dict[str, Any] = {}  # the inputs of the graph
        self.where: list[DeviceTail | None] = []  # and the memory of each layer

    def __call__(self, **inputs: Any) -> Any:
        """What the model says, in memory of its own. What no graph can hold runs as usual, and `decoding` says why."""
        if why := self._unlike(inputs):
            self.cache.decoding = f"eager: {why}"
            return self.model(**inputs)
        said = self.run(inputs)
        return type(said)(**{name: _owned(x) for name, x in said.items()})

    def _unlike(self, inputs: dict[str, Any]) -> str:
        """Why a pass is not one that a graph could hold."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or ids.shape[1] != 1 or self.layers[0].store is None:
            return "not one new token of each sequence"
        if inputs.get("past_key_values") is not self.cache or inputs.get("position_ids") is None:
            return "another cache, or no position_ids"
        if mask is not None and (mask.ndim != 2 or self.cache.shown(mask, 1).padding is not None):
            return "the attention mask hides new tokens"
        odd = [name for name, x in inputs.items() if not isinstance(x, (*PLAIN, Tensor, PackedCache))]
        return f"the model is given {', '.join(odd)}" if odd else self.broken

    @torch.no_grad()
    def run(self, inputs: dict[str, Any]) -> Any:
        """What the model says, in memory that the next call writes to again."""
        mask = inputs.get("attention_mask")
        self.cache.check_next(1)
        self.cache.shown(mask, 1).check(self.layers[0].opened())
        inputs = {name: x for name, x in inputs.items() if name != "attention_mask"}  # it hides nothing more
        where = [layer.opened().ready(1) for layer in self.layers]
        if None in where:
            return self._made_ready(inputs)
        if self.graph is None or self.where != where or not self._fits(inputs):
            return self._captured(inputs, where)
        for name, x in inputs.items():
            if isinstance(x, Tensor):
                self.given[name].copy_(x)
        self.graph.replay()
        for layer in self.layers:
            layer.replayed(1)
        return self.said

    def _made_ready(self, inputs: dict[str, Any]) -> Any:
        """A step that moves the tokens to where there is room, unless no step can be a matter of launches alone."""
        self._forget()
        why = next((why for layer in self.layers if (why := layer.opened().refusal())), "")
        self.cache.expect(self._room())
        with _noting_waits() as waits:
            said = self.model(**inputs)
        if not why and waits:
            why = self.broken = f"{type(self.model).__name__} waits for the device, in {waits[0]}"
        self.cache.decoding = f"eager: {why}" if why else ""
        return said

    def _room(self) -> int | None:
        """As many tokens again as are held, up to what the host says, if half of the memory that is free holds them.

        None where the host says nothing: the cache then finds room by itself.
        """
        if not self.length:
            return None
        held, device = self.cache.get_seq_length(), self.model.device
        room = min(self.length, held + max(held, LEAST))
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return room if self.cache.report().held * (room - held) / held < free / 2 else None

    def _fits(self, inputs: dict[str, Any]) -> bool:
        """Whether a graph was captured for inputs like these."""
        if inputs.keys() != self.given.keys():
            return False
        pairs = [(x, self.given[name]) for name, x in inputs.items()]
        return all(_alike(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)

    def _captured(self, inputs: dict[str, Any], where: list[DeviceTail | None]) -> Any:
        """Capturing launches nothing but counts the tokens; the replay that follows stores them."""
        self._forget()
        with torch.inference_mode(False):
            self.given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        graph, before = torch.cuda.CUDAGraph(), [state_of(layer) for layer in self.layers]
        here, aside = torch.cuda.current_stream(self.model.device), torch.cuda.Stream(self.model.device)
        try:  # the first context restores the stream where the second one fails to
            with torch.cuda.stream(here), torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                self.said = self.model(**self.given)
        except RuntimeError as error:
            self.cache.rollback()
            for layer, state in zip(self.layers, before, strict=True):
                restore_layer(layer, state)
            raise ModelError(
                f"{type(self.model).__name__} cannot be captured in a CUDA graph: {error}\n"
                "The cache is unchanged; generate with disable_compile=True."
            ) from error
        self.graph, self.where, self.cache.decoding = graph, where, "in a CUDA graph"
        graph.replay()
        return self.said


def _owned(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else tuple(map(_owned, x)) if isinstance(x, tuple) else x


@contextmanager
def _noting_waits() -> Iterator[list[str]]:
    """Where code that is not ours waits for the device, which a capture would not survive, and torch after it not well.

    Ours does when it makes room, and so only in a step that is not captured.
    """
    places, before = list[str](), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in said:
        text = str(one.message)
        if "called a synchronizing CUDA operation" in text:
            places += [] if one.filename.startswith(OURS) else [f"{one.filename}:{one.lineno}"]
        elif "Synchronization debug mode is a prototype" not in text:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _alike(x: Tensor, y: Any) -> bool:
    return isinstance(y, Tensor) and (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


class GraphedStep:
    """Reads one token of each sequence into a cache and returns the logits of the next. See `GraphedForward`."""

    def __init__(self, model: PreTrainedModel, cache: PackedCache) -> None:
        """Raises ModelError where it can never be a graph, InputError for a cache without tokens."""
        if why := refusal(model, cache):
            raise ModelError(f"This model cannot decode in a CUDA graph: {why}.")
        self.forward, self.cache = GraphedForward(model, cache), cache
        self._first = self.forward.layers[0]
        with torch.inference_mode(False):
            self.positions = torch.from_numpy(self._first.opened().lengths)[:, None].to(model.device)
        self._expected = cache.get_seq_length()  # slots of the cache after the last step

    def __call__(self, ids: Int[Tensor, "b"]) -> Float[Tensor, "b vocab"]:
        """Logits, in memory that the next call writes to again."""
        if self.cache.get_seq_length() != self._expected:
            self.positions.copy_(torch.from_numpy(self._first.opened().lengths)[:, None])
        inputs = {"input_ids": ids[:, None], "position_ids": self.positions, "past_key_values": self.cache}
        logits = self.forward.run({**inputs, "logits_to_keep": 1}).logits[:, -1]
        self.positions.add_(1)
        self._expected = self.cache.get_seq_length()
        return logits
