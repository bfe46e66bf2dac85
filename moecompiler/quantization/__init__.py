"""Quantized weights: formats, scales, packing, recipes, and checkpoints that others have quantized. Arithmetic only: no graph,
no torch."""
