"""The transformers host. Tested with transformers 5.23."""

from tersekv.hf.attention import attached
from tersekv.hf.cache import PackedCache, cache

__all__ = ["PackedCache", "attached", "cache"]
