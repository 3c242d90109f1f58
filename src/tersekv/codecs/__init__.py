"""One method, one file. The registry is `tersekv.spec.CODECS`."""
