"""What nodes are tried on: what each case says of its inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moecompiler.comparison.cases import CASES, LARGE, RAGGED, cases_of
from moecompiler.config import NormalizationMode
from moecompiler.routing import route

LENGTHS = np.array([5, 3])
rng = np.random.default_rng(0)


def moe() -> dict[str, np.ndarray]:
    x, router = rng.standard_normal((10, 32)), rng.standard_normal((8, 32))
    return {"x": x.astype(np.float16), "router": router.astype(np.float16)}


def chosen(case: dict[str, np.ndarray]) -> np.ndarray:
    logits = torch.from_numpy(case["x"].astype(np.float32) @ case["router"].astype(np.float32).T)
    return route(logits, 2, NormalizationMode.RENORMALIZE)[1].numpy()


def test_moe() -> None:
    real = moe()
    cases = cases_of("moe", real, "float16", lengths=LENGTHS, top_k=2, local_experts=(4, 5, 6, 7))
    assert list(cases) == [case for case in CASES if case != "cache_end"]
    np.testing.assert_array_equal(cases["large"]["x"], (LARGE * real["x"].astype(np.float64)).astype(np.float16))
    assert not cases["zeros"]["x"].any()
    assert np.abs(cases["denormals"]["x"]).max() == pytest.approx(2.0**-14)
    np.testing.assert_array_equal(cases["one_token"]["x"], real["x"][4:5])
    assert cases["ragged"]["x"].shape == (RAGGED, 32)
    np.testing.assert_array_equal(cases["ragged"]["x"][10:], real["x"][:7])
    assert chosen(cases["one_expert"]).tolist() == [[4, 5]] * 10
    assert len({tuple(row) for row in chosen(cases["real"]).tolist()}) > 3
    assert all(each["x"].dtype == np.float16 for each in cases.values())


def test_ties_are_between_what_is_chosen_and_what_is_not() -> None:
    tied = cases_of("moe", moe(), "float16", lengths=LENGTHS, top_k=2)["ties"]
    logits = np.sort(tied["x"].astype(np.float64) @ tied["router"].astype(np.float64).T, axis=-1)[:, ::-1]
    # the second and the third are the same, but where the last group, of two, is ahead
    assert (logits[:, 1] == logits[:, 2]).mean() > 0.5
    assert (np.diff(tied["router"][:3], axis=0) == 0).all()


@pytest.mark.parametrize("family", ["linear", None])
def test_leading_dimensions_stay(family: str | None) -> None:
    real = {
        name: rng.standard_normal((2, 5, 8)).astype(np.float16)
        for name in (("x",) if family else ("residual", "branch"))
    }
    cases = cases_of(family, real, "float16", lengths=LENGTHS)
    for name in real:
        assert cases["one_token"][name].shape == (1, 1, 8)
        assert cases["ragged"][name].shape == (1, RAGGED, 8)
        np.testing.assert_array_equal(cases["one_token"][name][0, 0], real[name][0, 4])


def test_bfloat16_is_rounded_float32() -> None:
    real = {"x": np.ones((1, 2, 4), np.float32)}
    case = cases_of(None, real, "bfloat16", lengths=LENGTHS)["denormals"]["x"]
    assert case.dtype == np.float32
    assert (case == 2.0**-126).all()


def test_attention_over_a_cache() -> None:
    batch, sequence, slots = 2, 5, 9
    real = {name: rng.standard_normal((batch, sequence, 8)) for name in ("query", "key", "value")}
    real |= {name: rng.standard_normal((batch, 1, sequence, 4)) for name in ("cos", "sin")}
    real |= {"position_ids": np.tile(np.arange(sequence), (batch, 1))}
    real |= {f"past_{kind}": np.zeros((batch, 2, slots, 4)) for kind in ("key", "value")}
    present = {f"present_{kind}": rng.standard_normal((batch, 2, slots, 4)) for kind in ("key", "value")}
    cases = cases_of("attention", real, "float32", lengths=LENGTHS, present=present)
    one, ragged, end = (cases[name] for name in ("one_token", "ragged", "cache_end"))
    assert (one["position_ids"].tolist(), ragged["position_ids"].tolist(), end["position_ids"].tolist()) == (
        [[4]], [[4], [2]], [[8]]
    )  # fmt: skip
    np.testing.assert_array_equal(ragged["query"][1, 0], real["query"][1, 2])
    np.testing.assert_array_equal(ragged["cos"][1, 0, 0], real["cos"][1, 0, 2])
    np.testing.assert_array_equal(ragged["past_key"][1, :, :2], present["present_key"][1, :, :2])
    assert not ragged["past_key"][1, :, 2:].any()
    # what is in the cache up to its end are the prompt's, again and again
    np.testing.assert_array_equal(end["past_value"][0, :, 5:8], present["present_value"][0, :, :3])
    assert end["past_value"][0, :, 7].any()
    assert not end["past_value"][0, :, 8].any()
    assert not cases["zeros"]["query"].any()
    assert cases["zeros"]["cos"].any()


def test_one_token_of_each_sequence() -> None:
    """Behind the choice of each sequence's last token, tokens are sequences: so are the cases'."""
    x = np.arange(len(LENGTHS) * 8, dtype=np.float32).reshape(len(LENGTHS), 1, 8)
    cases = cases_of(None, {"x": x, "weight": np.ones(8, np.float32)}, "float32", lengths=LENGTHS)
    assert cases["one_token"]["x"].shape == (1, 1, 8)
    assert cases["ragged"]["x"].shape == (RAGGED, 1, 8)
    assert cases["ragged"]["x"][len(LENGTHS)].tolist() == x[0].tolist() == cases["one_token"]["x"][0].tolist()
