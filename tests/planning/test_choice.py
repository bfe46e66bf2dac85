"""Which mapping is recommended, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecompiler.config import PRESETS
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.planning.choice import choose, mappings_of, reasons
from moecompiler.planning.hardware import Cluster, gpu_named, parse_bytes
from moecompiler.planning.load import Load

H100 = gpu_named("h100")
BIG = PRESETS["8x22b"]


def test_all_splits_are_looked_at_once() -> None:
    found = mappings_of(4)
    assert len(set(found)) == len(found) == 1 + 2 + 3  # tp1, tp2 with 1 or 2 ep, tp4 with 1, 2 or 4
    assert all(each.world_size == 4 and each.tp_size == each.moe_tp_size * each.moe_ep_size for each in found)


def test_a_node_for_8x22b() -> None:
    choice = choose(BIG, Load(batch=1), Cluster(H100, 8))
    assert choice.best is not None
    assert choice.best.mapping == Mapping.create(8)
    assert choice.least == 4
    fits = [plan.fits for plan in choice.plans]
    assert fits == sorted(fits, reverse=True)
    assert "copies" in reasons(choice, Cluster(H100, 8))[-1]


def test_a_slow_network_keeps_exchanges_within_nodes() -> None:
    fast = Cluster(H100, 16)
    crossing = choose(BIG, Load(), fast)
    assert crossing.best is not None
    assert crossing.best.mapping.tp_size == 16
    limit = next(line for line in reasons(crossing, fast) if "answers sooner" in line)
    microseconds = float(limit.partition("from about ")[2].split()[0])
    for latency, tp in ((microseconds - 3, 16), (microseconds + 3, 8)):
        best = choose(BIG, Load(), replace(fast, network_latency=1e-6 * latency)).best
        assert best is not None
        assert best.mapping.tp_size == tp


def test_what_does_not_fit_says_what_to_do() -> None:
    two = Cluster(H100, 2)
    choice = choose(BIG, Load(), two)
    assert (choice.best, choice.least) == (None, None)
    (said,) = reasons(choice, two)
    assert said.startswith("nothing fits: the smallest, tp2, needs 144.")
    assert "take more GPUs" in said


def test_a_number_that_does_not_divide() -> None:
    seven = Cluster(H100, 7)
    choice = choose(BIG, Load(), seven)
    assert [str(plan.mapping) for plan in choice.plans] == ["pp7"]
    assert any("48 attention heads do not divide over 7" in line for line in choice.refused)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("79.6 GiB", 79.6 * 2**30), ("24", 24e9), ("1.5tb", 1.5e12)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text, "--gpu_memory") == size


@pytest.mark.parametrize("text", ["", "80 apples", "-3GB", "0GB", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"--gpu_memory .*: give a size as in 80GB"):
        parse_bytes(text, "--gpu_memory")
