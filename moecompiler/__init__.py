"""A graph compiler for Mixtral-style mixture-of-experts models."""

__version__ = "0.1.0"
