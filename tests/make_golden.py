"""Writes tests/golden.json: `python tests/make_golden.py`. Only for a new codec or a new format version."""

import hashlib
import json

from test_conformance import CONFIGURATIONS, GOLDEN, golden_input

from tersekv.spec import parse_codec, print_codec

digests = {}
for text in CONFIGURATIONS:
    codec = parse_codec(text, "k")
    for d in (64, 80, 128):
        data = codec.encode(golden_input(d)).data
        digests[f"{print_codec(codec, 'k')} d={d}"] = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
GOLDEN.write_text(json.dumps(digests, indent=1) + "\n")
