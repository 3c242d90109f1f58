"""Specs parse and print as inverses, and errors say what to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersekv import SpecError, parse
from tersekv.codecs.intn import IntN
from tersekv.codecs.lloydmax import LloydMax
from tersekv.codecs.none import NoneCodec
from tersekv.codecs.rotated import Rotated
from tersekv.policy.streaming import Streaming
from tersekv.policy.window import Window
from tersekv.registry import PRESETS
from tersekv.spec import Spec

ANY_CODEC = st.one_of(
    st.builds(NoneCodec, st.sampled_from(["bf16", "fp16", "fp32"])),
    st.builds(
        IntN, st.integers(2, 8), st.sampled_from(["token", "channel"]), st.sampled_from([0, 16, 32]), st.booleans()
    ),
    st.builds(LloydMax, st.integers(1, 8), st.sampled_from(["fp16", "fp32"])),
    st.builds(
        Rotated,
        st.integers(1, 8),
        st.sampled_from(["block", "none"]),
        st.sampled_from(["unbiased", "norm"]),
        st.sampled_from(["log8", "fp16"]),
        st.integers(0, 9),
    ),
)
ANY_SPEC = st.builds(
    Spec,
    ANY_CODEC,
    ANY_CODEC,
    st.one_of(
        st.builds(Window, st.integers(0, 99), st.integers(0, 999)),
        st.builds(Streaming, st.integers(0, 99), st.integers(0, 999), st.integers(999, 9999)),
    ),
    st.sampled_from(["exact", "packed"]),
)
LAYERS = st.lists(st.tuples(st.integers(2, 8), st.integers(2, 8)), max_size=6).map(tuple)

TERSE4 = "k=rotated:bits=4,scale_kind=int8 v=rotated:bits=4"


@given(ANY_SPEC)
def test_parse_is_the_inverse_of_print(spec: Spec) -> None:
    assert parse(str(spec)) == spec
    assert str(parse(str(spec))) == str(spec)


@given(LAYERS)
def test_bits_by_layer_print_and_parse(layers: tuple[tuple[int, int], ...]) -> None:
    spec = Spec(Rotated(mean="block"), IntN(3), layers=layers)
    assert parse(str(spec)) == spec
    for index, (k, v) in enumerate(layers):
        assert spec.at(index) == Spec(Rotated(k, mean="block"), IntN(v))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("rotated:bits=3", "rotated:bits=3"),
        ("k=rotated:bits=3 v=rotated:bits=3", "rotated:bits=3"),
        ("k=rotated:bits=3,mean=block v=rotated:bits=3,mean=none", "rotated:bits=3"),
        ("rotated:bits=3,mean=none", "k=rotated:bits=3,mean=none v=rotated:bits=3"),
        ("terse4 recent=128", f"{TERSE4} policy=queryaware recent=128"),
        ("terse4 v=none sink=4", "k=rotated:bits=4,scale_kind=int8 v=none policy=queryaware"),
        ("terse4 policy=streaming keep=512", f"{TERSE4} policy=streaming keep=512"),
        ("keep=99 policy=snapkv kivi observe=8", "kivi:bits=2 policy=snapkv keep=99 observe=8"),
        ("terse4 policy=window sink=2", f"{TERSE4} sink=2"),
        ("terse4 layers=4/3,4/3,2/2*2,2/2", f"{TERSE4} policy=queryaware layers=4/3*2,2/2*3"),
        ("terse4 prefill=packed layers=4/3", f"{TERSE4} policy=queryaware layers=4/3 prefill=packed"),
        ("intn:symmetric=yes prefill=packed", "intn:bits=4,symmetric=yes prefill=packed"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse(name: str) -> None:
    assert parse(name).k.layout(128).bits_per_value < 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("kivvi", 'Unknown codec or preset "kivvi"'),
        ("rotatd:bits=3", 'Did you mean "rotated"'),
        ("terse5", "Did you mean"),
        ("rotated:bit=3", 'no option "bit". Did you mean "bits"'),
        ("rotated:bits=9", "bits=9 is out of range. Allowed: 1 to 8"),
        ("intn:bits=1", "Allowed: 2 to 8"),
        ("rotated:bits=three", "a whole number is needed"),
        ("rotated:bits=", "a whole number is needed"),
        ("intn:symmetric=maybe", "yes or no is needed"),
        ("intn:axis=tokens", 'Did you mean "token"'),
        ("intn:axis=channel,group=48", "group=48 does not divide a block"),
        ("k=terse4", 'Unknown codec or preset "terse4"'),
        ("k=rotated:bits=4", "names no codec for v"),
        ("terse4 resent=3", 'Unknown setting "resent". Did you mean "recent"'),
        ("terse4 sink=-1", "sink=-1 is negative"),
        ("terse4 terse2", "It is a preset, which stands alone and first"),
        ("lloydmax rotated", "says k twice"),
        ("terse4 sink=1 sink=2", "says sink twice"),
        ("rotated:bits=3,bits=4", "says bits twice"),
        ("rotated:bits=--3", "a whole number is needed"),
        ("rotated:bits=²", "a whole number is needed"),
        ("terse4 prefill=fast", "prefill=fast is unknown"),
        ("terse4 policy=streeming", 'Unknown policy "streeming". Did you mean "streaming"'),
        ("terse4 policy=snapkv policy=window", "says policy twice"),
        ("terse4 keep=512", 'Unknown setting "keep"'),
        ("terse4 policy=streaming keep=10", "keep=10 is less than recent=64"),
        ("terse4 policy=snapkv keep=10", "keep=10 must hold sink=4 and observe=32"),
        ("terse4 policy=snapkv pool=4", "pool=4 must be an odd number"),
        ("terse4 layers=4/3*2,3", 'layers="4/3*2,3": "3" is no layer. Give bits of keys/values'),
        ("terse4 layers=9/3*2", "bits=9 is out of range"),
        ("none layers=4/3", "NoneCodec has no option bits"),
        ("terse4 policy=snapkv prefill=packed", "policy=snapkv does not take prefill=packed. Allowed: exact."),
    ],
)
def test_bad_specs_say_what_to_do(text: str, said: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(text)
    assert said in str(error.value)
