"""Mixture of SwiGLU experts: routing, expert matrices, weighted combination."""
