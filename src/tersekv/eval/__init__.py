"""Measuring quality: what a packed cache changes in what the model says."""
