"""What Triton's interpreter (3.7) lacks, added in the process that interprets.

- bfloat16: it keeps one as the bits of an unsigned integer and then multiplies and adds these as integers; where it rounds to
  one, a carry out of the mantissa is lost; and it has no constants of the type. Here such arrays are of ml_dtypes' type, whose
  arithmetic numpy knows, rounded to the nearest even as on the GPU.
- Speed: it replaces the functions of ``triton.language`` again whenever a kernel calls a function, and looks whether sums of
  integers overflow, which a GPU does not.
- A look at where kernels read and write: on a GPU, what is beside a tensor is mostly memory as well, and nothing is said.
- On a GPU, overflow and undefined operations give infinity and NaN without a word.

``triton`` is imported with this module: only where ``TRITON_INTERPRET`` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def mend() -> None:
    """Changes the interpreter of this process."""
    np.seterr(all="ignore")
    _mend_bfloat16()
    _patch_once()
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _mend_bfloat16() -> None:
    known, builder = interpreter._get_np_dtype, interpreter.InterpreterBuilder
    load, cast, convert = interpreter._interpreter.load, builder.cast_impl, builder.create_fp_to_fp

    dtypes: dict[str, np.dtype] = {"bf16": _BFLOAT16}

    def numpy_dtype(kind: Any) -> np.dtype:
        """Known by names: looking them up takes the interpreter longer than adding."""
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(element, tl.pointer_type):
            return known(element)
        if element.name not in dtypes:
            dtypes[element.name] = known(element)
        return dtypes[element.name]

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *how: Any, **more: Any) -> Any:
        _check_inside(self, "reads", ptrs, mask)
        kind = ptrs.get_element_ty()
        dtype = numpy_dtype(kind)
        bits = np.dtype(np.uint16) if dtype == _BFLOAT16 else dtype
        rest = np.zeros(ptrs.data.shape, bits) if other is None else other.data.astype(dtype, copy=False).view(bits)
        return interpreter.TensorHandle(load(ptrs.data, mask.data, rest, bits).view(dtype), kind)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *how: Any, **more: Any) -> Any:
        _check_inside(self, "writes", ptrs, mask)
        data = value.data.view(np.uint16) if value.data.dtype == _BFLOAT16 else value.data
        return interpreter._interpreter.store(ptrs.data, data, mask.data)

    def between(other: Callable[..., Any]) -> Callable[..., Any]:
        def impl(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
            kinds = source.dtype.scalar, target.scalar
            if tl.bfloat16 not in kinds or any(each.primitive_bitwidth < 16 and each.is_floating() for each in kinds):
                return other(self, source, target, *rounding)
            return interpreter.TensorHandle(source.data.astype(numpy_dtype(target)), target.scalar)

        return impl

    def constant(self: Any, value: float) -> Any:
        return interpreter.TensorHandle(np.array([value], _BFLOAT16), tl.bfloat16)

    interpreter._get_np_dtype, builder.get_bf16 = numpy_dtype, constant
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.cast_impl, builder.create_fp_to_fp = between(cast), between(convert)


@contextmanager
def only_within(memory: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Kernels that are run meanwhile must keep to these pieces of memory: address and bytes of each.

    Raises: IndexError, within the interpreter's own error, where one does not.
    """
    builder = interpreter.interpreter_builder
    builder.memory = [(address, address + nbytes) for address, nbytes in memory]
    try:
        yield
    finally:
        builder.memory = None


def _check_inside(builder: Any, does: str, ptrs: Any, mask: Any) -> None:
    pieces = getattr(builder, "memory", None)
    if pieces is None:
        return
    used = ptrs.data[np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)]
    if used.size:
        first, last = int(used.min()), int(used.max()) + max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        if not any(begin <= first and last <= end for begin, end in pieces):
            begin, end = min(pieces, key=lambda piece: abs(piece[0] - first))
            raise IndexError(
                f"a kernel {does} beside its tensors: {last - first} bytes from {first - begin} on of one of {end - begin}"
            )


def _patch_once() -> None:
    """This process runs nothing but interpreted kernels, so what is patched stays so."""
    patch, patched = interpreter._patch_lang, set[int]()

    class Kept:
        def restore(self) -> None:
            """Nothing."""

    kept = Kept()

    def patch_language(function: Any) -> Kept:
        if id(function) not in patched:
            patch(function)
            patched.add(id(function))
        return kept

    interpreter._patch_lang = patch_language
