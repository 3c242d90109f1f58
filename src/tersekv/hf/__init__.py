"""The transformers host. Tested with transformers 5.23."""

from tersekv.hf.attention import attached
from tersekv.hf.cache import PackedCache, cache
from tersekv.hf.graph import GraphedStep

__all__ = ["GraphedStep", "PackedCache", "attached", "cache"]
