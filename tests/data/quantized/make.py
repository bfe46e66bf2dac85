"""Makes the files beside it: one small linear layer, quantized and packed by the packages that published checkpoints come from.

    python make.py autoawq | gptqmodel | compressed-tensors | modelopt

each writes ``NAME.safetensors``: the layer's tensors as a checkpoint has them, and ``dequantized``, what the package's own code makes of
them. None needs a GPU. The packages do not go together; each was installed without its dependencies into an environment of its
own, beside torch 2.13.0, numpy 2.4.6, safetensors 0.8.0 and what it asked for when imported:

- autoawq 0.2.9 (with transformers 4.51.3, tokenizers 0.21.4, huggingface_hub 0.34.4, accelerate 1.6.0, datasets 3.6.0)
- gptqmodel 7.7.0 (with transformers 5.17.0; from the source distribution, unbuilt, on PYTHONPATH)
- compressed-tensors 0.20.0
- nvidia-modelopt 0.47.0
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
OUT, IN, GROUP = 32, 64, 32


def original() -> torch.Tensor:
    """``[OUT, IN]`` float16, rows of unlike size, one group of zeros."""
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    weight *= 2.0 ** torch.arange(OUT).remainder(5).sub(6).unsqueeze(1)
    weight[3, :GROUP] = 0
    return weight.half()


def linear() -> torch.nn.Linear:
    layer = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.float16)
    layer.weight.data = original()
    return layer


def save(name: str, **tensors: torch.Tensor) -> None:
    contiguous = {key.replace("__", "."): value.detach().contiguous() for key, value in tensors.items()}
    save_file(contiguous, HERE / f"{name}.safetensors")


def grouped_minmax() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric scales and zero points ``[OUT, IN / GROUP]``, and the largest magnitudes, of whatever algorithm one likes."""
    groups = original().float().view(OUT, -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half().float()
    return scales, (-low / scales).round().clamp(0, 15), groups.abs().amax(-1)


def autoawq() -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    layer = linear()
    settings = SimpleNamespace(group_size=GROUP, zero_point=True, w_bit=4)
    layer.weight.data, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(settings, layer.weight.data)
    packed = WQLinear_GEMM.from_linear(
        layer, w_bit=4, group_size=GROUP, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    dequantized = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).t()
    save("autoawq", qweight=packed.qweight, qzeros=packed.qzeros, scales=packed.scales, dequantized=dequantized)


def gptqmodel() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    scales, zeros, largest = grouped_minmax()
    in_order = torch.arange(IN, dtype=torch.int32) // GROUP
    act_order = in_order[torch.randperm(IN, generator=torch.Generator().manual_seed(1))]
    symmetric = (largest / 7).clamp(min=1e-5).half().float()
    tensors = {}
    for name, sym, desc_act, version in (
        ("v1_sym", True, False, 1),
        ("v1_act_order", True, True, 1),
        ("v2_asym", False, False, 2),
    ):
        packed = TorchLinear(
            bits=4, group_size=GROUP, sym=sym, desc_act=desc_act, in_features=IN, out_features=OUT, bias=False
        )
        own_scales, own_zeros = (symmetric, torch.full_like(zeros, 8)) if sym else (scales, zeros)
        packed.pack_original(linear(), own_scales, own_zeros, act_order if desc_act else in_order)
        packed.post_init()
        dequantized = packed.dequantize_weight().t().half()
        if version == 1:
            config = QuantizeConfig(bits=4, group_size=GROUP, sym=sym, desc_act=desc_act)
            convert_gptq_v2_to_v1_format_module(packed, config)
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}__{key}"] = getattr(packed, key).clone()
        tensors[f"{name}__dequantized"] = dequantized
    save("gptqmodel", **tensors)


def compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = original()
    tensors = {}
    groups = weight.view(OUT, -1, GROUP)
    cases = {
        "int4_sym": ("pack-quantized", dict(num_bits=4, strategy="group", group_size=GROUP, symmetric=True), groups),
        "int4_asym": ("pack-quantized", dict(num_bits=4, strategy="group", group_size=GROUP, symmetric=False), groups),
        "int4_channel": ("pack-quantized", dict(num_bits=4, strategy="channel", symmetric=True), weight.unsqueeze(1)),
        "fp8_tensor": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor"), weight.view(1, 1, -1)),
        "fp8_channel": ("float-quantized", dict(num_bits=8, type="float", strategy="channel"), weight.unsqueeze(1)),
    }
    for name, (form, settings, shared) in cases.items():
        args = QuantizationArgs(**settings)
        scales, zeros = calculate_qparams(shared.amin(-1), shared.amax(-1), args)
        if settings["strategy"] == "tensor":
            scales, zeros = scales.view(1), zeros.view(1)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(form)
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
        stored = compressor.compress(state, scheme)
        for key, value in stored.items():
            tensors[f"{name}__{key}"] = value.clone()
        tensors[f"{name}__dequantized"] = compressor.decompress(stored, scheme)["weight"]
    tensors |= compressed_nvfp4(weight)
    save("compressed-tensors", **tensors)


def compressed_nvfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4A16
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(targets=["Linear"], weights=NVFP4A16["weights"])
    global_scale = generate_gparam(weight.float().amin().view(1), weight.float().amax().view(1))
    blocks = weight.float().view(OUT, -1, 16)
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=global_scale)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    state = {"weight": weight.float(), "weight_scale": scales, "weight_global_scale": global_scale}
    stored = compressor.compress(state, scheme)
    tensors = {f"nvfp4__{key}": value.clone() for key, value in stored.items()}
    return tensors | {"nvfp4__dequantized": compressor.decompress(stored, scheme)["weight"]}


def modelopt() -> None:
    from modelopt.torch.export.quant_utils import to_quantized_weight
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    weight = original()
    scale = weight.abs().amax().float() / 448
    fp8 = to_quantized_weight(weight.float(), scale, "fp8")
    restored = FP8QTensor(weight.shape, torch.float32, fp8).dequantize(torch.float32, scale=scale)
    nvfp4, scales, global_scale = NVFP4QTensor.quantize(weight.float(), 16)
    values = nvfp4.dequantize(torch.float32, scale=scales, double_scale=global_scale, block_sizes={-1: 16})
    save(
        "modelopt",
        original=weight,
        fp8__weight=fp8,
        fp8__weight_scale=scale,
        fp8__dequantized=restored,
        nvfp4__weight=nvfp4._quantized_data,
        nvfp4__weight_scale=scales,
        nvfp4__weight_scale_2=global_scale,
        nvfp4__dequantized=values,
    )


if __name__ == "__main__":
    {
        "autoawq": autoawq,
        "gptqmodel": gptqmodel,
        "compressed-tensors": compressed_tensors,
        "modelopt": modelopt,
    }[sys.argv[1]]()
