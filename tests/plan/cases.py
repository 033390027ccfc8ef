"""Shapes and dtypes that predictions are tried on."""

import torch

from sharded_lamb.core.layout import BLOCK
from sharded_lamb.plan.sharding import Choices

UGLY = {
    "prime": (1031,),
    "odd": (61, 67),
    "scalar": (),
    "nothing": (0, 3),
    "one": (1,),
    "blocks": (3 * BLOCK,),
    "flat": (2, 2903),
    "few rows": (3, 5, 7),
    "rows": (9, 2),
}

KIB = 1 / 1024
CHOICES = {
    "fp32": Choices(bucket_mb=10 * KIB, sums_here=True),
    "bf16": Choices(model_dtype=torch.bfloat16, bucket_mb=10 * KIB, sums_here=True),
    "fp32, gathered in 8 bits": Choices(gather_dtype=torch.float8_e4m3fn, bucket_mb=10 * KIB, sums_here=True),
    "fp32, reduced in 8 bits": Choices(reduce_dtype=torch.float8_e4m3fn, bucket_mb=10 * KIB, sums_here=True),
    "bf16, wide wire, narrow state, ratio blocks": Choices(
        model_dtype=torch.bfloat16,
        state_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        ratio_blocks={"^odd$": "dim0", "rows": 3},
        bucket_mb=32,
        overlap=False,
        sums_here=True,
    ),
    "bf16, remainders": Choices(
        model_dtype=torch.bfloat16, store_param_remainders=True, bucket_mb=10 * KIB, sums_here=True
    ),
    "bf16, 8-bit remainders and moments": Choices(
        model_dtype=torch.bfloat16,
        store_param_remainders=8,
        state_dtype=torch.int8,
        bucket_mb=10 * KIB,
        sums_here=True,
    ),
}
