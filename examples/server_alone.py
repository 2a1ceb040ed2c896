"""The server alone in a framework of one's own: torch and values; here, clients by hand."""

import torch

import fedex_lora as fl

layers = {"q": fl.LayerShape(out=6, inp=5, rank=2, scale=4.0)}  # ΔW = scale · B · A
server = fl.Server("fedex", layers, ["ann", "bob", "cleo"])
rows = {"ann": 30, "bob": 10, "cleo": 20}
state, g, generator = server.init(), torch.zeros(6, 5).double(), torch.Generator().manual_seed(0)
for round in range(1, 4):
    for name, message in server.broadcast(state, rows).items():  # what each lacks, as tensors
        print(f"round {round}: to {name}: {sorted(message.tensors)}, {len(message.ledger.entries)}")
    updates, changed = {}, torch.zeros(6, 5).double()
    for name, count in rows.items():
        start = server.start(state, name)
        end = server.start(state, name)
        for factor in (end.layers["q"].A, end.layers["q"].B):  # training, of sorts
            factor += 0.1 * torch.randn(factor.shape, generator=generator)
        updates[name] = server.update(state, name, end, examples=count)
        moved = (
            end.layers["q"].delta().dense().double() - start.layers["q"].delta().dense().double()
        )
        changed += count / sum(rows.values()) * moved
    state, record = server.step(state, updates)
    g += changed  # what the global model has to be: the weighted mean of where clients ended
    total = state.ledger.total("q").double() + state.factors["q"].delta().dense().double()
    print(f"round {round}: deviation {record['deviation']:.3f}, error {(total - g).norm():.1e}")
    assert (total - g).norm() < 1e-5 * g.norm()
