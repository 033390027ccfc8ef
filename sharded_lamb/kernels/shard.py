"""The memory that the two passes run over."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FlatShard:
    """The memory that one rank updates in one bucket; flat tensors of one length, whole blocks."""

    weight: Tensor  # [n] master dtype: the parameters' own memory where their dtype is the master's
    model: Tensor | None  # [n] model dtype: what is gathered, where the master is kept apart
    grad: Tensor  # [n] compute dtype: gradients averaged over ranks; 0 in padding
    exp_avg: Tensor  # [n] state dtype
    exp_avg_sq: Tensor  # [n] state dtype
    block_param: Tensor  # [n / BLOCK] int64: the parameter each block belongs to
