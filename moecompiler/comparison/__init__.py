"""Is the plugin right? Two programs of one model and PyTorch in float32, compared op by op, layer by layer, and as a whole."""
