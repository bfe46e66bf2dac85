"""RMS normalization, alone and with the residual addition before it."""
