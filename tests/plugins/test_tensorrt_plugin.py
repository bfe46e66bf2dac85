"""The plugin of all ops on a fake TensorRT: from a node's attributes to fields and back, without Triton; and collectives."""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import DataType, FakeDriver, Field, FieldType, fake_tensorrt

from moecompiler.errors import UserError
from moecompiler.graph import COLLECTIVES
from moecompiler.plugins.fields import BakedTactic
from moecompiler.plugins.launch import Cubin, Input, Launch, Output
from moecompiler.plugins.library import TensorRTPlugins, plugin_ops
from moecompiler.runtime import device, host_way
from moecompiler.runtime.communicator import Alone, Communicator, using_communicator
from moecompiler.runtime.device_communicator import Ways
from moecompiler.runtime.threads import run_in_threads

MODULES = tuple(
    f"moecompiler.plugins.{name}_plugin" for name in ("tensorrt", "collective", "barrier", "all_reduce_norm", "one_way")
)
BUILD = object()  # the phase, which is not looked at


class Setting:
    """The plugins' modules on fakes; ``tensorrt`` is the module."""

    def __init__(self, tensorrt: Any, driver: FakeDriver):
        self.tensorrt, self.driver = tensorrt, driver
        self.plugin, self.collective, self.barrier, self.norm, _ = (importlib.import_module(name) for name in MODULES)

    def made(self, op: str, **attributes: float) -> Any:
        """A node's plugin, as the parser asks for it."""
        kinds = {int: FieldType.INT32, float: FieldType.FLOAT32}
        fields = [Field(n, np.array([v], kinds[type(v)].value), kinds[type(v)]) for n, v in attributes.items()]
        return self.creator(op).create_plugin("node", fields, BUILD)

    def creator(self, op: str) -> Any:
        return self.plugin.Creator(plugin_ops()[op], self.plugin.Modules())


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    driver = FakeDriver()
    tensorrt = fake_tensorrt(driver, [])
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setattr(device, "driver", lambda: driver)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    setting = Setting(tensorrt, driver)
    for module in (setting.plugin, host_way, setting.barrier):
        monkeypatch.setattr(module, "driver", lambda: driver, raising=False)
    yield setting
    for name in MODULES:
        sys.modules.pop(name, None)


def desc(*shape: int, kind: DataType = DataType.HALF, layout: str = "linear") -> Any:
    """What TensorRT says of a tensor; of one whose first dim is free, while it builds."""
    inner = SimpleNamespace(dims=shape, type=kind, format=layout)
    return SimpleNamespace(desc=inner, max=tuple(64 if size < 0 else size for size in shape), **vars(inner))


