"""BERT's metrics: the layers of trust ratios, and the peak speed that MFU refers to."""

from __future__ import annotations

import re
import time

import torch

# Dense 16-bit peaks from the makers' data sheets, without sparsity; a name's first match counts.
_KNOWN_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "V100": 125.0,
}


def layer_of(name: str) -> str:
    """The part of BERT that owns a parameter, to group trust ratios."""
    parts = name.split(".")
    if "layer" in parts:
        return f"layer {parts[parts.index('layer') + 1]}"
    return "embeddings" if "embeddings" in parts else "head"


def peak_flops(
    device: torch.device, configured_tflops: float | None, *, is_fp32: bool = False
) -> tuple[float, str]:
    """(peak FLOP/s of one rank, the reference of MFU; the source of the number).

    ``is_fp32``: matmuls are in fp32 (or TF32, if torch is set so), whose peak on a GPU is measured.
    """
    if configured_tflops is not None:
        return configured_tflops * 1e12, "speed.peak_tflops"
    on_gpu = device.type == "cuda"
    if on_gpu and not is_fp32:
        name = torch.cuda.get_device_name(device)
        for known, tflops in _KNOWN_TFLOPS.items():
            if re.search(rf"\b{known}\b", name):
                return tflops * 1e12, f"data sheet of {known}, dense bf16"
    size, where = (8192, "GPU") if on_gpu else (1024, "threads")
    return _measured_flops(device, size), f"a {size} x {size} fp32 matmul on this rank's {where}"


def _measured_flops(device: torch.device, size: int) -> float:
    a = torch.randn(size, size, device=device)
    best = 0.0
    for _ in range(4):
        begin = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best
