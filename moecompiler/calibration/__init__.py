"""What activations are like: run a text through a checkpoint and note how large the inputs of its matrix products get.

``statistics`` are collected by ``layers`` in a stream over the model (``streaming``), kept as a ``result`` in ``files``, or taken
from what other tools published (``foreign``). ``text`` and ``samples`` are what is run.
"""
