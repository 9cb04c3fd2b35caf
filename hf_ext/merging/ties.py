"""TIES: trim small changes, elect a sign for each entry, average the changes that agree with it.

Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708,
section 4 and algorithm 1.

Differs from the paper and its code: exactly floor(density d) entries of a task vector are kept, those of
equal magnitude at the threshold in the order of tensor names and offsets (the code keeps one more, and all
equal ones). A sum of zero elects plus. Parents may have weights: they multiply the task vectors before the
election, and the mean divides by the weights of those that agree, so that the result is a convex
combination whatever the weights (mergekit's rule). compat="reference", "peft" or "mergekit" follow the
three implementations instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check
from ._base import Block, Models, TensorInfo, choice, register_merge, setting
from ._task_vectors import Election, TaskVectorMerge
from ._threshold import (
    count_equal,
    high_histogram,
    locate,
    low_bits,
    low_histogram,
    magnitude_bits,
    non_finite,
    threshold,
    trim_,
)

__all__ = ["Ties"]

_HIGH, _LOW, _EQUAL, _SIGNS = range(4)  # the passes
_REMEMBERED = 1 << 25  # bytes of lower bits that are kept to spare the pass that counts equal entries


@register_merge(
    "ties",
    summary="task vectors trimmed, their signs elected, and only what agrees averaged",
    paper="arXiv:2306.01708",
    supports={"one_parent", "symmetric", "zero_weight"},
    test_kwargs={"density": 0.5},
    bad_kwargs=(
        {"density": 0.0},
        {"density": 1.5},
        {"scope": "layer"},
        {"elect": "vote"},
        {"combine": "median"},
        {"compat": "other"},
        {"combine": "max", "normalize": True},
    ),
)
@dataclass(frozen=True, kw_only=True)
class Ties(TaskVectorMerge):
    """theta = theta_0 + lambda tau, tau the mean of the trimmed task vectors that have the elected sign.

    Args:
        density: Share of a task vector's entries that is kept, those of largest magnitude, in (0, 1].
        scope: What entries are ranked against: "global" for the whole model as in the paper, "tensor" for
            their own tensor; "auto" for global, and for tensor where adapters or slices are merged.
        elect: "mass" elects the sign of the weighted sum, "count" that of more entries.
        combine: "mean", "sum" or "max" of the entries that agree; mergekit's normalize true is mean, false
            sum.
        compat: "none", or the implementation whose rules to follow: "reference", "peft", "mergekit".
    """

    takes_slices = True
    density: float = setting(
        0.2, rule="above 0 and at most 1", fits=lambda x: 0.0 < x <= 1.0, per_parent=True
    )
    scope: str = choice("auto", ("auto", "global", "tensor"))
    elect: str = choice("mass", ("mass", "count"))
    combine: str = choice("mean", ("mean", "sum", "max"))
    compat: str = choice("none", ("none", "reference", "peft", "mergekit"))

    @classmethod
    def parse(cls, given: Mapping[str, object], where: str) -> dict[str, Any]:
        given = dict(given)
        if "normalize" in given:
            normalize = given.pop("normalize")
            check(isinstance(normalize, bool), "normalize", normalize, "true or false", where=where)
            combine = "mean" if normalize else "sum"
            rule = f"{combine!r}, as normalize says, or either left out"
            check(given.setdefault("combine", combine) == combine, "normalize", normalize, rule, where=where)
        return super().parse(given, where)

    def for_space(self, space: str) -> Ties:
        if self.scope != "auto":
            return self
        # A and B have different units: their entries cannot be ranked together.
        by_tensor = self.compat in ("peft", "mergekit") or (self.compat == "none" and space != "full")
        return replace(self, scope="tensor" if by_tensor else "global")

    def for_slices(self) -> Ties:
        # An entry's rank in a model says nothing once layers are left out or repeated.
        check(self.scope != "global", "scope", self.scope, "'tensor' with slices")
        return replace(self, scope="tensor")

    # Trimming -------------------------------------------------------------------------------------

    @property
    def local(self) -> bool:
        return self.scope == "tensor"

    @property
    def scans(self) -> int:
        return 4 if self.compat == "reference" else 3

    def check_models(self, models: Models) -> None:
        for tensor in models.tensors:
            weights: list[float] = tensor.values["weight"]
            check(any(weights), "weight", weights, "other than 0 for at least one model", where=tensor.name)
        if self.compat == "reference":
            check(self.scope == "global", "scope", self.scope, "'global' with compat 'reference'")
        if self.local or not models.tensors:
            return
        first: list[float] = models.tensors[0].values["density"]
        for tensor in models.tensors:
            rule = "the same for all tensors, which are ranked together; or set scope: tensor"
            check(
                tensor.values["density"] == first,
                "density",
                tensor.values["density"],
                rule,
                where=tensor.name,
            )
        entries = sum(tensor.numel for tensor in models.tensors)
        for density in first:
            check(
                self._kept(density, entries) >= 1,
                "density",
                density,
                f"enough to keep one of {entries} entries",
            )

    def _kept(self, density: float, entries: int) -> int:
        """Return how many entries stay, before those that equal the last one."""
        if self.compat == "reference":
            return int(entries * density) + 1
        kept = math.floor(density * entries + 1e-9)
        return max(1, kept) if self.local else kept

    def skips(self, number: int, states: Sequence[Any], blocks: int) -> bool:
        if number in (_HIGH, _SIGNS):
            return False
        if number == _LOW:
            return all(found is None for found in states[_HIGH])
        # Which of the equal entries stay must be known where not all do, and is mostly known by now.
        found = states[_LOW]
        cut = (one is not None and one[1] < one[2] for one in found["cuts"]) if found else ()
        return self.compat == "reference" or not any(cut) or found["before"] is not None

    def scan(self, number: int, block: Block) -> Any:
        if number == _SIGNS:
            self._trim(block)
            signs = torch.stack(block.operands).sum(dim=0).sign()
            return int(signs.sum(dtype=torch.int64))
        parts: list[Any] = []
        for index, (values, density) in enumerate(
            zip(block.operands, block.per_parent("density"), strict=True)
        ):
            if density >= 1.0 or not values.numel():
                parts.append(None)
                continue
            bits = magnitude_bits(values, out=block.buffer("bits", torch.int32))
            if number == _HIGH:
                counts = high_histogram(bits, scratch=bits)
                if non_finite(counts):
                    raise ValueError(
                        f"NaN or infinite values in {block.tensor.labels[index]}, or in the base"
                    )
                parts.append(counts)
            elif number == _LOW:
                parts.append(low_bits(bits, block.states[_HIGH][index][0]))
            else:
                parts.append(count_equal(bits, block.states[_LOW]["cuts"][index][0]))
        return parts

    def fold(self, number: int, total: Any, part: Any, block: Block) -> Any:
        if number == _SIGNS:
            return (total or 0) + part
        if number == _EQUAL:
            before, blocks = total or ([0] * len(part), {})
            here = [count or 0 for count in part]
            blocks[f"{block.tensor.index} {block.start}"] = [before, here]
            return [b + count for b, count in zip(before, here, strict=True)], blocks
        if number == _LOW:
            total = total or _LowBits(len(part))
            total.add(f"{block.tensor.index} {block.start}", part)
            return total
        if total is None:
            return part
        pairs = zip(total, part, strict=True)
        return [
            more if counts is None else counts if more is None else counts.add_(more)
            for counts, more in pairs
        ]

    def settle(self, number: int, total: Any, tensors: Sequence[TensorInfo], states: Sequence[Any]) -> Any:
        if number == _SIGNS:
            return total > 0
        if number == _EQUAL:
            return total[1]
        entries = sum(tensor.numel for tensor in tensors)
        densities: list[float] = tensors[0].values["density"]
        if number == _LOW:
            return None if total is None else total.settled(states[_HIGH])
        kept = [min(self._kept(density, entries), entries) for density in densities]
        counted = total or [None] * len(densities)
        return [None if c is None else list(locate(c, k)) for c, k in zip(counted, kept, strict=True)]

    def _trim(self, block: Block) -> None:
        cuts = block.states[_LOW]["cuts"] if block.states[_LOW] else None
        known = block.states[_LOW]["before"] if block.states[_LOW] else None
        known = known or block.states[_EQUAL]
        for index, values in enumerate(block.operands):
            if cuts is None or cuts[index] is None:
                continue
            bits, keep, equal = cuts[index]
            if keep == equal or self.compat == "reference":
                trim_(values, bits, None)
                continue
            counts = known[f"{block.tensor.index} {block.start}"]
            before, here = counts[0][index], counts[1][index]
            trim_(values, bits, None if before + here <= keep else max(0, keep - before))

    # Election -------------------------------------------------------------------------------------

    def map(self, block: Block) -> Tensor:
        self._trim(block)
        weights = block.per_parent("weight")
        positive = block.states[_SIGNS] if self.compat == "reference" else True
        rule = Election(
            elect=self.elect,
            combine=self.combine,
            weights_last=self.compat == "peft",
            zero_is_positive=positive,
        )
        return self.scaled(rule(block, block.operands, weights), block)


class _LowBits:
    """What the second pass finds: counts of the lower bits and, as far as memory allows, where they are."""

    def __init__(self, parents: int) -> None:
        self.counts: list[Tensor | None] = [None] * parents
        self.held: dict[str, list[Any]] | None = {}
        self.nbytes = 0

    def add(self, place: str, part: Sequence[Any]) -> None:
        for index, low in enumerate(part):
            if low is None:
                continue
            more, counts = low_histogram(low), self.counts[index]
            self.counts[index] = more if counts is None else counts.add_(more)
            self.nbytes += low.nbytes
        if self.nbytes > _REMEMBERED:
            self.held = None
        if self.held is not None:
            self.held[place] = list(part)

    def settled(self, highs: Sequence[Any]) -> dict[str, Any]:
        """Return where each parent is cut, and how many equal entries lie before each block and in it.

        A cut is the threshold's bits, how many of the entries equal to it stay, and how many there are.
        """
        cuts: list[list[int] | None] = []
        for counts, high in zip(self.counts, highs, strict=True):
            found = None if counts is None else threshold(high[0], high[1], counts)
            cuts.append(None if found is None else [found.bits, found.keep_equal, found.equal])
        if self.held is None:
            return {"cuts": cuts, "before": None}
        before, seen = {}, [0] * len(cuts)
        for place, part in self.held.items():
            pairs = zip(part, cuts, strict=True)
            here = [
                0 if low is None or cut is None else int((low == cut[0] & 0xFFFF).sum()) for low, cut in pairs
            ]
            before[place] = [seen, here]
            seen = [one + more for one, more in zip(seen, here, strict=True)]
        return {"cuts": cuts, "before": before}
