"""NCCL's C interface by ctypes: its functions with their types, and its errors in words.

Nothing of the environment is touched: what NCCL reads there (``NCCL_DEBUG``, ``NCCL_NVLS_ENABLE``, …) is the user's.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from moecompiler.errors import UserError

UNIQUE_ID_BYTES = 128
DTYPES = {"bytes": 0, "float16": 6, "float32": 7, "bfloat16": 9}  # ncclDataType_t
SUM = 0  # ncclRedOp_t
_LIBRARY = "libnccl.so.2"


class UniqueId(ctypes.Structure):
    """``ncclUniqueId``, which goes by value."""

    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)

    @staticmethod
    def of(data: bytes) -> UniqueId:
        return UniqueId.from_buffer_copy(data)


_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (ctypes.POINTER(_INT),),
    "ncclGetUniqueId": (ctypes.POINTER(UniqueId),),
    "ncclCommInitRank": (ctypes.POINTER(_POINTER), _INT, UniqueId, _INT),
    "ncclCommAbort": (_POINTER,),
    "ncclCommGetAsyncError": (_POINTER, ctypes.POINTER(_INT)),
    "ncclAllReduce": (_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER),
    "ncclAllGather": (_POINTER, _POINTER, _SIZE, _INT, _POINTER, _POINTER),
    "ncclSend": (_POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER),
    "ncclRecv": (_POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER),
}
_TEXTS: dict[str, tuple[Any, ...]] = {"ncclGetErrorString": (_INT,), "ncclGetLastError": (_POINTER,)}


def load_nccl() -> Any:
    """The library, with the types of its functions: that of the wheel ``nvidia-nccl``, which torch brings, else the loader's.

    Raises: UserError where there is none, or one without these functions.
    """
    wheel = _in_wheel()
    try:
        library = ctypes.CDLL(str(wheel or _LIBRARY))
        for name, types in (_SIGNATURES | _TEXTS).items():
            function = getattr(library, name)
            function.argtypes = types
            function.restype = ctypes.c_char_p if name in _TEXTS else ctypes.c_int
    except (OSError, AttributeError) as error:
        raise UserError(
            f"NCCL cannot be used ({error}): pip install nvidia-nccl-cu12 (or -cu13, as the driver's CUDA), or give"
            " --collectives ipc or host"
        ) from None
    return library


def nccl_version(library: Any) -> str:
    """``2.29.7``."""
    number = ctypes.c_int()
    call(library, "ncclGetVersion", ctypes.byref(number))
    return f"{number.value // 10_000}.{number.value // 100 % 100}.{number.value % 100}"


def call(library: Any, function: str, *arguments: Any) -> None:
    """Raises: UserError where NCCL says that it failed."""
    status = getattr(library, function)(*arguments)
    if status:
        raise UserError(explain(library, function, status))


def explain(library: Any, what: str, status: int) -> str:
    """NCCL's words for a result, and for its last error, in one line."""
    words = library.ncclGetErrorString(status).decode(errors="replace")
    last = (library.ncclGetLastError(None) or b"").decode(errors="replace")
    more = f": {' '.join(last.split())}" if last.strip() else ""
    return (
        f"NCCL failed in {what} ({words}){more}; NCCL_DEBUG=INFO in the environment makes it say more, --collectives ipc or host"
        " does without it"
    )


def _in_wheel() -> Path | None:
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # there is no ``nvidia`` at all
        return None
    folders = spec.submodule_search_locations if spec is not None else None
    found = [Path(folder) / "lib" / _LIBRARY for folder in folders or ()]
    return next((path for path in found if path.is_file()), None)
