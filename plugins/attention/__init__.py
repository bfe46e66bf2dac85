"""Grouped-query attention with rotary embedding over a KV cache of fixed length."""
