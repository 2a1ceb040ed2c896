"""A plain torch module in place of a pretrained model: trained by a loop of one's own, exact."""

import copy

import pytest
import torch
from oracles import relative
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import mse_loss

import fedex_lora as fl

SIZES = {"ann": 6, "bob": 2, "cleo": 4}


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 1))


def lora(**options) -> LoraConfig:
    options = {"target_modules": ["0", "2"], "modules_to_save": ["3"], **options}
    return LoraConfig(r=2, lora_alpha=3, **options)


def rows(size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return list(torch.randn(size, 5, generator=generator))


CLIENTS = {name: rows(size) for name, size in SIZES.items()}


def train(module, rows, *, round, client, rng):
    loss = torch.zeros(())
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        x = rows[int(torch.randint(len(rows), (1,), generator=rng))]
        loss = mse_loss(module(x), torch.full((1,), float(SIZES[client])))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return fl.Trained({"loss": loss.item()})


@pytest.mark.parametrize("placement", ["fold", "side"])
def test_the_global_module_is_the_weighted_mean_of_the_clients(placement, tmp_path):
    """A round by hand in float64: of W0 + s·B·A where each client ended, and of the head."""
    model, ends = fl.Model(net(), lora(), placement=placement), {}

    def watched(module, rows, *, round, client, rng):
        told = train(module, rows, round=round, client=client, rng=rng)
        ends[client] = model.adapted.read()
        return told

    federation = fl.Federation(model, CLIENTS, "fedex", watched)
    assert next(federation.rounds(1)).metrics["ann"]["loss"] > 0
    shown, weights = federation.show(), {n: s / 12 for n, s in SIZES.items()}
    plain = net()
    for name in ("0", "2"):
        w = plain.get_submodule(name).weight.detach().double()
        for client, end in ends.items():
            f = end.layers[name]
            w += weights[client] * 1.5 * f.B.double() @ f.A.double()
        plain.get_submodule(name).weight.data = w.float()
    head = {n: sum(weights[c] * e.head[n] for c, e in ends.items()) for n in ends["ann"].head}
    plain[3].load_state_dict({n.removeprefix("3."): t for n, t in head.items()})
    x = torch.stack(rows(9))
    with torch.no_grad():
        assert relative(shown(x), plain(x)) < 1e-6
    federation.save_adapter(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(net(), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert relative(reloaded(x), plain(x)) < 1e-6


def test_it_goes_on_from_what_was_saved(tmp_path):
    def made(way=train):
        return fl.Model(net(), lora()), CLIENTS, "fedex", way

    whole = fl.Federation(*made())
    list(whole.rounds(2))
    first = fl.Federation(*made(), flush=False)
    list(first.rounds(1))
    first.save(tmp_path)
    again = fl.Federation.resume(tmp_path, *made(), flush=False)
    list(again.rounds(1))
    x = torch.stack(rows(9))
    with torch.no_grad():
        assert torch.equal(whole.show()(x), again.show()(x))


def test_all_parameters_of_a_module(tmp_path):
    federation = fl.Federation(fl.Model(net(), None), CLIENTS, "full", train)
    list(federation.rounds(1))
    assert len(federation.state.head) == 6 and not federation.state.factors


def test_what_does_not_go_is_said(tmp_path):
    model = fl.Model(net(), lora())
    odd = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2))
    for text, call in {
        "expected a torch.nn.Module, got str": lambda: fl.Model("gpt2", lora()),  # type: ignore[arg-type]
        "is adapted by PEFT already": lambda: fl.Model(get_peft_model(net(), lora()), lora()),
        "It has these layers: 0, 2, 3": lambda: fl.Model(net(), lora(target_modules=["query"])),
        "expected fold or side": lambda: fl.Model(net(), lora(), placement="top"),
        "only Linear, Conv1D and Embedding": lambda: fl.Model(odd, lora(modules_to_save=None)),
        "running statistics": lambda: fl.Model(nn.Sequential(nn.BatchNorm1d(3)), None),
        "give a function": lambda: fl.Federation(model, CLIENTS),
        "bob: expected rows, got list": lambda: fl.Federation(model, {"bob": []}, train=train),
        "are a list": lambda: fl.Federation(model, CLIENTS, "centralized", train),
        "the module that `show` gives": lambda: fl.Federation(
            copy.copy(model), CLIENTS, train=train
        ).evaluate(CLIENTS["ann"]),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(fl.UserError, match=text):
            call()
