"""What a model needs of memory and time on given GPUs, from its sizes alone: see docs/scaling.md. Imports no torch."""
