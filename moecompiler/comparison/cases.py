"""What a node is tried on: what it was fed in a real run, and what is harder than that.

real        the run's prefill, of prompts of unequal lengths
large       activations ``LARGE`` times as large
one_expert  every token is routed to the same experts: a router's rows are what tokens lean to
ties        rows of the router are equal in groups of one more than are chosen; the first of equals is to be taken
zeros       activations of 0
denormals   activations of which the largest is the type's smallest normal number
cache_end   one token, in the last slot of a full cache
one_token   one token; attention reads what prefill left in the cache
ragged      ``RAGGED`` tokens; in attention one of each sequence, at positions of their own
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from moecompiler.comparison.capture import rounded
from moecompiler.comparison.ulps import FLOAT_TYPES
from moecompiler.validation.place import Arrays

CASES = ("real", "large", "one_expert", "ties", "zeros", "denormals", "cache_end", "one_token", "ragged")
LARGE = 32.0
RAGGED = 17  # no multiple of anything that kernels take together
_LEAD = 8.0  # in logits, of the experts that all tokens are sent to
_ACTIVATIONS = {"attention": ("query", "key", "value"), "moe": ("x",), "linear": ("x",)}
_NORM = ("x", "residual", "branch")


def cases_of(
    family: str | None,
    real: Arrays,
    dtype: str,
    *,
    lengths: np.ndarray,
    top_k: int = 0,
    local_experts: Iterable[int] = (),
    present: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Arrays]:
    """Inputs by case. ``real``: by the op's names, as ``capture`` gives them; ``dtype``: the op's own; ``lengths [batch]``:
    the tokens of each sequence that are no padding; ``local_experts``: those that the node has; ``present``: of attention,
    the caches after ``real``, ``present_key`` and ``present_value``."""
    names = [name for name in _ACTIVATIONS.get(family or "", _NORM) if name in real]
    scaled = {
        "large": LARGE,
        "zeros": 0.0,
        "denormals": _to_denormals([real[name] for name in names], dtype),
    }
    cases = {"real": real}
    for case, factor in scaled.items():
        cases[case] = real | {name: rounded(_wide(real[name]) * factor, dtype) for name in names}
    if family == "attention":
        if present is not None:
            cases |= _over_a_cache(real, present, lengths)
        return cases
    rows = {name: _rows(real[name]) for name in names}
    cases["one_token"] = real | {name: _shaped(_last(rows[name], int(lengths[0])), real[name]) for name in names}
    cases["ragged"] = real | {
        name: _shaped(np.resize(rows[name], (RAGGED, rows[name].shape[-1])), real[name]) for name in names
    }
    if family == "moe" and "router" in real:
        cases["one_expert"] = real | {"x": rounded(_sent_to(real["x"], real["router"], top_k, local_experts), dtype)}
        cases["ties"] = real | {"router": _equal_rows(real["router"], top_k + 1)}
    return {case: cases[case] for case in CASES if case in cases}


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])


def _last(rows: np.ndarray, length: int) -> np.ndarray:
    """The first sequence's last token; where there is one of each sequence, that is the first."""
    return rows[length - 1 : length] if len(rows) >= length else rows[:1]


def _shaped(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    """``[tokens, hidden]`` as ``like`` has its dims: tokens of one sequence, or sequences of one token as behind the choice of
    each one's last."""
    if like.ndim == 3 and like.shape[1] == 1:
        return rows[:, None]
    return rows.reshape((1,) * (like.ndim - 2) + rows.shape)


def _to_denormals(arrays: Iterable[np.ndarray], dtype: str) -> float:
    largest = max((float(np.abs(_wide(array)).max(initial=0.0)) for array in arrays), default=0.0)
    least = 2.0 ** FLOAT_TYPES[dtype].least_exponent
    return least / largest if largest else 0.0


def _sent_to(x: np.ndarray, router: np.ndarray, top_k: int, local: Iterable[int]) -> np.ndarray:
    """``x [tokens, hidden]`` with what makes the logits of ``top_k`` experts, local ones first, larger than all others', each
    by less than the one before, and changes no other: along the columns of the router's pseudo-inverse."""
    x, router = _wide(x), _wide(router)
    experts = len(router)
    chosen = list(dict.fromkeys((*local, *range(experts))))[:top_k]
    logits = x @ router.T
    wanted = logits.max(-1, keepdims=True) + _LEAD * np.arange(len(chosen), 0, -1)
    return x + (wanted - logits[:, chosen]) @ np.linalg.pinv(router)[:, chosen].T


def _equal_rows(router: np.ndarray, group: int) -> np.ndarray:
    return router[np.arange(len(router)) // group * group]


def _over_a_cache(real: Arrays, present: Mapping[str, np.ndarray], lengths: np.ndarray) -> dict[str, Arrays]:
    """One token of one sequence, of all sequences, and in the last slot."""
    slots = present["present_key"].shape[2]
    last = np.asarray(lengths, np.int64) - 1
    ragged = _one_token(real, present, last, last)
    cases = {"one_token": _first_row(ragged), "ragged": ragged}
    full = {name: _filled(array[:1], int(lengths[0])) for name, array in present.items()}
    cases["cache_end"] = _one_token(_first_row(real), full, last[:1], np.array([slots - 1]))
    return cases


def _one_token(real: Arrays, present: Mapping[str, np.ndarray], last: np.ndarray, slot: np.ndarray) -> Arrays:
    """The token at ``last`` of each sequence, written to ``slot`` over a cache that holds what is before it."""
    batch = np.arange(len(last))
    case = dict(real)
    for name in ("query", "key", "value"):
        case[name] = np.ascontiguousarray(real[name][batch, last][:, None])
    for name in ("cos", "sin"):
        case[name] = np.ascontiguousarray(real[name][batch, :, last][:, :, None])
    case["position_ids"] = slot[:, None].astype(real["position_ids"].dtype)
    for kind in ("key", "value"):
        cache = present[f"present_{kind}"]
        before = np.arange(cache.shape[2]) < slot[:, None]
        past = np.where(before[:, None, :, None], cache, 0)
        case[f"past_{kind}"] = np.ascontiguousarray(past.astype(real[f"past_{kind}"].dtype))
    return case


def _first_row(case: Arrays) -> Arrays:
    batch = len(case["position_ids"])
    return {name: array[:1] if len(array) == batch else array for name, array in case.items()}


def _filled(cache: np.ndarray, length: int) -> np.ndarray:
    """``[1, heads, slots, head_dim]`` whose first ``length`` slots are written: these again and again, to the end."""
    return cache[:, :, np.arange(cache.shape[2]) % length]
