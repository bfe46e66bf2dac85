"""What a benchmark ran on."""

from __future__ import annotations

import datetime

import torch


def machine() -> dict[str, str]:
    """Device, versions and date."""
    import triton
    from cuda.bindings import driver

    from moecompiler.plugins.driver import check

    version = check(*driver.cuDriverGetVersion())
    return {
        "device": torch.cuda.get_device_name(),
        "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
