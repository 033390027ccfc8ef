"""Generates the golden vectors in this folder; `--check` generates them again and compares.

One `inputs.json` (parameters, gradients, options) and one file of expected values per variant, all float64.
`tests/oracle.py` computes the expected values, and they are written only if the oracle agrees with independent
implementations: torch.optim.Adam, AdamW and SGD, timm's Lamb and Lars, and second transcriptions of the TensorFlow
reference, of LANS and of MLPerf's LARS.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from tests.oracle import VARIANT_FACTS, OracleLamb, variant_options  # noqa: E402

Grads = Mapping[str, np.ndarray | None]
STEPS = 10
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.02}
COMMON = {name: OPTIONS[name] for name in ("lr", "betas", "eps")}
NO_DECAY = ("bias", "LayerNorm")
# step → parameters without a gradient: single ones, a parameter's first, and in step 8 (None) all of them.
MISSING = {0: ("dense.bias",), 3: ("dense.bias", "scale"), 5: ("embed.weight",), 8: None}


def excluded(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    return {name for name in names if any(re.search(p, name) for p in patterns)}


def make_inputs() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Parameters and full gradients; every value is exact in float32, so that float32 runs start equal."""
    rng = np.random.default_rng(20190402)

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape) * scale, dtype=np.float32).astype(np.float64)

    params = {
        "embed.weight": draw((5, 3), 60.0),  # a norm over 10 and, uncorrected, a ratio over 10
        "dense.weight": draw((4, 3), 1e-3),  # a ratio below 0.01
        "dense.bias": draw((4,), 0.5),
        "LayerNorm.weight": np.ones(4),
        "LayerNorm.bias": np.zeros(4),
        "scale": np.array(0.75),
    }
    # Gradients shrink, so that clipping at 1.0 is on at first and off at the end.
    grads = [{n: draw(p.shape, 1.5 * 0.6**k) for n, p in params.items()} for k in range(STEPS)]
    grads[0]["LayerNorm.weight"] = np.zeros(4)  # no decay, no gradient: an update of norm 0
    return params, grads


def with_missing(grads: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray | None]]:
    result: list[dict[str, np.ndarray | None]] = []
    for k, step in enumerate(grads):
        missing = MISSING.get(k, ())
        result.append({n: None if missing is None or n in missing else g for n, g in step.items()})
    return result


def make_oracle(variant: str, params: Mapping[str, np.ndarray], **changes: Any) -> OracleLamb:
    options = {**OPTIONS, **variant_options(variant, params, excluded(params, NO_DECAY)), **changes}
    return OracleLamb(params, **options)


def expected(variant: str, params: Mapping[str, np.ndarray], grads: list[Any]) -> list[dict[str, Any]]:
    oracle, rows = make_oracle(variant, params), []
    for step in grads:
        oracle.step(step)
        weights = {n: p.tolist() for n, p in oracle.params.items()}
        rows.append({"params": weights, "ratios": dict(oracle.ratios), "grad_norm": oracle.grad_norm})
    return rows


def tf_reference(
    params: Mapping[str, np.ndarray],
    grads: list[Grads],
    exclude_from_weight_decay: list[str] | None,
    exclude_from_layer_adaptation: list[str] | None,
) -> dict[str, np.ndarray]:
    """The semantics of google-research/albert's LAMBOptimizer (lamb_optimizer.py), on a state of its own.

    No step count and no correction, epsilon outside the root, two nested selections on the norms; patterns
    search names, and unset adaptation patterns default to the decay patterns.
    """
    adaptation_patterns = exclude_from_layer_adaptation or exclude_from_weight_decay
    values = {name: value.copy() for name, value in params.items()}
    slots = {name: [np.zeros_like(value), np.zeros_like(value)] for name, value in params.items()}
    b1, b2 = OPTIONS["betas"]
    for step in grads:
        for name, grad in step.items():
            if grad is None:
                continue
            value, (m, v) = values[name], slots[name]
            m = np.multiply(b1, m) + np.multiply(1.0 - b1, grad)
            v = np.multiply(b2, v) + np.multiply(1.0 - b2, np.square(grad))
            update = m / (np.sqrt(v) + OPTIONS["eps"])
            if not any(re.search(p, name) for p in exclude_from_weight_decay or ()):
                update = update + OPTIONS["weight_decay"] * value
            ratio: Any = 1.0
            if not any(re.search(p, name) for p in adaptation_patterns or ()):
                w_norm, g_norm = np.linalg.norm(value.ravel()), np.linalg.norm(update.ravel())
                with np.errstate(divide="ignore", invalid="ignore"):
                    quotient = np.divide(w_norm, g_norm)
                ratio = np.where(w_norm > 0, np.where(g_norm > 0, quotient, 1.0), 1.0)
            values[name] = value - ratio * OPTIONS["lr"] * update
            slots[name] = [m, v]
    return values


