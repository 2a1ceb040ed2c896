"""A client's account of its data file, on its own disk, across runs.

Whatever a coordinator asks, no turn begins before it stands here, and none does that would bring
the file above the budget that the client's operator set. A file is known by its path and by its
bytes: one that was moved, or has more rows by now, is still the same. Turns whose result never
arrived count like others.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedex_lora.disk import write_atomic
from fedex_lora.engines.private.account import Steps, added, as_json, epsilon, from_json
from fedex_lora.errors import StorageError, UserError


@dataclass(frozen=True)
class OwnAccount:
    """What was spent on one data file.

    Attributes:
        path: Of the account.
        names: By which the data file is known.
        run: The run that is trained in now.
        delta: δ of that run.
        budget: ε of that run, by its recipe.
        most: ε of the data file over all runs, by this client's operator.
    """

    path: Path
    names: tuple[str, ...]
    run: str
    delta: float
    budget: float | None = None
    most: float | None = None

    def spend(self, client: str, new: Steps) -> float:
        """Takes down a turn that is about to begin.

        Returns:
            ε of the run with it.

        Raises:
            UserError: It would be above the run's budget or the file's; nothing is taken down.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            entry, others = self._entry()
            delta = min(self.delta, entry["delta"])
            mine = added(from_json(entry["runs"].get(self.run, [])), new)
            entry = {
                "names": sorted({*entry["names"], *self.names}),
                "delta": delta,
                "runs": {**entry["runs"], self.run: as_json(mine)},
            }
            total, of_run = epsilon(_all(entry), delta), epsilon(mine, self.delta)
            if self.budget is not None and of_run > self.budget:
                raise UserError(
                    f"{client}: another turn would bring this run to ε = {of_run:.4g}; its budget "
                    f"is {self.budget:g} (privacy.example_level.epsilon)"
                )
            if self.most is not None and total > self.most:
                raise UserError(
                    f"{client}: another turn would bring its rows to ε = {total:.4g} over all "
                    f"runs; its operator allows {self.most:g} (`epsilon`)"
                )
            write_atomic(self.path, json.dumps([*others, entry]).encode())
            self.path.chmod(0o600)
            return of_run

    def total(self) -> float:
        """ε of the data file so far, over all runs."""
        entry, _ = self._entry()
        return epsilon(_all(entry), min(self.delta, entry["delta"]))

    def _entry(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What is known of the file under any of its names, as one; and of other files."""
        known = self._read()
        mine = [e for e in known if set(e["names"]) & set(self.names)]
        found: dict[str, Any] = {"names": [], "delta": 1.0, "runs": {}}
        for entry in mine:
            found["names"] += entry["names"]
            found["delta"] = min(found["delta"], entry["delta"])
            for run, steps in entry["runs"].items():
                spent = from_json(found["runs"].get(run, []))
                for part in from_json(steps):
                    spent = added(spent, part)
                found["runs"][run] = as_json(spent)
        return found, [e for e in known if e not in mine]

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            known = json.loads(self.path.read_text())
            for entry in known:
                if not (0 < entry["delta"] <= 1 and all(type(n) is str for n in entry["names"])):
                    raise ValueError("of another form")
                for steps in entry["runs"].values():
                    from_json(steps)
            return known
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise StorageError(
                f"{self.path}: damaged; it says what was spent on this client's rows, and without "
                "it nothing more is. Restore it from a copy"
            ) from None


def _all(entry: dict[str, Any]) -> list[Steps]:
    found: tuple[Steps, ...] = ()
    for steps in entry["runs"].values():
        for part in from_json(steps):
            found = added(found, part)
    return list(found)


def names_of(file: Path | None, data: str) -> tuple[str, ...]:
    """By which a client's rows are known.

    Args:
        file: They lie there; or in the recipe's own data, if None.
        data: The recipe's block `data`, as text.
    """
    if file is None:
        return (f"data {hashlib.sha256(data.encode()).hexdigest()}",)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return f"path {file.resolve()}", f"sha256 {digest}"
