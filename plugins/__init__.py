"""Fused ops: one folder each, with spec, kernels and plugin."""
