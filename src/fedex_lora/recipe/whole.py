"""The recipe as a whole, and what its blocks demand of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedex_lora.aggregation.asynchronous import Asynchronous
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.aggregation.scaffold import scaffold_problems
from fedex_lora.recipe.blocks import Blocks
from fedex_lora.recipe.differential import differential_problems
from fedex_lora.recipe.fusing import MOST_FUSED, fusable
from fedex_lora.recipe.part import Problem, did_you_mean
from fedex_lora.recipe.privacy import Privacy
from fedex_lora.recipe.secure import secure_problems


class Recipe(Blocks):
    """Everything that determines a run."""

    def with_engine(self, **values: Any) -> Recipe:
        """The same with its block `engine` naming these values."""
        return self.model_copy(update={"engine": self.engine.model_copy(update=values)})

    @property
    def fused(self) -> int:
        """How many clients train in one pass, at most; "auto" is one where more cannot."""
        if METHODS[self.method.name].pooled:
            return 1
        if self.engine.fuse != "auto":
            return min(self.engine.fuse, self.federation.sampled)
        if self.privacy.example_level is not None or any(self._unfusable()):
            return 1
        return min(MOST_FUSED, self.federation.sampled)

    @property
    def autocasts(self) -> bool:
        """Whether the Trainer trains, whose autocast bfloat16 is."""
        return self.privacy.example_level is None and self.engine.train is None

    def problems(self) -> Iterator[Problem]:
        yield from self._clients()
        yield from self._ranks()
        yield from self._engine()
        yield from self._fused()
        yield from self._combining()
        yield from self._inner()
        yield from self._own_pair()
        yield from self._sparse()
        yield from self._own_loop()
        yield from self._privacy()
        method = METHODS[self.method.name]
        if self.records.spectrum and (method.personal or method.trains == "all"):
            told = "no global model" if method.personal else "no adapted layers"
            yield "records.spectrum", f"{self.method.name} has {told}; leave it out"
        if self.task.lacks_labels and self.data.source is None:
            yield "task.labels", "missing; list all labels, in the order all clients agree on"
        if self.model.quantisation and METHODS[self.method.name].trains == "all":
            yield (
                "model.quantisation",
                f"{self.method.name} trains the base, so it stays unquantised",
            )

    def _clients(self) -> Iterator[Problem]:
        known = [name for name, _ in self.data.files()] or self.federation.names or []
        for name in self.data.validation:
            if known and name not in known:
                near = did_you_mean(name, known)
                yield f"data.validation.{name}", f"expected one of {', '.join(known)}{near}"
        if self.data.validation and self.evaluation.where == "server":
            yield "data.validation", "clients are not scored; set evaluation.where: clients or both"
        if self.data.clients is None:
            return
        if len(self.data.clients) != self.federation.clients:
            files = f"data.clients lists {len(self.data.clients)} files"
            yield "federation.clients", f"{self.federation.clients}, but {files}; leave it out"
        if "partition" in self.federation.model_fields_set:
            yield "federation.partition", "data.clients already says whose rows are whose"

    def _engine(self) -> Iterator[Problem]:
        method, fed = METHODS[self.method.name], self.federation
        half = [key for key in ("bf16", "fp16") if self.training.get(key)]
        if half and self.engine.precision != "float32":
            yield f"training.{half[0]}", "engine.precision says it already; leave one of them out"
        if self.engine.kind == "local":
            if fed.oversample > 1:
                yield "federation.oversample", "in one process nobody is late; use engine: flower"
            return
        if method.pooled or not method.exchanges:
            yield "engine.kind", f"{self.method.name} exchanges nothing; run it with engine: local"
        elif method.personal:
            yield from self._personal()
        if fed.failure_rate:
            yield "federation.failure_rate", "a rehearsal of failures is for engine: local"
        if fed.names is not None and self.data.clients is not None:
            yield "federation.names", "the files of data.clients give the names already"
        known = fed.names is not None or self.data.clients is not None
        if self.lora.ranks is not None and not known and self.engine.kind == "flower":
            yield "federation.names", "missing; lora.ranks belong to clients in the order of names"

    def _own_loop(self) -> Iterator[Problem]:
        """What a loop of one's own does not have of the Trainer."""
        if self.engine.train is None:
            return
        method, fed, why = METHODS[self.method.name], self.federation, "engine.train is a loop"
        if self.training:
            yield "training", f"{why} with arguments of its own; leave the block out"
        if self.engine.precision == "bfloat16":
            yield "engine.precision", f"{why} that chooses its precision; leave it out"
        if method.pooled or method.assignment.gradients or method.assignment.pruning is not None:
            yield "engine.train", f"{self.method.name} needs the Trainer; leave it out"
        for key, used in (("proximal", fed.proximal), ("scaffold", fed.scaffold)):
            if used:
                yield f"federation.{key}", f"{why}, to whose gradients nothing is added"
        if self.privacy.example_level is not None:
            yield "privacy.example_level", f"{why} that clips no row by itself; leave one out"

    def _personal(self) -> Iterator[Problem]:
        """What a server cannot do that lacks a part of every client's model."""
        why = f"{self.method.name} leaves a part of every model with its client"
        if self.evaluation.where != "clients":
            yield "evaluation.where", f"{why}; set it to clients"
        if self.records.save_updates:
            yield "records.save_updates", f"{why}; for engine: local"

    def _fused(self) -> Iterator[Problem]:
        if self.fused > 1:
            yield from self._unfusable()

    def _unfusable(self) -> Iterator[Problem]:
        """What cannot be had in one pass."""
        if self.engine.kind != "local":
            yield "engine.fuse", "clients are in processes of their own; it is for engine: local"
        if self.engine.train is not None:
            yield "engine.fuse", "engine.train trains one client at a time; leave one of them out"
        if METHODS[self.method.name].trains == "all":
            yield "engine.fuse", f"{self.method.name} trains the base, which fused clients share"
        if METHODS[self.method.name].trains == "inner":
            yield (
                "engine.fuse",
                f"{self.method.name} has a matrix between the factors; leave it out",
            )
        if METHODS[self.method.name].assignment.sparse(1):
            yield "engine.fuse", f"{self.method.name} begins with whole weights; leave it out"
        if "pair" in METHODS[self.method.name].assignment.own:
            yield "engine.fuse", f"{self.method.name} trains each client twice; leave it out"
        if not METHODS[self.method.name].shared_base:
            yield "engine.fuse", f"{self.method.name} has a base for each client; leave it out"
        if self.lora.ranks is not None:
            yield "engine.fuse", "needs equal ranks; leave it or lora.ranks out"
        if getattr(self.task, "packing", False):
            yield "engine.fuse", "clients' rows stand side by side; leave it or task.packing out"
        for name, value in self.training.items():
            if not fusable(name, value):
                yield f"training.{name}", f"{value!r} cannot be had with engine.fuse; leave one out"
        if self.method.chosen.assignment.pruning is not None:
            yield "method.options.decay", "fused clients keep one rank; set engine.fuse: 1"
        if self.federation.scaffold:
            yield "federation.scaffold", "fused clients train without it; set engine.fuse: 1"
        if self.federation.proximal:
            yield "federation.proximal", "fused clients train without it; set engine.fuse: 1"

    def _combining(self) -> Iterator[Problem]:
        method, fed = METHODS[self.method.name], self.federation
        for option, why in fed.combining.problems(method, fed.min_clients):
            yield f"federation.{option}", why
        if fed.asynchronous is not None:
            yield from self._asynchronous(Asynchronous(**fed.asynchronous.model_dump()))
        if fed.scaffold:
            for option, why in scaffold_problems(method, fed.combining):
                yield f"federation.{option}", f"{self.method.name}: {why}"
        pulls = {"federation.proximal": fed.proximal > 0, "federation.scaffold": fed.scaffold}
        pulls["method.options.decay"] = self.method.chosen.assignment.pruning is not None
        for key in (key for key, pulling in pulls.items() if pulling):
            if self.privacy.example_level is not None:
                told = "would be added to gradients that privacy.example_level clips row by row"
                yield key, f"{told}; leave one of them out"
            if self.training.get("fp16"):
                yield key, "training.fp16 scales gradients, and not this; use bf16"
        if fed.optimizer is not None:
            for option, why in fed.optimizer.problems(method, fed.server_learning_rate):
                yield f"federation.{option}", f"{self.method.name}: {why}"

    def _asynchronous(self, chosen: Asynchronous) -> Iterator[Problem]:
        method, fed = METHODS[self.method.name], self.federation
        for _, why in chosen.problems(method, fed.combining, fed.scaffold):
            yield "federation.asynchronous", f"{self.method.name}: {why}"
        if self.privacy != Privacy():
            told = "what is spent, or summed, is of the updates of one round"
            yield "federation.asynchronous", f"{told}; leave it or the privacy block out"
        if chosen.delay and self.engine.kind != "local":
            yield "federation.asynchronous.delay", "a rehearsal is for engine: local"

    def _inner(self) -> Iterator[Problem]:
        """What a method cannot do that trains a matrix between the factors."""
        name, method = self.method.name, METHODS[self.method.name]
        if method.trains != "inner":
            return
        least = min([self.lora.r, *self.lora.rank_pattern.values()])
        for what in self.method.chosen.assignment.misfits(least):
            option, _, why = what.partition(": ")
            if option in self.method.options:
                yield f"method.options.{option}", why
        if self.lora.init is not None:
            yield "lora.init", f"{name} makes its own factors; leave it out"
        if not method.assignment.gradients:
            if self.privacy.example_level is not None:
                told = "has no gradients by example; take a method that trains A and B"
                yield "method.name", f"the matrix that {name} has between the factors {told}"
            return
        if self.model.quantisation:
            yield (
                "model.quantisation",
                f"{name} begins with gradients of whole weights, which have none",
            )
        if self.privacy.example_level is not None:
            told = "which privacy.example_level does not hide"
            yield "method.name", f"{name} begins with gradients of whole weights, {told}"
        if self.records.save_updates:
            yield "records.save_updates", f"{name}'s first updates are gradients, no adapters"

    def _own_pair(self) -> Iterator[Problem]:
        """What a method cannot do whose clients train a pair of their own beside the shared one."""
        name = self.method.name
        if "pair" not in METHODS[name].assignment.own:
            return
        if self.privacy.example_level is not None:
            told = "which the account of privacy.example_level does not know"
            yield "method.name", f"{name} trains on every row twice a round, {told}"
        if self.records.save_updates:
            told = "an update is a part of its client's model alone"
            yield "records.save_updates", f"of {name} {told}; leave it out"

    def _sparse(self) -> Iterator[Problem]:
        """What a method cannot do whose first rounds train a sparse change of whole weights."""
        name, assignment = self.method.name, self.method.chosen.assignment
        if not assignment.sparse(1):
            return
        if assignment.sparse(self.federation.rounds + 1):
            told = (
                f"more than the {self.federation.rounds} of federation.rounds, so LoRA never begins"
            )
            yield "method.options.rounds", f"{told}; expected that many at most"
        if self.lora.init is not None:
            yield "lora.init", f"{name} makes its own factors; leave it out"
        if self.privacy.example_level is not None:
            told = "has no gradients by example; take a method that trains A and B"
            yield "method.name", f"the sparse change that {name} begins with {told}"
        if self.records.save_updates:
            yield "records.save_updates", f"{name}'s first updates are no adapters; leave it out"

    def _privacy(self) -> Iterator[Problem]:
        """What a run that is to be private cannot do."""
        yield from secure_problems(self)
        yield from differential_problems(self)

    def _ranks(self) -> Iterator[Problem]:
        if self.lora.ranks is None:
            return
        if not METHODS[self.method.name].ranks_may_differ:
            able = ", ".join(name for name, method in METHODS.items() if method.ranks_may_differ)
            yield "lora.ranks", f"{self.method.name} needs equal ranks; these do not: {able}"
        if self.lora.init is not None:
            yield "lora.ranks", "an adapter to start from (lora.init) has one rank for all clients"
        if len(self.lora.ranks) != self.federation.clients:
            count = f"{len(self.lora.ranks)} for {self.federation.clients} clients"
            yield "lora.ranks", f"expected one rank for each client, got {count}"
