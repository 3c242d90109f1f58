"""Fitting what a cache needs to a model: controllers that route tokens, bits for each layer. `tersekv calibrate`."""
