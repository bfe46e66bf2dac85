"""Ops that take quantized weights: codes, scales and zero points."""
