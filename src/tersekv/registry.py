"""The names that a spec may use: codecs, policies, presets. One line each; nothing is imported before it is named."""

# One line a method. Other packages add theirs through the entry-point group "tersekv.codecs".
CODECS = {
    "none": "tersekv.codecs.none:NoneCodec",
    "direction": "tersekv.codecs.direction:Direction",
    "intn": "tersekv.codecs.intn:IntN",
    "kivi": "tersekv.codecs.kivi:Kivi",
    "klt": "tersekv.codecs.klt:KLT",
    "kvquant": "tersekv.codecs.kvquant:KVQuant",
    "lloydmax": "tersekv.codecs.lloydmax:LloydMax",
    "outliers": "tersekv.codecs.outliers:Outliers",
    "polar": "tersekv.codecs.polar:Polar",
    "qjl": "tersekv.codecs.qjl:QJL",
    "rotated": "tersekv.codecs.rotated:Rotated",
    "trellis": "tersekv.codecs.trellis:TrellisCodec",
    "turboquant": "tersekv.codecs.turboquant:TurboQuant",
    "twoaxis": "tersekv.codecs.twoaxis:TwoAxis",
    "vq": "tersekv.codecs.vq:VQ",
}

POLICIES = {
    "window": "tersekv.policy.window:Window",
    "streaming": "tersekv.policy.streaming:Streaming",
    "snapkv": "tersekv.policy.snapkv:SnapKV",
    "hotcold": "tersekv.policy.hotcold:HotCold",
    "adaptive": "tersekv.policy.adaptive:Adaptive",
    "anchors": "tersekv.policy.anchors:Anchors",
    "queryaware": "tersekv.policy.queryaware:QueryAware",
    "wholesequence": "tersekv.policy.wholesequence:WholeSequence",  # for evaluation only
}

PRESETS = {  # chosen by measurement: docs/presets.md
    "terse8": "rotated:bits=8,scale_kind=fp16",
    "terse4": "k=rotated:bits=4,scale_kind=int8 v=rotated:bits=4 policy=queryaware",
    "terse3": "k=rotated:bits=3,scale_kind=int8 v=rotated:bits=3 policy=queryaware",
    "terse2": "k=rotated:bits=2 v=trellis:bits=2 policy=queryaware",
    "terse1": "k=rotated:bits=2 v=trellis:bits=1 policy=queryaware",
}
