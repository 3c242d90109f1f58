"""Whether decoding steps of a layer on a GPU are a matter of launches alone, and the memory in which they are."""

from torch import Tensor

from tersekv import ops
from tersekv.asking_tail import AskingTail
from tersekv.device_tail import DeviceTail
from tersekv.policy.base import Policy
from tersekv.policy.window import Window
from tersekv.tiers import Tiers

SHARE, LEAST = 8, 8  # blocks of room where nobody asked for any: an eighth of those held, and at least eight


def refusal(tiers: Tiers, policy: Policy) -> str:
    """Why steps behind these tiers are more than launches; empty if they are not."""
    packed = tiers.packed.get("packed")
    if not isinstance(policy, Window) or not policy.decodes_as_window or packed is None:
        return "the policy does more with new tokens than to pack them in the order in which they came"
    if not (packed.k.folds_by_rotation and packed.v.folds_by_rotation) or packed.block != ops.BLOCK:
        return f"a codec's domain is more than a rotation away, or its blocks are not of {ops.BLOCK} tokens"
    if (tiers.seen < policy.sink).any():
        return "the first tokens of a sequence are still to come"
    if not ops.pages_step(packed.pages):
        return f"a step's kernels do not read its pages, as {ops.implementation_of(packed.pages)} does"
    return ""


def tail_behind(tiers: Tiers, policy: Policy, room: int | None, q: Tensor) -> DeviceTail | None:
    """A tail for queries such as `q`, or None where the kernels cannot do their steps. `room`: tokens in all."""
    packed = tiers.packed.get("packed")
    if refusal(tiers, policy) or not isinstance(policy, Window) or packed is None:
        return None
    if not ops.queries_step(q) or q.dtype != packed.dtype:
        return None
    blocks = max(LEAST, packed.table.shape[2] // SHARE)
    wanted = 0 if room is None else room - int(tiers.seen.min())
    more = wanted if wanted > 0 else blocks * packed.block
    kind = AskingTail if policy.asking(tiers) else DeviceTail
    return kind(tiers, policy, more, q.shape[2], q.shape[1] // packed.table.shape[1])
