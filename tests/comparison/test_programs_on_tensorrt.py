"""Programs as TensorRT engines of their own, on fakes of TensorRT and a GPU: what is built, bound, run and given back."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_gpu import FakeDriver, FakeEngine, fake_tensorrt

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_program import prepare
from moecompiler.comparison.observed import tensors_of, watched_places, with_outputs
from moecompiler.comparison.runners import BodiesOnOnnxRuntime, infer
from moecompiler.config import ExportOptions
from moecompiler.graph import Program
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.runtime import device

if TYPE_CHECKING:
    from programs import Programs, Subject

MODULE = "moecompiler.tools.comparison.tensorrt"
_FAKED = (MODULE, "moecompiler.backends.tensorrt_build", "moecompiler.backends.tensorrt_engine")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The module on fakes; ``built``: arguments of builds, of which each file is run by ONNX Runtime."""
    driver, engines, built = FakeDriver(), list[FakeEngine](), list[Any]()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(driver, engines))
    monkeypatch.setattr(device, "driver", lambda: driver)
    for name in _FAKED:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module: Any = importlib.import_module(MODULE)
    monkeypatch.setattr(module, "Device", lambda: SimpleNamespace(info=lambda: SimpleNamespace(sm=90)))

    def build(path: Path, profiles: Any, nodes: Any, timings: Any, in_place: bool, progress: Any) -> Any:
        built.append((path, profiles, nodes, in_place))
        return SimpleNamespace(data=str(path).encode())

    monkeypatch.setattr(module, "build_plan", build)
    yield SimpleNamespace(module=module, driver=driver, engines=engines, built=built)
    for name in _FAKED:
        sys.modules.pop(name, None)


def feeds_of(program: Program, batch: int, sequence: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(0, 1536, (batch, sequence)),
        "position_ids": np.tile(np.arange(sequence), (batch, 1)),
        "last_token_ids": np.full(batch, sequence - 1),
    }
    caches = [value for value in program.model.graph.input if value.name.startswith("past_key_values.")]
    for value in caches:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.standard_normal((batch, *sizes[1:])).astype(np.float16)
    return feeds


def test_a_graph_with_more_outputs(
    faked: SimpleNamespace, programs: Programs, shipped: Subject, tmp_path: Path
) -> None:
    """Prefill and decode, each with a profile and a context of its own; the engine's types are float16."""
    from programs import GRID, MAX_SEQ_LEN

    options = ExportOptions("float16", max_seq_len=MAX_SEQ_LEN)
    plain = programs.optimized(shipped.config, GRID["one-rank"], 0, options)
    program = with_outputs(plain, tensors_of(watched_places(plain), ()))
    feeds = [feeds_of(program, 2, 5), feeds_of(program, 2, 1)]
    opener = faked.module.TensorRTPrograms(shipped.reader, parse_plugins("off"), tmp_path / "programs")
    with opener(program, [*feeds, feeds[0]]) as runner, BodiesOnOnnxRuntime(shipped.reader, 1)(program, ()) as body:
        for each in (*feeds, feeds[0]):
            got, expected = infer(runner, each), infer(body, each)
            assert got.keys() == expected.keys()
            for name in expected:
                np.testing.assert_allclose(got[name].astype(np.float32), expected[name], atol=0.1, rtol=0.05)
        assert runner.last_inference_time() > 0
        (engine,) = faked.engines
        assert [context.profile for context in engine.contexts] == [0, 1]
    ((path, profiles, _, in_place),) = faked.built
    assert not in_place
    assert [each["input_ids"] for each in profiles] == [((1, 1), (2, 5), (4, 10)), ((1, 1), (2, 1), (4, 2))]
    shape = feeds[0]["past_key_values.0.key"].shape
    assert profiles[0]["past_key_values.0.key"] == ((1, *shape[1:]), shape, (4, *shape[1:]))
    assert not path.exists()
    assert not list((tmp_path / "programs").iterdir())
    del engine
    faked.engines.clear()
    gc.collect()  # an engine and its contexts know each other
    assert "engine" in faked.driver.destroyed


def test_caches_in_place(
    faked: SimpleNamespace, fused: Callable[..., Program], shipped: Subject, tmp_path: Path
) -> None:
    """What a plugin writes over its input comes from the input's memory, every time from the given one."""
    program = fused("float16")
    feeds = feeds_of(program, 1, 3)
    settings = BuildSettings(EngineLimits(1, 3, 40, 1536), parse_plugins("off"))
    bodies = prepare(program, settings, "float16", 90, TensorRTPlugins())
    aliases = {f"present.{name}": f"past_key_values.{name}" for name in ("0.key", "0.value")}
    folder = tmp_path / "plan"
    folder.mkdir()
    engine = faked.module.TensorRTPrograms(shipped.reader, parse_plugins("off"), folder)
    prepared = replace(bodies, aliases=aliases)
    runner = engine._build(prepared, faked.module.profiles_of(program, [feeds]), folder)
    first, second = runner(feeds), runner(feeds)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert np.abs(first["present.0.key"].astype(np.float32) - feeds["past_key_values.0.key"]).max() > 0.1
    assert runner.seconds > 0
    assert faked.built[0][3] is True
    runner.close()


def test_what_does_not_load(faked: SimpleNamespace) -> None:
    with pytest.raises(Exception, match="cannot load the engine it built"):
        faked.module.PlanProgram(b"nothing", {}, {}, [])