def lans_reference(
    params: Mapping[str, np.ndarray], grads: list[Grads], eps_of_norm: float
) -> dict[str, np.ndarray]:
    """LANS (arXiv 2006.13484, Algorithm 2, with phi(z) = z), on a state of its own.

    ``eps_of_norm``: added to the gradient's norm, as the authors' kernel does and the paper does not.
    """
    no_decay, (b1, b2) = excluded(params, NO_DECAY), OPTIONS["betas"]
    final = {}
    for name, value in params.items():
        x, m, v, t = value.copy(), np.zeros_like(value), np.zeros_like(value), 0
        decay = 0.0 if name in no_decay else OPTIONS["weight_decay"]
        for step in grads:
            grad = step[name]
            if grad is None:
                continue
            t += 1
            norm = math.sqrt(float((grad * grad).sum()))
            unit = grad if norm == 0 else grad / (norm + eps_of_norm)
            m, v = b1 * m + (1 - b1) * unit, b2 * v + (1 - b2) * unit**2
            root = np.sqrt(v / (1 - b2**t)) + OPTIONS["eps"]
            momentum, current = m / (1 - b1**t) / root + decay * x, unit / root + decay * x
            size = math.sqrt(float((x * x).sum()))
            parts = []
            for direction in (momentum, current):
                length = math.sqrt(float((direction * direction).sum()))
                parts.append(direction * (size / length) if size > 0 and length > 0 else direction)
            x = x - OPTIONS["lr"] * (b1 * parts[0] + (1 - b1) * parts[1])
        final[name] = x
    return final


def check_against_lans_reference(params: dict[str, np.ndarray], grads: list[Any]) -> None:
    actual = oracle_run(make_oracle("lans", params), grads)
    compare("LANS", actual, lans_reference(params, grads, 0.0), 1e-13)
    compare("LANS with epsilon in the norm", actual, lans_reference(params, grads, 1e-12), 1e-9)


def lars_reference(
    params: Mapping[str, np.ndarray], grads: list[Grads], *, nesterov: bool
) -> dict[str, np.ndarray]:
    """The semantics of MLPerf's LARS (mlcommons/training, lars_optimizer.py), on a state of its own."""
    no_decay, momentum = excluded(params, NO_DECAY), OPTIONS["betas"][0]
    slots = {name: np.zeros_like(value) for name, value in params.items()}
    values = {name: value.copy() for name, value in params.items()}
    for step in grads:
        for name, grad in step.items():
            if grad is None:
                continue
            value, decay = values[name], 0.0 if name in no_decay else OPTIONS["weight_decay"]
            w_norm, g_norm = np.linalg.norm(value.ravel()), np.linalg.norm(grad.ravel())
            trust = 1.0
            if w_norm > 0 and g_norm > 0:
                trust = 0.001 * w_norm / (g_norm + decay * w_norm + OPTIONS["eps"])
            scaled_lr = OPTIONS["lr"] * trust
            grad = grad + decay * value
            slots[name] = np.multiply(momentum, slots[name]) + np.multiply(scaled_lr, grad)
            update = momentum * slots[name] + scaled_lr * grad if nesterov else slots[name]
            values[name] = value - update
    return values


def check_against_lars_reference(params: dict[str, np.ndarray], grads: list[Any]) -> None:
    for nesterov in (False, True):
        actual = oracle_run(make_oracle("lars", params, nesterov=nesterov), grads)
        compare(f"LARS, nesterov={nesterov}", actual, lars_reference(params, grads, nesterov=nesterov), 1e-13)


def check_lars_against_torch(params: dict[str, np.ndarray], grads: list[Any]) -> None:
    """Ratio 1 is SGD; and timm's Lars."""
    import torch

    from tests.timm_peer import load_timm_lars

    lr, momentum = OPTIONS["lr"], OPTIONS["betas"][0]
    for nesterov in (False, True):
        common = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        sgd = torch_run(lambda t, common=common: torch.optim.SGD(decay_groups(t), **common), params, grads)
        ratio_one = make_oracle("torch_lars", params, no_adapt=set(params), nesterov=nesterov)
        compare("torch.optim.SGD", oracle_run(ratio_one, grads), sgd, 1e-13)

        for clips, adapts, foreach in itertools.product((False, True), repeat=3):
            more = {"trust_clip": clips, "always_adapt": adapts, "foreach": foreach, "eps": OPTIONS["eps"]}
            lars = torch_run(
                lambda t, more={**common, **more}: load_timm_lars()(decay_groups(t), **more), params, grads
            )
            oracle = make_oracle(
                "torch_lars", params, nesterov=nesterov, larc_clip=clips, adapt_without_decay=adapts
            )
            compare(f"timm's Lars with {more}", oracle_run(oracle, grads), lars, 1e-12)


def torch_run(
    build: Callable[[dict[str, Any]], Any], params: Mapping[str, np.ndarray], grads: list[Grads]
) -> dict:
    """Run the optimizer that `build` returns for float64 torch copies; return the final values."""
    import torch

    tensors = {n: torch.nn.Parameter(torch.from_numpy(p.copy())) for n, p in params.items()}
    optimizer = build(tensors)
    for step in grads:
        for name, grad in step.items():
            tensors[name].grad = None if grad is None else torch.from_numpy(grad.copy())
        optimizer.step()
    return {n: p.detach().numpy() for n, p in tensors.items()}


