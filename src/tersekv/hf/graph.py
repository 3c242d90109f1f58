"""A decoding step of a whole model as one CUDA graph."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tersekv.errors import InputError, ModelError
from tersekv.hf.attention import is_ours
from tersekv.hf.cache import PackedCache
from tersekv.hf.layer import PackedLayer


class GraphedStep:
    """Reads one token of each sequence into a cache and returns the logits of the next.

    A step that cannot be a replay runs as usual, and the one after it is captured anew: the first one, and the first
    one after the cache's room is used up or the cache was changed otherwise.
    """

    def __init__(self, model: PreTrainedModel, cache: PackedCache) -> None:
        """Raises ModelError for a model with layers that are not packed, InputError for a cache without tokens."""
        layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
        if len(layers) < len(cache.layers) or model.device.type != "cuda":
            raise ModelError("Only a model on a CUDA device, all of whose layers are packed, decodes in a graph.")
        if not is_ours(model.config._attn_implementation) or layers[0].store is None:
            raise InputError("Run the prompt with this cache first, and stay inside `with tersekv.attached(model):`.")
        b = len(layers[0].store.lengths)
        self.model, self.layers, self.cache = model, layers, cache
        self.ids, self.positions = torch.zeros(2, b, 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self._stores: list[object] = []  # what each layer held its tokens in when the graph was captured
        self._expected = -1  # slots of the cache after the last step

    @torch.inference_mode()
    def __call__(self, ids: Int[Tensor, "b"]) -> Float[Tensor, "b vocab"]:
        """Logits, in memory that the next call writes to again."""
        self.ids.copy_(ids[:, None])
        if self.cache.get_seq_length() != self._expected:
            self.positions.copy_(torch.from_numpy(self.layers[0].opened().lengths)[:, None])
        if not all(layer.ready(1) for layer in self.layers):
            self.graph, self.logits, self._stores = None, None, []
            logits = self._forward()
        elif self.graph is not None and self._stores == self._tails():
            self.graph.replay()
            logits = self.logits
            for layer in self.layers:
                layer.replayed(1)
        else:
            logits = self._captured()
        self._expected = self.cache.get_seq_length()
        assert logits is not None  # for the type checker
        return logits

    def _tails(self) -> list[object]:
        return [layer.opened().state[1] for layer in self.layers]

    def _captured(self) -> Tensor:
        """Capturing launches nothing but counts the tokens; the replay that follows stores them."""
        self.graph, self._stores = torch.cuda.CUDAGraph(), self._tails()
        with torch.cuda.graph(self.graph):
            self.logits = self._forward()
        self.graph.replay()
        return self.logits

    def _forward(self) -> Tensor:
        said = self.model(
            input_ids=self.ids, position_ids=self.positions, past_key_values=self.cache, logits_to_keep=1
        ).logits[:, -1]
        self.positions.add_(1)
        return said
