"""``passes explain`` on compiled models: which rank is looked at, and what it says where there is nothing of that name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import Here

Engines = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("passes")


def test_a_module_of_a_later_stage(engines: Engines, here: Here) -> None:
    """It is looked for on the first rank of each pipeline stage."""
    output = here("passes", "explain", engines("tp2-pp2"), "model.layers.3.input_layernorm", "--pipeline", "plugins")
    assert (output.status, output.err) == (0, "")
    lines = output.out.splitlines()
    assert lines[0] == "rank 2, module model.layers.3.input_layernorm"
    assert any(line.startswith("06-fuse-rms-norm: 1 rewrite, nodes: 7 removed") for line in lines)
    assert any(line.startswith("        now there: RMSNorm_") for line in lines)


def test_a_node_between_passes(engines: Engines, here: Here) -> None:
    """One that a pass makes, and another takes apart again."""

    def explained(subject: str) -> dict[str, Any]:
        output = here("passes", "explain", engines("one"), subject, "--pipeline", "plugins,restore", "--json")
        assert (output.status, output.err) == (0, "")
        return json.loads(output.out)

    of_module = {each["name"]: each for each in explained("model.layers.1.mlp.experts")["passes"]}
    (made,) = of_module["fuse-moe"]["rewrites"]
    (node,) = made["made"]
    data = explained(node)
    assert (data["rank"], data["is_module"]) == (0, False)
    verdicts = {each["name"]: each for each in data["passes"]}
    assert verdicts["fuse-moe"]["rewrites"][0]["number"] == made["number"]
    (restored,) = verdicts["restore"]["rewrites"]
    assert restored["number"] > made["number"]
    assert restored["removed"] == [node]
    assert {"MatMul", "TopK"} <= {each["op"] for each in data["left"]}


def test_what_there_is_not(engines: Engines, here: Here) -> None:
    one = engines("one")
    for arguments, said in (
        ((one, "model.layers.1.mlps"), "model.layers.1.mlps: is no node or module of any graph"),
        ((one, "lm_head", "--rank", 1), "--rank 1: the world has ranks 0 to 0"),
        ((one / "optimize", "lm_head"), "holds no export, which passes are run on"),
        ((one, "lm_head", "--only_pass", "fuse-moe"), "--only_pass fuse-moe: is not in pipeline ootb"),
    ):
        output = here("passes", "explain", *arguments)
        assert (output.status, output.out) == (2, "")
        (line,) = output.complaints
        assert said in line
