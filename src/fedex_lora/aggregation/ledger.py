"""The ledger: one shared, versioned list of increments to the pretrained weights.

Every base is a pure function of the pretrained weights and the ledger, base = W0 + T_v − own,
where T_v is the float32 left fold of the increments in version order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedex_lora.aggregation.delta import Delta, concat

Increment = Mapping[str, Delta]


@dataclass(frozen=True)
class Ledger:
    """Increments by version (the round that made them), oldest first; values are never changed.

    Attributes:
        entries: (version, increment by layer), ascending versions.
        snapshot: T at `snapshot_version` by layer, in place of the entries up to it.
        snapshot_version: 0 where there is no snapshot or it is part of the start.

    Example:
        >>> one = {"q": Delta(torch.ones(2, 1), torch.ones(1, 3))}
        >>> ledger = Ledger().append(1, one).append(2, one)
        >>> ledger.total("q")[0, 0].item(), len(ledger.since(1).entries)
        (2.0, 1)
        >>> torch.equal(ledger.compacted(1).total("q"), ledger.total("q"))
        True
    """

    entries: tuple[tuple[int, Increment], ...] = ()
    snapshot: Increment = field(default_factory=dict)
    snapshot_version: int = 0

    def append(self, version: int, increment: Increment) -> Ledger:
        """The ledger with one more entry; an empty increment leaves it as it is."""
        assert version > self.version, f"version {version} does not follow {self.version}"
        if not increment:
            return self
        return Ledger((*self.entries, (version, increment)), self.snapshot, self.snapshot_version)

    @property
    def version(self) -> int:
        """The newest version that changed anything."""
        return self.entries[-1][0] if self.entries else self.snapshot_version

    def newest(self) -> Increment:
        """The newest increment; the snapshot where there is nothing else."""
        return self.entries[-1][1] if self.entries else self.snapshot

    def layers(self) -> list[str]:
        """Names of all layers that have an increment, sorted."""
        return sorted(set(self.snapshot).union(*(inc for _, inc in self.entries)))

    def since(self, version: int) -> Ledger:
        """What somebody who holds `version` lacks: newer entries, or all and the snapshot."""
        if version >= self.snapshot_version:
            return Ledger(tuple(e for e in self.entries if e[0] > version), {}, version)
        return self

    def until(self, version: int) -> Ledger:
        """This ledger as it was at a version that is no older than its snapshot."""
        assert version >= self.snapshot_version
        entries = tuple(e for e in self.entries if e[0] <= version)
        return Ledger(entries, self.snapshot, self.snapshot_version)

    def extended(self, part: Ledger, version: int | None = None) -> Ledger:
        """This ledger brought up to date by `part`, as `since` gave it.

        Args:
            version: If given, everything is compacted as the server did on the way there, so that
                both have one form and thus the same bits in every sum.
        """
        if part.snapshot:
            return part
        new = {v: increment for v, increment in part.entries if v > self.version}
        if version is None:
            return Ledger((*self.entries, *new.items()), self.snapshot, self.snapshot_version)
        ledger = self
        for v in range(self.version + 1, version + 1):
            ledger = ledger.append(v, new.get(v, {})).compact_if_smaller(v - 1)
        return ledger

    def total(self, layer: str, version: int | None = None) -> Tensor | None:
        """T_v of one layer, dense float32 (out × in); None where nothing was added.

        The left fold ((0 + Δ₁) + Δ₂) + …, in version order: the same bits for everybody.
        """
        total = None
        if layer in self.snapshot:
            total = self.snapshot[layer].dense().clone()
        for v, increment in self.entries:
            if layer in increment and (version is None or v <= version):
                total = _add(total, increment[layer])
        return total

    def factored(self, layer: str) -> Delta | None:
        """T of one layer as concatenated factors while those are smaller, else dense."""
        parts = [self.snapshot[layer]] if layer in self.snapshot else []
        parts += [inc[layer] for _, inc in self.entries if layer in inc]
        if not parts:
            return None
        if all(part.right is not None for part in parts):
            out, inp = parts[0].shape
            if sum(part.numbers for part in parts) < out * inp:
                return concat(parts)
        total = self.total(layer)
        return None if total is None else Delta(total)

    def compacted(self, version: int) -> Ledger:
        """The entries up to `version` replaced by T there; later versions keep their bits."""
        if version <= self.snapshot_version:
            return self
        totals = {s: self.total(s, version) for s in self.layers()}
        return Ledger(
            tuple(e for e in self.entries if e[0] > version),
            {s: Delta(t) for s, t in totals.items() if t is not None},
            version,
        )

    def compact_if_smaller(self, version: int) -> Ledger:
        """Compacted at `version` if the snapshot takes fewer numbers than what it replaces."""
        old = [inc for v, inc in self.entries if v <= version]
        shapes = {s: w.shape for inc in (self.snapshot, *old) for s, w in inc.items()}
        held = sum(w.numbers for inc in (self.snapshot, *old) for w in inc.values())
        new = sum(out * inp for out, inp in shapes.values())
        return self.compacted(version) if len(old) > 1 and new <= held else self


def _add(total: Tensor | None, w: Delta) -> Tensor:
    if total is None:
        total = torch.zeros(w.shape, dtype=torch.float32, device=w.left.device)
    if w.right is None:
        return total.add_(w.left)
    return total.addmm_(w.left.float(), w.right.float())
