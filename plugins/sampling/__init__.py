"""Tokens from logits, on the GPU."""
