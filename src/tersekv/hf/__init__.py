"""The transformers host. Tested with transformers 5.23."""

from tersekv.hf.attach import attached
from tersekv.hf.cache import PackedCache
from tersekv.hf.graph import GraphedStep
from tersekv.hf.make import cache

__all__ = ["GraphedStep", "PackedCache", "attached", "cache"]
