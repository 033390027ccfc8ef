"""A small vision transformer of torch's own layers, for small images and where timm is not installed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallViT(nn.Module):
    """Patches, learned positions, pre-norm layers, mean over patches, a linear head: [B, C, S, S] → [B, classes].

    Raises:
        ValueError: ``size`` is not a multiple of ``patch``, or ``width`` of ``heads``.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        size: int,
        *,
        patch: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, divisor in (("data.size", size, patch), ("width", width, heads)):
            if value % divisor:
                raise ValueError(f"{name}={value}: expected a multiple of {divisor} (model.options)")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        # LAMB's steps are proportional to the norm: from the usual 0.02, positions are learned after the rest is.
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width, device="cpu") * 0.2)
        layers = [
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out

    def no_weight_decay(self) -> set[str]:
        """As timm's models have it."""
        return {"positions"}
