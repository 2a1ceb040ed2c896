"""Merging three adapters against PEFT's `add_weighted_adapter`, in memory."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.results import Figure, Row
from benchmarks.timing import in_turn, ratio, timed
from fedex_lora.merge.factors import Term, merge_factors

SIZE, RANK, WEIGHTS = 4096, 32, [0.5, 0.3, 0.2]
NAMES = ["first", "second", "third"]


class _Layers(nn.Module):
    """Square linear layers, one after the other."""

    def __init__(self, layers: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))


def adapted(layers: int, size: int, rank: int) -> Any:
    """A model with three adapters of random factors."""
    net, config = _Layers(layers, size), LoraConfig(r=rank, target_modules=r"layers\.\d+")
    peft: Any = get_peft_model(net, config, adapter_name=NAMES[0])  # type: ignore[arg-type]
    for name in NAMES[1:]:
        peft.add_adapter(name, config)
    g = torch.Generator().manual_seed(0)
    for module in peft.modules():
        if hasattr(module, "lora_A"):
            for name in NAMES:
                for factor in (module.lora_A[name].weight, module.lora_B[name].weight):
                    factor.data.copy_(torch.randn(factor.shape, generator=g))
    return peft


def terms(peft: Any) -> list[list[Term]]:
    """The adapters' (A, B, scale), layer by layer."""
    layers = [m for m in peft.modules() if hasattr(m, "lora_A")]
    return [
        [(m.lora_A[n].weight.data, m.lora_B[n].weight.data, m.scaling[n]) for n in NAMES]
        for m in layers
    ]


def theirs(peft: Any, kind: str, **options: Any) -> None:
    """PEFT's merge of the three into an adapter "merged", in place of the one before."""
    if "merged" in peft.peft_config:
        peft.delete_adapter("merged")
    peft.add_weighted_adapter(NAMES, WEIGHTS, "merged", combination_type=kind, **options)


def product(peft: Any, layer: int = 0) -> Tensor:
    """ΔW of PEFT's merged adapter, in float64."""
    module = [m for m in peft.modules() if hasattr(m, "lora_A")][layer]
    a, b = (getattr(module, f"lora_{x}")["merged"].weight.data.double() for x in "AB")
    return module.scaling["merged"] * b @ a


def row(layers: int = 8, size: int = SIZE, rank: int = RANK, repeats: int = 9) -> Row:
    """Exact and rank-limited merges, with what PEFT makes of the same adapters."""
    many, one = adapted(layers, size, rank), adapted(1, size, rank)
    ours_many, (ours_one,) = terms(many), terms(one)
    times = in_turn(
        {
            "exact": lambda: [merge_factors(t, WEIGHTS) for t in ours_many],
            "PEFT cat": lambda: theirs(many, "cat"),
            "cut to the rank": lambda: merge_factors(ours_one, WEIGHTS, rank),
        },
        repeats,
    )
    exact = sum(w * s * b.double() @ a.double() for w, (a, b, s) in zip(WEIGHTS, ours_one))
    size_of_it = torch.linalg.norm(exact)
    own = _relative(merge_factors(ours_one, WEIGHTS).dense(), exact)
    theirs(one, "cat")
    cat = _relative(product(one), exact)
    cut = merge_factors(ours_one, WEIGHTS, rank).dense().double()
    svd = timed(lambda: theirs(one, "svd", svd_rank=rank, svd_full_matrices=False))
    misses = [(torch.linalg.norm(w - exact) / size_of_it).item() for w in (cut, product(one))]
    quick = times["cut to the rank"]
    return Row(
        f"Merge of three rank-{rank} adapters, {size} × {size} layers, disk excluded",
        [
            Figure(f"cut to rank {rank}, against PEFT svd", svd / quick.median, "×", None, 1000),
            Figure(
                "exact, time over that of PEFT cat",
                *_times_longer(times["exact"], times["PEFT cat"]),
                at_most=3,
            ),
            Figure("exact, a layer", times["exact"].median / layers, "s", times["exact"].spread),
            Figure("cat, a layer", times["PEFT cat"].median / layers, "s"),
            Figure("cut, a layer", quick.median, "s", quick.spread),
            Figure("PEFT svd (svd_full_matrices=False), a layer", svd, "s"),
            Figure("exact: relative error", own, "", at_most=1e-6),
            Figure("PEFT cat: relative error", cat, ""),
            Figure(
                "cut: error over that of PEFT svd, less 1",
                misses[0] / misses[1] - 1,
                "",
                at_most=1e-6,
            ),
        ],
        [
            f"Exact and cat: {layers} layers in turn; PEFT svd: one layer, once. Exact includes "
            "finding the numerical rank, which cat does not look for.",
        ],
    )


def _times_longer(a: Any, b: Any) -> tuple[float, str, float | None]:
    value, spread = ratio(a, b)
    return value, "×", spread


def _relative(got: Tensor, exact: Tensor | int) -> float:
    return (
        torch.linalg.norm(got.double() - exact) / torch.linalg.norm(torch.as_tensor(exact))
    ).item()