def oracle_run(oracle: OracleLamb, grads: list[Grads]) -> dict[str, np.ndarray]:
    for step in grads:
        oracle.step(step)
    return oracle.params


def decay_groups(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    skipped = excluded(tensors, NO_DECAY)
    decayed = [p for n, p in tensors.items() if n not in skipped]
    return [
        {"params": decayed, "weight_decay": OPTIONS["weight_decay"]},
        {"params": [tensors[n] for n in sorted(skipped)], "weight_decay": 0.0},
    ]


def compare(
    peer: str, actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float
) -> None:
    for name, value in expected.items():
        gap = np.linalg.norm(np.ravel(actual[name] - value)) / max(np.linalg.norm(np.ravel(value)), 1e-300)
        if not gap <= tolerance:
            raise SystemExit(f"{peer}: {name} differs by {gap:.2e}, allowed {tolerance:.0e}")


def check_against_torch(params: dict[str, np.ndarray], grads: list[Any]) -> None:
    import torch

    adamw = torch_run(lambda t: torch.optim.AdamW(decay_groups(t), **COMMON), params, grads)
    compare("torch.optim.AdamW", oracle_run(make_oracle("adamw", params), grads), adamw, 1e-13)

    adam = torch_run(lambda t: torch.optim.Adam(list(t.values()), **COMMON), params, grads)
    ratio_one = make_oracle("lamb", params, weight_decay=0.0, no_adapt=set(params))
    compare("torch.optim.Adam", oracle_run(ratio_one, grads), adam, 1e-13)


def check_against_tf_reference(params: dict[str, np.ndarray], grads: list[Any]) -> None:
    """The pattern "$^" matches no name: the ratio applies to every variable. None: the reference's default."""
    patterns = list(NO_DECAY)
    actual = oracle_run(make_oracle("paper_v3", params), grads)
    compare("the TensorFlow reference", actual, tf_reference(params, grads, patterns, ["$^"]), 1e-13)

    actual = oracle_run(make_oracle("paper_v3", params, no_adapt=excluded(params, NO_DECAY)), grads)
    compare("the TensorFlow reference's default", actual, tf_reference(params, grads, patterns, None), 1e-13)


def check_against_timm(params: dict[str, np.ndarray], full: list[Any]) -> None:
    """Compare with every gradient present, since timm and apex count steps per group, not per gradient."""
    from tests.timm_peer import load_timm_lamb

    lamb = load_timm_lamb()
    everywhere = {"always_adapt": True, "max_grad_norm": None}
    cases: dict[str, dict[str, Any]] = {
        "timm": {},
        "apex": {},
        "nvlamb": {"always_adapt": True},
        "lamb": everywhere,
        "paper_v3": {**everywhere, "bias_correction": False},
    }
    for (variant, changes), foreach in itertools.product(cases.items(), (False, True)):
        build = functools.partial(build_timm, lamb, foreach=foreach, **changes)
        actual = oracle_run(make_oracle(variant, params), full)
        compare(f"timm as {variant}", actual, torch_run(build, params, full), 1e-12)


def build_timm(lamb: Any, tensors: Mapping[str, Any], **changes: Any) -> Any:
    return lamb(decay_groups(tensors), **COMMON, **changes)


def documents() -> dict[str, Any]:
    params, full = make_inputs()
    grads = with_missing(full)
    lists = [{n: None if g is None else g.tolist() for n, g in step.items()} for step in grads]
    inputs = {
        "options": OPTIONS,
        "exclude_from_weight_decay": NO_DECAY,
        "params": {n: p.tolist() for n, p in params.items()},
        "grads": lists,
    }
    return {"inputs": inputs, **{v: {"steps": expected(v, params, grads)} for v in VARIANT_FACTS}}


def same(a: Any, b: Any, path: str) -> None:
    """Equal structure, numbers equal to 1e-13: another libm may round a power differently."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, float) and isinstance(b, float):
        if not math.isclose(a, b, rel_tol=1e-13, abs_tol=1e-300):
            raise SystemExit(f"{path}: stored {a!r}, generated {b!r}")
    elif a != b:
        raise SystemExit(f"{path}: stored {a!r}, generated {b!r}")


def check_against_peers(may_skip: bool) -> None:
    params, full = make_inputs()
    check_against_torch(params, with_missing(full))
    check_against_tf_reference(params, with_missing(full))
    check_against_lans_reference(params, with_missing(full))
    check_against_lars_reference(params, with_missing(full))
    try:
        check_against_timm(params, full)
        check_lars_against_torch(params, with_missing(full))
    except pytest.skip.Exception as reason:
        if not may_skip:
            raise SystemExit(f"generating the vectors requires timm: {reason}") from None
        print(f"not compared with timm: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the stored files, write nothing")
    check = parser.parse_args().check
    check_against_peers(may_skip=check)
    for name, document in documents().items():
        path = HERE / f"{name}.json"
        if check:
            same(json.loads(path.read_text()), json.loads(json.dumps(document)), name)
        else:
            path.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    print("the stored vectors equal the generated ones" if check else f"wrote {len(VARIANT_FACTS) + 1} files")


if __name__ == "__main__":
    main()
