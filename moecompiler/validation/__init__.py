"""Is what runs still the model? Engines against PyTorch, rank by rank, recombined, and layer by layer."""