def configured(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A node of two free dims, for which a kernel has been compiled."""
    monkeypatch.setattr(setting.plugin, "_sm", lambda: 90)
    node = setting.made("AddRMSNorm", epsilon=1e-5)
    node.configure_plugin([desc(-1, -1, 256), desc(-1, -1, 256), desc(256)], [])
    return node


def test_from_attributes_to_fields_and_back(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine keeps is enough to run where Triton cannot be imported: the same kernels for the shapes at hand."""
    node = configured(setting, monkeypatch)
    assert (node.plugin_name, node.num_outputs, node.get_aliased_input(0)) == ("AddRMSNormPlugin", 2, -1)
    assert node.get_valid_tactics() == [1]
    assert node.baked.dtype == "float16"
    assert node.baked.tactics[0].cubins[0].image.startswith(b"\x7fELF")
    node.set_tactic(1)
    fields = node.get_fields_to_serialize()
    assert [field.name for field in fields] == ["plan", "cubins"]

    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    launched: list[Any] = []
    monkeypatch.setattr(setting.plugin, "load", lambda cubin, kernel: (cubin, kernel))
    monkeypatch.setattr(setting.plugin, "run", lambda *arguments: launched.append(arguments))
    again = setting.creator("AddRMSNorm").create_plugin("node", fields, BUILD).attach_to_context(None)
    assert again.baked == node.baked
    assert again.timing_cache_id == node.timing_cache_id
    again.enqueue([desc(2, 3, 256), desc(2, 3, 256), desc(256)], [], [10, 11, 12], [20, 21], 1000, 7)
    ((functions, launches, inputs, outputs, workspace, scratch, stream),) = launched
    assert functions == ((node.baked.tactics[0].cubins[0], again._tactics[0].kernels[0]),)
    (launch,) = launches
    assert launch.grid == (6, 1, 1)
    assert launch.args[:5] == (Input(0), Input(1), Input(2), Output(0), Output(1))
    assert (inputs, outputs, workspace, scratch, stream) == ([10, 11, 12], [20, 21], 1000, 1000, 7)


def test_plugins_are_never_freed(setting: Setting) -> None:
    """TensorRT frees their C++ halves itself; Python would do it again."""
    plugin = setting.made("RMSNorm", epsilon=1e-5)
    collective = setting.collective.Collective("AllReduce", (0, 1), talks=True)
    left = [weakref.ref(each) for each in (plugin, plugin.clone(), plugin.attach_to_context(None), collective)]
    del plugin, collective
    gc.collect()
    assert all(each() is not None for each in left)


def test_engines_of_other_versions_are_refused(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's arguments must be those that its kernel was compiled for."""
    node = configured(setting, monkeypatch)
    (tactic,) = node.baked.tactics
    for other in (replace(tactic, name="gone"), replace(tactic, kernels="0" * 16)):
        plugin = node.clone()
        plugin.baked = replace(node.baked, tactics=(other,))
        with pytest.raises(UserError, match=r"AddRMSNorm was made by another version of moecompiler .*: build it anew"):
            plugin.enqueue([desc(1, 1, 256), desc(1, 1, 256), desc(256)], [], [], [], 0, 0)


def test_types_and_shapes(setting: Setting) -> None:
    """Outputs have the dims of the input like them, or of the same names; a node's floats have one type, positions int64."""
    attention = setting.made("Attention", num_heads=4, num_kv_heads=2, scale=0.5, window=0)
    shapes = [[f"{index}"] for index in range(8)]
    assert attention.get_output_shapes(shapes, [], None) == [["0"], ["6"], ["6"]]
    assert [attention.get_aliased_input(output) for output in range(3)] == [-1, 6, 7]
    linear = setting.made("LinearInt4", block_size=64)  # its codes are bytes of two
    assert linear.get_output_shapes([["b", "s", "in"], ["out", "in/2"], ["out", "blocks"]], [], None) == [
        ["b", "s", "out"]
    ]
    half, codes = DataType.HALF, DataType.INT8
    assert linear.get_output_data_types([half, codes, half]) == [half]
    moe = setting.made("MoEInt8", top_k=2, normalization_mode=1)
    experts = [["rows", "H"], ["rows"], ["down", "F"], ["down"], ["L"]]
    assert moe.get_output_shapes([["T", "H"], ["E", "H"], *experts], [], None) == [["T", "H"]]
    assert attention.baked.attributes == {"num_heads": 4, "num_kv_heads": 2, "scale": 0.5, "window": 0}
    good = [desc(1)] * 5 + [desc(1, kind=DataType.INT64)] + [desc(1)] * 5

    def supported(position: int, **change: Any) -> bool:
        tensors = [*good[:position], desc(1, **change), *good[position + 1 :]] if change else good
        return attention.supports_format_combination(position, tensors, 8)

    assert all(supported(position) for position in range(11))
    assert not supported(5, kind=DataType.HALF)
    assert not supported(7, kind=DataType.FLOAT)
    assert not supported(0, kind=DataType.INT64)
    assert not supported(9, layout="vectorized")


def test_codes_come_as_bytes(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of int4 in one, so inputs are half as wide as the graph has them; scales are floats, but those of NVFP4."""
    moe = setting.made("MoEInt4Asymmetric", top_k=2, normalization_mode=1, block_size=64)
    half, byte = DataType.HALF, DataType.INT8
    kinds = [half, half, *(byte, half, byte) * 2, DataType.INT64, half]
    good = [desc(1, kind=kind) for kind in kinds]
    assert all(moe.supports_format_combination(position, good, 9) for position in range(10))
    assert not moe.supports_format_combination(2, [*good[:2], desc(1, kind=half), *good[3:]], 9)
    monkeypatch.setattr(setting.plugin, "_sm", lambda: 80)
    asked: list[Any] = []
    monkeypatch.setattr(setting.plugin, "tactics", lambda *arguments: asked.append(arguments) or ())
    blocks, rows = (2 * 2 * 128, 1), (2 * 64, 2)
    shapes = [(-1, 64), (8, 64), (blocks[0], 32), blocks, blocks, (rows[0], 64), rows, rows, (2,)]
    moe.configure_plugin([desc(*shape, kind=kind) for shape, kind in zip(shapes, kinds, strict=False)], [])
    ((op, attributes, dims, dtype, sm),) = asked
    assert (op, dims[2], dims[5], dims[4]) == ("MoEInt4Asymmetric", (512, 64), (128, 128), blocks)
    assert (attributes["block_size"], dtype, sm) == (64, "float16", 80)
    nvfp4 = setting.made("LinearNvfp4")
    codes = [desc(1), *(desc(1, kind=kind) for kind in (byte, byte, DataType.FLOAT)), desc(1)]
    assert all(nvfp4.supports_format_combination(position, codes, 4) for position in range(5))


def test_workspace_holds_every_tactic(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the largest shapes, Triton's scratch included, for which tactic will be set is not known."""
    node = configured(setting, monkeypatch)

    def tactic(name: str, own: int, programs: int) -> Any:
        return SimpleNamespace(
            name=name,
            kernels=(),
            workspace=lambda dims: own,
            launches=lambda dims: (Launch(0, (programs, dims[0][0], 1), ()),),
        )

    ways = [tactic("few", 1024, 1), tactic("many", 256, 5)]
    monkeypatch.setattr(setting.plugin, "tactics", lambda *arguments: ways)
    cubin = Cubin(b"", "k", 0, 4, 128)
    baked = tuple(BakedTactic(way.name, setting.plugin.fingerprint(()), (cubin,)) for way in ways)
    node = node.clone()
    node.baked = replace(node.baked, tactics=baked)
    assert node.get_workspace_size([desc(-1, -1, 256), desc(-1, -1, 256), desc(256)], []) == 256 + 128 * 5 * 64


def test_misread_arrays_are_noticed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 10.6 with numpy 2: every element is the first."""

    class Misread(Field):
        def __init__(self, name: str, data: np.ndarray, kind: FieldType):
            super().__init__(name, data[:1].repeat(len(data)), kind)

    TensorRTPlugins().register()
    monkeypatch.setattr(setting.tensorrt, "PluginField", Misread)
    with pytest.raises(UserError, match=r"TensorRT 10.6.0's Python bindings misread arrays of numpy .*--plugins off"):
        TensorRTPlugins().register()


def test_register_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the process ends, that is: the registry points to creators that then go."""
    at_exit: list[tuple[Callable[..., Any], Any]] = []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    TensorRTPlugins().register()
    registry = setting.tensorrt.get_plugin_registry()
    names = [*plugin_ops(), *COLLECTIVES, "Barrier"]
    found = [registry.get_creator(f"{name}Plugin", "1", "moecompiler") for name in names]
    assert None not in found
    TensorRTPlugins().register()
    assert [registry.get_creator(f"{name}Plugin", "1", "moecompiler") for name in names] == found
    assert [creator for _, creator in at_exit] == found
    for deregister, creator in at_exit:
        deregister(creator)
    assert {registry.get_creator(f"{name}Plugin", "1", "moecompiler") for name in names} == {None}


@pytest.mark.parametrize(("op", "wanted"), [("AllReduce", [[3.0, 5.0]] * 2), ("AllGather", [[1.0, 2.0, 2.0, 3.0]] * 2)])
def test_collectives(op: str, wanted: list[list[float]], setting: Setting) -> None:
    """Each rank's thread has its communicator. While an engine is built, there is nobody to talk to."""
    creator = setting.collective.CollectiveCreator(op)
    building = creator.create_plugin("node", [Field("group", np.array([0, 1], np.int32), FieldType.INT32)], BUILD)
    running = creator.create_plugin("node", building.get_fields_to_serialize(), BUILD).attach_to_context(None)
    assert (running.op, running.group) == (op, (0, 1))

    def run(communicator: Communicator) -> list[float]:
        x, y = device.Buffer(4), device.Buffer(8)
        setting.driver.array(x.pointer, (2,), np.float16)[...] = [1 + communicator.rank, 2 + communicator.rank]
        building.enqueue([desc(2)], [desc(2)], [x.pointer], [y.pointer], 0, 0)
        assert set(setting.driver.array(y.pointer, (8,), np.uint8)) == {0xFF}
        running.enqueue([desc(2)], [desc(2)], [x.pointer], [y.pointer], 0, 0)
        return setting.driver.array(y.pointer, (len(wanted[0]),), np.float16).tolist()

    assert run_in_threads(2, run) == wanted
    times = SimpleNamespace(constant=lambda n: n, operation=lambda kind, a, b: f"{a}{kind}{b}")
    assert running.get_output_shapes([["b", "h"]], [], times) == [["b", "h*2"] if op == "AllGather" else ["b", "h"]]


def test_a_barrier_copies(setting: Setting) -> None:
    """All of it, and no more; what an engine kept makes another one."""
    creator = setting.barrier.BarrierCreator()
    made = creator.create_plugin("node", creator.create_plugin("node", [], BUILD).get_fields_to_serialize(), BUILD)
    node = made.attach_to_context(None)
    x, y = device.Buffer(32), device.Buffer(32)
    setting.driver.array(x.pointer, (8,), np.float32)[...] = range(8)
    shares = desc(2, 3, 1, kind=DataType.FLOAT)
    assert node.enqueue([shares], [shares], [x.pointer], [y.pointer], 0, 0) == 0
    setting.driver.cuStreamSynchronize(0)
    copied = setting.driver.array(y.pointer, (8,), np.float32)
    assert copied[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isnan(copied[6:]).all()
    assert node.supports_format_combination(0, [shares, shares], 1)
    assert not node.supports_format_combination(1, [shares, desc(2, 3, 1)], 1)


@pytest.mark.parametrize("fits", [False, True])
def test_all_reduce_with_the_norm_behind_it(fits: bool, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch where the ranks' way has that for these rows, else the sum goes to the workspace, and the kernel of the norm
    reads it there. While an engine is built there is nobody to talk to."""
    monkeypatch.setattr(setting.plugin, "_sm", lambda: 90)
    creator = setting.norm.ExchangingCreator(plugin_ops()["AllReduceAddRMSNorm"], setting.plugin.Modules())
    fields = [Field("epsilon", np.array([1e-5], np.float32), FieldType.FLOAT32)]
    fields.append(Field("group", np.array([0, 1], np.int32), FieldType.INT32))
    building = creator.create_plugin("node", fields, BUILD).clone()
    shapes = [desc(-1, -1, 256), desc(-1, -1, 256), desc(256)]
    building.configure_plugin(shapes, [])
    building.set_tactic(1)
    assert building.get_workspace_size(shapes, []) == 64 * 64 * 256 * 2
    running = creator.create_plugin("node", building.get_fields_to_serialize(), BUILD).attach_to_context(None)
    assert running.baked.attributes == {"epsilon": pytest.approx(1e-5), "group": [0, 1]}
    launched: list[Any] = []
    monkeypatch.setattr(setting.plugin, "load", lambda cubin, kernel: kernel)
    monkeypatch.setattr(setting.plugin, "run", lambda functions, launches, *rest: launched.append(rest))
    here = [desc(1, 3, 256), desc(1, 3, 256), desc(256)]
    building.enqueue(here, [], [10, 11, 12], [20, 21], 4096, 7)
    assert launched == [([10, 11, 12], [20, 21], 4096, 4096, 7)]

    asked: list[Any] = []
    way = SimpleNamespace(name="ipc", capturable=True)
    way.check = way.leave = way.close = way.all_gather = lambda *_: None
    way.takes = lambda nbytes, group: (nbytes, group) == (3 * 256 * 2, (0, 1))
    way.norm_fits = lambda rows, hidden, dtype, group: fits and (rows, hidden, dtype) == (3, 256, "float16")
    way.all_reduce = lambda *call: asked.append(call)
    way.all_reduce_add_rms_norm = lambda *call: asked.append(call)
    ranks = Alone()
    ranks.device = Ways([way])
    with using_communicator(ranks):
        running.enqueue(here, [], [10, 11, 12], [20, 21], 4096, 7)
    if fits:
        assert asked == [((10, 11, 12), (20, 21), 3, 256, pytest.approx(1e-5), "float16", (0, 1), 7)]
        assert len(launched) == 1
    else:
        assert asked == [(11, 4096, 768, "float16", (0, 1), 7)]
        assert launched[1:] == [([10, 4096, 12], [20, 21], 4096 + 1536, 4096 + 1536, 7)]
    assert ranks.device.waits == 0
