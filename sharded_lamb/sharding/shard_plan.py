"""Checks and plans an optimizer's new parameters, before anything is allocated or sent."""

import sys
import weakref
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharded_lamb import kernels
from sharded_lamb.comm.topology import Topology
from sharded_lamb.comm.wire_formats import check_gather_dtype, of_reduce
from sharded_lamb.core.hyperparams import flag, integer, number
from sharded_lamb.core.layout import Bucket, ShardLayout, plan_buckets
from sharded_lamb.core.parameters import NamedParameter, check_parameter, grad_dtype_of
from sharded_lamb.kernels.formats import FLOATS, STATE_DTYPES
from sharded_lamb.kernels.remainders import STORAGE
from sharded_lamb.sharding.buckets import Precision
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.local_shards import check_dense
from sharded_lamb.sharding.placements import ShardSpec, local_part, mesh_device, ranks_of_mesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_stores: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""The `ParamStore` of every optimizer, which know their parameters. A weak reference to a parameter would keep
``module.to()`` from replacing it (``torch.utils.swap_tensors``; DTensors are always swapped)."""


_STAGE = "1 (gradients are averaged already) or 2 (gradients are reduced here)"
_REMAINDERS = "False, True (16 bits of each master), or 8 (of 24-bit masters)"
_FLAGS = ("overlap", "skip_nonfinite")
REDUCE_DTYPES = (*FLOATS, torch.float8_e4m3fn)


def remainder_bits(value: Any) -> int:
    """The bits of ``store_param_remainders``: 0 for False, 16 for True. Raises ValueError for others than 8 and 16."""
    if isinstance(value, bool):
        return 16 if value else 0
    bits = integer("store_param_remainders", value, 0, _REMAINDERS)
    if bits not in (0, *STORAGE):
        raise ValueError(f"store_param_remainders must be {_REMAINDERS}, got {value!r}")
    return bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keywords of `ShardedLamb` for ranks and memory. Raises ValueError for an invalid one."""

    stage: int
    bucket_mb: float
    master_dtype: torch.dtype
    state_dtype: torch.dtype
    reduce_dtype: torch.dtype | None
    overlap: bool
    skip_nonfinite: bool
    max_consecutive_skips: int
    kernel: str
    store_param_remainders: bool | int
    ema_decay: float | None = None
    gather_dtype: torch.dtype | None = None
    lars: bool = False  # one moment

    def __post_init__(self) -> None:
        plain = {
            "stage": integer("stage", self.stage, 1, _STAGE),
            "bucket_mb": number(
                "bucket_mb", self.bucket_mb, 2.0**-20, 2.0**40, "> 0 (MiB of parameters a bucket)"
            ),
            "max_consecutive_skips": integer(
                "max_consecutive_skips", self.max_consecutive_skips, 1, ">= 1, an int"
            ),
            "store_param_remainders": remainder_bits(self.store_param_remainders),
            **{name: flag(name, getattr(self, name)) for name in _FLAGS},
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.stage not in (1, 2):
            fsdp = "; stage 3 is FSDP2: call fully_shard(model) and leave stage out" * (self.stage == 3)
            raise ValueError(f"stage must be {_STAGE}, got {self.stage!r}{fsdp}")
        if self.kernel not in kernels.NAMES:
            raise ValueError(f"kernel must be one of {kernels.NAMES}, got {self.kernel!r}")
        for name in ("master_dtype", "state_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            known = {"state_dtype": STATE_DTYPES, "reduce_dtype": REDUCE_DTYPES}.get(name, FLOATS)
            is_known = isinstance(dtype, torch.dtype) and dtype in known
            if not is_known and not (name == "reduce_dtype" and dtype is None):
                raise ValueError(f"{name} must be one of {[str(x) for x in known]}, got {dtype!r}")
        check_gather_dtype(self.gather_dtype)
        if self.gather_dtype == torch.float8_e4m3fn and self.store_param_remainders:
            raise ValueError(
                f"store_param_remainders={self.store_param_remainders} with gather_dtype=torch.float8_e4m3fn: a "
                f"remainder is the low bits of a master beside the high ones in a bfloat16 weight, and that gather "
                f"rounds them away. Omit one of the two"
            )
        if self.ema_decay is not None:
            decay = number("ema_decay", self.ema_decay, 0.0, 1.0, "None, or a number in [0, 1)")
            if decay == 1.0:
                raise ValueError(
                    "ema_decay must be None, or a number in [0, 1), got 1: weights would not count"
                )
            object.__setattr__(self, "ema_decay", decay)
        if self.state_dtype == torch.float16:
            raise ValueError(
                "state_dtype=torch.float16: second moments, squares of gradients, underflow to 0 below 6e-8, where "
                "usual ones are. Pass torch.bfloat16, with the range of float32, or torch.float32"
            )
        if self.store_param_remainders and self.master_dtype != torch.float32:
            raise ValueError(
                f"store_param_remainders={self.store_param_remainders} needs master_dtype=torch.float32, got "
                f"{self.master_dtype}: a remainder is low bits of a float32, beside a bfloat16 weight. Omit one of "
                f"the two"
            )

    def check_master(self, name: str, model: torch.dtype) -> None:
        """Raises ValueError for a float16 master of parameter ``name`` of another dtype ``model``."""
        if self.master_dtype == torch.float16 and model not in (torch.float16, torch.float64):
            raise ValueError(
                f"master_dtype=torch.float16 for parameter {name!r} of {model}: a master narrower than its weight "
                f"loses updates and values below 6e-8 or above 65504. Pass torch.float32, or {model} for no masters"
            )

    def check_gather(self, name: str, p: Tensor) -> None:
        """Raises ValueError for a DTensor ``p`` with ``gather_dtype``."""
        if self.gather_dtype is not None and is_dtensor(p):
            raise ValueError(
                f"gather_dtype={self.gather_dtype} with parameter {name!r}, a DTensor: FSDP2 gathers it, in the "
                f"param_dtype of fully_shard(…, mp_policy=MixedPrecisionPolicy(…)). Omit gather_dtype"
            )

    def check_reduce(self, name: str, p: Tensor) -> None:
        """Raises ValueError for parameter ``p`` whose gradients ``reduce_dtype`` would encode, and others reduce."""
        if of_reduce(self.reduce_dtype, grad_dtype_of(p)) is None or (self.stage == 2 and not is_dtensor(p)):
            return
        reason = (
            "a DTensor: FSDP2 reduces its gradients, in the reduce_dtype of fully_shard(…, "
            "mp_policy=MixedPrecisionPolicy(…))"
            if is_dtensor(p)
            else "in stage 1: DistributedDataParallel reduces its gradients, and compresses them by "
            "model.register_comm_hook(None, default_hooks.bf16_compress_hook)"
        )
        raise ValueError(
            f"reduce_dtype={self.reduce_dtype} with parameter {name!r}, {reason}. Omit reduce_dtype"
        )

    def described(self) -> dict[str, Any]:
        """JSON-serializable, for the comparison over ranks."""
        return {key: str(value) for key, value in asdict(self).items()}

    def of_group(self, group: Mapping[str, Any]) -> "Settings":
        """With the ``state_dtype`` of a parameter group that has one. Raises ValueError for an invalid one."""
        if "state_dtype" not in group:
            return self
        return replace(self, state_dtype=group["state_dtype"])

    def precision(self, p: Tensor) -> Precision:
        """The precision of parameter ``p``."""
        return Precision.of(
            p.dtype,
            self.master_dtype,
            self.state_dtype,
            self.reduce_dtype,
            remainder_bits=int(self.store_param_remainders),
            averages=self.ema_decay is not None,
            second_moment=not self.lars,
            gather=self.gather_dtype,
            grads=grad_dtype_of(p),
        )


SETTINGS = {field.name for field in fields(Settings)}


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """New parameters, the layout that includes them, and the buckets of the plain ones."""

    rows: list[NamedParameter]
    layout: ShardLayout
    buckets: tuple[Bucket, ...]
    specs: dict[int, ShardSpec]  # DTensors only
    precisions: list[Precision]  # of ``rows``
    device: torch.device
    wire_device: torch.device  # where small all-reduces run

    def described(self, first: int) -> list[tuple[str, Any]]:
        """JSON-serializable items on which ranks must agree. ``first``: the index of the first row's parameter."""
        order = list(dict.fromkeys(self.specs.values()))  # ranks must agree on which DTensors share a spec
        described: list[tuple[str, Any]] = []
        for i, ((name, p, _), precision) in enumerate(
            zip(self.rows, self.precisions, strict=True), start=first
        ):
            row: list[Any] = [name, list(p.shape), str(p.dtype), p.device.type, precision.moments[0].name]
            if grad_dtype_of(p) != p.dtype:
                row.append(f"grad_dtype={grad_dtype_of(p)}")
            if i in self.specs:
                row.append({**self.specs[i].described(), "spec": order.index(self.specs[i])})
            described.append((f"parameter {i}", row))
        return [*described, ("parameters", len(self.layout.numels)), ("layout", self.layout.digest())]


def plan_shards(
    rows: Sequence[NamedParameter],
    layout: ShardLayout,
    topology: Topology,
    settings: Settings,
    device: torch.device,
) -> ShardPlan:
    """Plan to add ``rows``, new parameters that require gradients, to ``layout``. Allocates nothing.

    Args:
        device: the plan's device if ``rows`` is empty.

    Raises:
        ValueError: a DTensor with unsupported placements, or whose mesh has ranks outside ``topology``.
    """
    indexed = list(enumerate(rows, start=len(layout.numels)))
    precisions = [settings.of_group(group).precision(p) for _, p, group in rows]
    kinds: list[Hashable] = [
        (p.dtype, precision.moments, grad_dtype_of(p))
        for (_, p, _), precision in zip(rows, precisions, strict=True)
    ]
    specs = {i: _shard_spec(name, p, topology) for i, (name, p, _) in indexed if is_dtensor(p)}
    plain = [(i, p) for i, (_, p, _) in indexed if i not in specs]
    buckets = plan_buckets(
        [p.numel() for _, p in plain],
        [kinds[i - len(layout.numels)] for i, _ in plain],
        [p.element_size() for _, p in plain],
        int(settings.bucket_mb * 2**20),
        layout.world_size,
    )
    buckets = tuple(replace(b, params=tuple(plain[position][0] for position in b.params)) for b in buckets)
    layout = replace(
        layout,
        numels=(*layout.numels, *(p.numel() for _, p, _ in rows)),
        buckets=(*layout.buckets, *buckets),
        dtensors=layout.dtensors | specs.keys(),
    )
    device = rows[0][1].device if rows else device
    wire = next((mesh_device(spec.mesh) for spec in specs.values()), device)
    return ShardPlan(list(rows), layout, buckets, specs, precisions, device, wire)


def _shard_spec(name: str, p: "DTensor", topology: Topology) -> ShardSpec:
    spec = ShardSpec.of(name, p)
    check_dense(name, p)
    beyond = sorted(set(ranks_of_mesh(spec.mesh)) - set(topology.everyone))
    if beyond:
        raise ValueError(
            f"parameter {name!r} is on a mesh of ranks {ranks_of_mesh(spec.mesh)} and this optimizer's ranks are "
            f"{topology.everyone}: ranks {beyond} would be missing from its norms. All DTensors' meshes must "
            f"be sliced from one root mesh; or pass process_group= with the ranks of all of them"
        )
    return spec


def check_new(new: Sequence[NamedParameter], names: Sequence[str], params: Sequence[Tensor]) -> None:
    """Check that an optimizer that holds ``params`` can register ``new`` ones.

    Raises:
        TypeError, ValueError: see `check_shardable`; two parameters share memory.
    """
    for name, p, _ in new:
        check_shardable(name, p, params[0].device if params else new[0][1].device)
    check_separate([*names, *(name for name, _, _ in new)], [*params, *(p for _, p, _ in new)])


def check_separate(names: Sequence[str], params: Sequence[Tensor]) -> None:
    """Raises ValueError if two parameters begin at one address."""
    first: dict[int, str] = {}
    for name, p in zip(names, params, strict=True):
        pointer = _pointer(p)
        if pointer and pointer in first:
            raise ValueError(
                f"parameters {first[pointer]!r} and {name!r} are two objects over the same memory: tie "
                f"them by assigning one Parameter to both modules (decoder.weight = embedding.weight)"
            )
        first[pointer] = name


def check_shardable(name: str, p: Tensor, device: torch.device) -> None:
    """Raises TypeError or ValueError for a parameter that cannot be sharded, with the remedy."""
    check_parameter(name, p)
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed, which flattens parameters and sets hooks itself: "
            f"ShardedLamb(stage=1 or 2) replaces DeepSpeed's ZeRO and cannot run inside it"
        )
    if p.device.type == "meta":
        raise ValueError(
            f"parameter {name!r} is on the meta device: call model.to_empty(device=…) and initialize it, and "
            f"construct ShardedLamb after"
        )
    if p.device != device:
        raise ValueError(
            f"parameter {name!r} is on {p.device} and others are on {device}: one rank's parameters must share a device"
        )


def claim(store: Any) -> None:
    """Record that the optimizer of ``store`` holds the store's parameters, present and future."""
    _stores.add(store)


def release_claims(new: Sequence[NamedParameter], optimizer: object) -> None:
    """Check that no other open optimizer holds ``new`` parameters, or close it while an exception is handled.

    In an except clause the exception's traceback holds the optimizer that it ended, whatever the program deletes.

    Raises:
        ValueError: another ShardedLamb holds one of them.
    """
    for (name, p, _), store in product(new, tuple(_stores)):
        holder = store.optimizer if p in store.index else None
        if holder is None or holder is optimizer:
            continue
        if holder.is_open and sys.exc_info()[0] is None:
            raise ValueError(
                f"parameter {name!r} already belongs to another ShardedLamb: two would each move it into buckets of "
                f"their own. Use one optimizer with two groups, or call close() on the other one first: `del` is not "
                f"enough while a scheduler, a wrapper or a traceback still holds it"
            )
        with suppress(RuntimeError):  # a gather of the other one failed
            holder._close(f"a ShardedLamb constructed later took over {name!r}")


def _pointer(p: Tensor) -> int:
    """The address of a parameter's memory on this rank; 0 if it has none."""
    return local_part(p).data_ptr() if is_dtensor(p) else p.data_ptr()
