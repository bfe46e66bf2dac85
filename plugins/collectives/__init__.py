"""What ranks of one node exchange from GPU to GPU: all-reduce, all-gather, and all-reduce with the norm that follows."""
