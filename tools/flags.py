"""The groups of options that several verbs take; see ``groups.grouped``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moecompiler.passes.pipelines import AUTO, PLUGINS, default_pipeline
from moecompiler.passes.selection import Selection
from moecompiler.plugin_switches import parse_plugins
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.tools import calibration_options as cal
from moecompiler.tools import engine_options as eng
from moecompiler.tools import options as opt
from moecompiler.tools import quantization_options as quant


@dataclass(frozen=True)
class SourceFlags:
    """Which checkpoint, or which dummy."""

    model_dir: opt.ModelDir = None
    model: opt.Model = None
    num_layers: opt.NumLayers = None
    dummy_seed: opt.DummySeed = 0
    check_finite: opt.CheckFinite = False


@dataclass(frozen=True)
class MappingFlags:
    """How the model is split over ranks."""

    tp_size: opt.TpSize = 1
    pp_size: opt.PpSize = 1
    moe_tp_size: opt.MoeTpSize = None
    moe_ep_size: opt.MoeEpSize = None


@dataclass(frozen=True)
class GraphFlags:
    """What is exported."""

    dtype: opt.DataType = opt.DType.auto
    moe_normalization_mode: opt.NormalizationOption = opt.Normalization.renormalize
    max_seq_len: opt.MaxSeqLen = None
    gather_context_logits: opt.GatherContextLogits = False


@dataclass(frozen=True)
class QuantizationFlags:
    """What is quantized how; ``quantization.recipe_from_flags`` reads them."""

    qformat: quant.QFormatOption = None
    scales: quant.Scales = None
    use_weight_only: quant.UseWeightOnly = False
    weight_only_precision: quant.WeightOnlyPrecisionOption = None
    group_size: quant.GroupSize = None
    quantization: quant.RecipeFile = None
    kv_cache_dtype: quant.KVCacheDTypeOption = quant.KVCacheDType.auto
    use_fp8_context_fmha: quant.UseFp8ContextFmha = quant.Switch.disable

    @property
    def cache_dtype(self) -> quant.KVCacheDType:
        """Of the KV cache. That of NVFP4 models is FP8, as NVIDIA publishes them, if nothing else is asked for."""
        told = self.kv_cache_dtype
        fp8 = self.qformat is quant.QFormat.nvfp4 and told is quant.KVCacheDType.auto
        return quant.KVCacheDType.fp8 if fp8 else told


@dataclass(frozen=True)
class CalibrationFlags:
    """What activations are measured on; ``calibration.run_calibrate`` reads them. Lengths are in tokens."""

    calib_size: cal.CalibSize = 512
    calib_dataset: cal.CalibDataset = None
    calib_max_seq_length: cal.CalibMaxSeqLength = None
    calib_min_tokens: cal.CalibMinTokens = None
    tokenizer_dir: cal.TokenizerDir = None
    device: cal.DeviceOption = cal.Device.cpu


@dataclass(frozen=True)
class SelectionFlags(QuantizationFlags):
    """Which passes run. ``recipe`` is no option: what the options of quantization ask for, or a manifest; see
    ``quantization.resolved``."""

    pipeline: opt.Pipeline = AUTO
    only_pass: opt.OnlyPass = None
    disable_pass: opt.DisablePass = None
    stop_after: opt.StopAfter = ""
    allow_missed: opt.AllowMissed = False
    recipe: QuantizationRecipe | None = None

    @property
    def selection(self) -> Selection:
        pipeline = default_pipeline("") if self.pipeline == AUTO else self.pipeline
        only, disable = tuple(self.only_pass or ()), tuple(self.disable_pass or ())
        return Selection(pipeline, only, disable, self.stop_after, self.recipe)

    def for_backend(self, backend: str, plugins: str = AUTO) -> SelectionFlags:
        """With the pipeline of its own that ``auto`` stands for; where ``plugins`` asks for any, that which makes fused ops."""
        pipeline = PLUGINS if parse_plugins(plugins).insists else default_pipeline(backend)
        return replace(self, pipeline=pipeline) if self.pipeline == AUTO else self


@dataclass(frozen=True)
class InstrumentFlags:
    """What is shown of passes while they run."""

    time_passes: opt.TimePasses = False
    print_after: opt.PrintAfter = None
    dump_passes: opt.DumpPasses = opt.Dump.none
    dump_weights: opt.DumpWeights = True
    verify_each: opt.VerifyEach = False

    @property
    def shows(self) -> bool:
        """Whether there is something to print, for which passes have to run again."""
        return self.time_passes or bool(self.print_after)


@dataclass(frozen=True)
class WorkFlags:
    """How ranks are worked on."""

    workers: opt.Workers = 1
    rank: opt.Rank = None


@dataclass(frozen=True)
class EngineFlags:
    """What engines are built for; lengths in tokens, None: as long as the graph allows."""

    backend: opt.Backend = "onnxruntime"
    max_batch_size: opt.MaxBatchSize = 8
    max_input_len: opt.MaxInputLen = None
    max_num_tokens: eng.MaxNumTokens = None
    plugins: eng.Plugins = "auto"
    plugin_tactics: eng.PluginTactics = ""
    moe_plugin: eng.MoePlugin = opt.PluginDType.auto
    gpt_attention_plugin: eng.GptAttentionPlugin = opt.PluginDType.auto
    gemm_plugin: opt.GemmPlugin = opt.PluginDType.auto
    moe_weights: eng.MoeWeightsOption = eng.MoeWeights.auto
    compute_capability: eng.ComputeCapability = ""
