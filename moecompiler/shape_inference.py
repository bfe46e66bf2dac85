"""Shapes of a graph's tensors, with sizes that are not known given as expressions (``2*batch*sequence``)."""

from __future__ import annotations

import logging

import onnx

_LARGEST_SIZE = 2**31 - 1  # what a Slice may name as "to the end"


def infer_symbolic_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the shapes noted in it.

    onnx's own inference loses track where a shape is computed: torch's tracing exporter writes ``x.view(b, s, -1, 8)`` as five
    nodes that read ``Shape(x)``, and heads would then have no number. ONNX Runtime's follows such arithmetic. Where it cannot
    (an op it does not know), onnx's inference is what there is.
    """
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    plain = onnx.shape_inference.infer_shapes(model, data_prop=True)
    if model.functions:  # ONNX Runtime's does not look into them and would put unknown sizes in place of those noted
        return plain
    # sizes that must be equal for the graph to run are merged, which it reports as a warning
    logger = logging.getLogger("onnxruntime.tools.symbolic_shape_infer")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # what its infer_shapes does, which would also write a file into the current directory where it fails
        inference = SymbolicShapeInference(_LARGEST_SIZE, auto_merge=True, guess_output_rank=False, verbose=0)
        inference._preprocess(plain)
        complete = False
        while inference.run_:
            complete = inference._infer_impl()
    except Exception:  # it asserts, and raises what it meets
        return plain
    finally:
        logger.setLevel(level)
    if not complete:
        return plain
    result: onnx.ModelProto = inference.out_mp_
    return result
