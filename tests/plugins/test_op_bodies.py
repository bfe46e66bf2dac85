"""Every op's body computes what the rank module's class does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from opmodels import run_op

from moecompiler.config import PRESETS, ModelConfig, NormalizationMode
from moecompiler.mapping import Mapping, RankShape, rank_shape
from moecompiler.model import Attention, RMSNorm, SparseMoeBlock
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, RMS_NORM


def small(**changes: object) -> ModelConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 2}
    return dataclasses.replace(PRESETS["8x7b"], **(sizes | {"head_dim": 8} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 17, 32)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = RMSNorm(32, 1e-5)
    module.weight.data = torch.randn(32).to(dtype)
    residual, branch = (10 * torch.randn(2, *shape)).to(dtype)
    (y,) = run_op(RMS_NORM, {"epsilon": 1e-5}, residual, module.weight.detach())
    z, x = run_op(ADD_RMS_NORM, {"epsilon": 1e-5}, residual, branch, module.weight.detach())
    bound = 1e-6 if dtype is torch.float32 else 2e-3
    with torch.no_grad():
        np.testing.assert_allclose(y, module(residual), rtol=bound, atol=bound)
        np.testing.assert_allclose(x, residual + branch, rtol=bound, atol=bound)
        np.testing.assert_allclose(z, module(torch.from_numpy(x)), rtol=bound, atol=bound)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 8), (4, 4, 6), (3, 1, 16)])
@pytest.mark.parametrize("first", [[[0], [0], [0]], [[3], [0], [12]]])
def test_attention(window: int | None, heads: int, kv_heads: int, head_dim: int, first: list[list[int]]) -> None:
    """Prefill and later tokens of a ragged batch, the last slot of the cache included."""
    torch.manual_seed(0)
    config = small(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, sliding_window=window)
    module = Attention(config, rank_shape(config, Mapping()), (0,))
    x = torch.randn(3, 4, 32)
    positions = torch.tensor(first) + torch.arange(4)
    angles = torch.randn(3, 1, 4, head_dim)
    cache = torch.randn(2, 3, kv_heads, 16, head_dim)
    with torch.no_grad():
        expected, (keys, values) = module(x, (angles.cos(), angles.sin()), positions, (cache[0], cache[1]))
        projected = [layer(x) for layer in (module.q_proj, module.k_proj, module.v_proj)]
        attributes = {"num_heads": heads, "num_kv_heads": kv_heads, "scale": head_dim**-0.5, "window": window or 0}
        inputs = (*projected, angles.cos(), angles.sin(), positions, cache[0], cache[1])
        output, present_key, present_value = run_op(ATTENTION, attributes, *inputs)
        np.testing.assert_allclose(module.o_proj(torch.from_numpy(output)), expected, atol=2e-6)
    np.testing.assert_array_equal(present_value, values)
    np.testing.assert_allclose(present_key, keys, atol=1e-6)


@pytest.mark.parametrize("mode", list(NormalizationMode))
@pytest.mark.parametrize(("experts", "top_k", "local"), [(8, 2, range(8)), (5, 1, (4,)), (5, 3, (0, 2, 3))])
@pytest.mark.parametrize("tokens", [1, 17])
def test_moe(mode: NormalizationMode, experts: int, top_k: int, local: tuple[int, ...], tokens: int) -> None:
    """All experts or some of them, in the three ways of routing; sometimes none of a token's experts is local."""
    torch.manual_seed(0)
    config = small(num_local_experts=experts, num_experts_per_tok=top_k)
    shape = RankShape(heads=8, kv_heads=2, experts=len(local), intermediate=24, vocab=1)
    block = SparseMoeBlock(config, shape, mode, (0,))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    block.experts.expert_ids = torch.tensor(list(local))
    x = torch.randn(tokens, 32)
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    with torch.no_grad():
        expected = block(x[None])[0]
    (y,) = run_op(
        moe_spec(mode, top_k),
        {"top_k": top_k, "normalization_mode": int(mode)},
        x,
        *(weight.detach() for weight in weights),
        block.experts.expert_ids,
    )
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_a_node_that_is_not_the_ops_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 2 inputs"):
        RMS_NORM.node("n", [], [], {"epsilon": 1e-5})
