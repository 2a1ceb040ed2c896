"""The adapted model against a plain model whose weights were set by hand."""

import gc

import pytest
import torch
from adapted import CASES, Case, assert_equal, batch, increments, logits, oracle, path, random_state
from tiny import tiny
from transformers import BertModel

from fedex_lora.aggregation.adapter import AdapterState, Factors, fresh
from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import UserError
from fedex_lora.model.adapted import load_model
from fedex_lora.recipe import ModelSpec

__all__ = ["path"]
NAMES = list(CASES)
HALF = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
PLACEMENTS = pytest.mark.parametrize("placement", ["fold", "side"])


@pytest.fixture(params=NAMES)
def case(request) -> Case:
    return CASES[request.param]


@HALF
@pytest.mark.parametrize("rank", [None, 5])
def test_read_returns_what_was_written(case, path, dtype, rank):
    model = case.load(path(case.kind), dtype=dtype)
    state = random_state(model, rank=rank)
    model.write(state)
    read = model.read()
    assert_equal(read, state)
    assert {f.A.dtype for f in read.layers.values()} == {torch.float32}
    model.write(random_state(model, seed=5))  # what was read is a copy
    assert_equal(read, state)


@PLACEMENTS
@pytest.mark.parametrize("rank", [None, 2])
def test_logits_equal_those_of_the_dense_model(case, path, placement, rank):
    model = case.load(path(case.kind), placement=placement)
    state, added = random_state(model, rank=rank), increments(model)
    model.place(increments(model, seed=9).get)  # replaced by the next
    model.write(state)
    model.place(added.get)
    inputs = batch(model)
    expected = logits(oracle(case, path(case.kind), state, added), inputs)
    assert torch.allclose(logits(model.module, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert-embedding", "gpt2", "gemma2"])
@PLACEMENTS
def test_bf16_logits_are_near_those_of_the_dense_model(name, path, placement):
    case = CASES[name]
    model = case.load(path(case.kind), placement=placement, dtype="bfloat16")
    state, added = random_state(model), increments(model)
    model.write(state)
    model.place(added.get)
    inputs = batch(model)
    expected = logits(oracle(case, path(case.kind), state, added), inputs)
    error = (logits(model.module, inputs) - expected).norm() / expected.norm()
    assert error < 0.05


@HALF
def test_no_increment_is_the_pretrained_weight_bit_for_bit(case, path, dtype):
    model = case.load(path(case.kind), dtype=dtype)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    model.place(lambda name: Delta(torch.ones(model.layers[name].out, model.layers[name].inp)))
    changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == len(model.layers)
    model.place(lambda name: None)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama-embedding"])
def test_after_50_placements_bf16_is_one_rounding_of_the_exact_sum(name, path):
    case = CASES[name]
    model = case.load(path(case.kind), dtype="bfloat16")
    total = {n: torch.zeros(s.out, s.inp) for n, s in model.layers.items()}
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        total = {n: t + 1e-4 * torch.randn(t.shape, generator=g) for n, t in total.items()}
        model.place(lambda name: Delta(total[name]))  # noqa: B023
    for name in model.layers:
        exact = (model.pretrained(name) + total[name]).bfloat16()
        plain = model.module.get_base_model().get_submodule(name).base_layer.weight
        assert torch.equal(plain if plain.shape == exact.shape else plain.T, exact)


def test_fold_and_side_agree_in_training_mode_with_dropout(case, path):
    results = []
    for placement in ("fold", "side"):
        model = case.load(path(case.kind), lora={"lora_dropout": 0.3}, placement=placement)
        model.write(random_state(model))
        model.place(increments(model).get)
        model.freeze(frozenset("AB"))
        model.module.train()
        torch.manual_seed(3)
        out = model.module(**batch(model)).logits
        out.square().mean().backward()
        grads = [p.grad for p in model.module.parameters() if p.requires_grad]
        results.append((out.detach(), grads))
    (fold, fold_grads), (side, side_grads) = results
    assert torch.allclose(fold, side, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(fold_grads, side_grads))
    assert any(g.abs().sum() > 0 for g in fold_grads)


def test_the_side_path_is_no_parameter_and_is_not_read(path):
    case = CASES["gpt2"]
    model = case.load(path("gpt2"), placement="side")
    before = model.read(), set(model.module.state_dict()), len(list(model.module.parameters()))
    inputs = batch(model)
    start = logits(model.module, inputs)
    model.place(increments(model).get)
    assert not torch.allclose(logits(model.module, inputs), start)
    assert_equal(model.read(), before[0])
    assert set(model.module.state_dict()) == before[1]
    assert len(list(model.module.parameters())) == before[2]
    model.place(lambda name: None)
    assert torch.equal(logits(model.module, inputs), start)


@pytest.mark.parametrize("trained", ["AB", "A", "B", ""])
@pytest.mark.parametrize("name", ["roberta", "bert-embedding", "gpt2-lm"])
def test_a_step_changes_only_what_is_trained(name, path, trained):
    case = CASES[name]
    model = case.load(path(case.kind))
    model.freeze(frozenset(trained))
    model.write(random_state(model, rank=2))  # frozen factors stay frozen at another rank
    weights = {n: p.clone() for n, p in model.module.named_parameters()}
    before = model.read()
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    inputs = batch(model)
    loss = model.module(**inputs).logits.square().mean()
    if parameters:
        loss.backward()
        torch.optim.SGD(parameters, lr=1.0).step()
    after = model.read()
    for site in model.layers:
        assert torch.equal(before.layers[site].A, after.layers[site].A) == ("A" not in trained)
        assert torch.equal(before.layers[site].B, after.layers[site].B) == ("B" not in trained)
    assert all(not torch.equal(t, after.head[n]) for n, t in before.head.items())
    frozen = {n for n in weights if "lora_" not in n and "modules_to_save" not in n}
    assert all(torch.equal(model.module.get_parameter(n), weights[n]) for n in frozen)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_works_with_a_frozen_base(path, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = CASES["roberta"].load(path("roberta"), placement="side")
        model.write(random_state(model))
        model.place(increments(model).get)
        model.freeze(frozenset("AB"))
        if checkpointing:
            model.module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.module.train()
        torch.manual_seed(0)
        model.module(**batch(model)).logits.square().mean().backward()
        grads.append([p.grad for p in model.module.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_sites_have_the_shapes_of_out_by_in_and_pefts_scale(path):
    gpt2 = CASES["gpt2-lm"].load(path("gpt2")).layers
    assert list(gpt2) == sorted(gpt2)
    attention = gpt2["transformer.h.0.attn.c_attn"]
    assert (attention.out, attention.inp, attention.rslora) == (48, 16, True)
    assert attention.scale == pytest.approx(5 / 3**0.5)
    llama = CASES["llama"].load(path("llama")).layers
    key, down = llama["model.layers.1.self_attn.k_proj"], llama["model.layers.1.mlp.down_proj"]
    assert (key.rank, key.scale, key.fixed_rank) == (2, 5 / 2, True)
    assert (down.rank, down.scale, down.fixed_rank) == (3, 7 / 3, False)
    assert (key.out, key.inp) == (8, 16)
    embedding = CASES["bert-embedding"].load(path("bert")).layers["bert.embeddings.word_embeddings"]
    assert (embedding.out, embedding.std) == (16, 1.0)
    assert embedding.inp > 256


def test_the_start_depends_on_the_seed_alone(path):
    case = CASES["roberta"]

    def start(seed, noise):
        torch.manual_seed(noise)
        expected = torch.random.get_rng_state()
        model = case.load(path("roberta"), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), expected)
        return model, model.initial(seed)

    model, first = start(0, 1)
    assert_equal(first, start(0, 2)[1])
    other = start(1, 1)[1]
    assert not torch.equal(
        first.head["classifier.dense.weight"], other.head["classifier.dense.weight"]
    )
    assert_equal(first, AdapterState(fresh(model.layers, 0, 0), first.head))
    assert set(first.head) == {
        f"classifier.{layer}.{kind}"
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }


def test_a_head_part_that_the_checkpoint_lacks_is_trained(tmp_path):
    # a masked language model's checkpoint has no pooler; left frozen it would stay random
    bare = tiny("bert", tmp_path / "bare")
    BertModel.from_pretrained(bare, add_pooling_layer=False).save_pretrained(bare)
    model = CASES["bert-embedding"].load(bare)
    assert "bert.pooler.dense.weight" in model.read().head


def tensors_alive():
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]


@HALF
def test_one_copy_of_the_base_is_resident(path, dtype):
    before = tensors_alive()  # of other tests
    model = CASES["gemma2"].load(path("gemma2"), dtype=dtype)
    model.write(random_state(model))
    added = increments(model)
    model.place(added.get)
    inner = [t for w in added.values() if w is not None for t in w.parts.values()]
    known = [*model.module.state_dict().values(), *(t for t in inner if t is not None)]
    pointers = {t.data_ptr() for t in known}
    shapes = {
        s for site in model.layers.values() for s in [(site.out, site.inp), (site.inp, site.out)]
    }
    known_before = {t.data_ptr() for t in before}
    strays = [t for t in tensors_alive() if t.data_ptr() not in pointers | known_before]
    assert not [t for t in strays if tuple(t.shape) in shapes]
    plain = sum(p.numel() for n, p in model.module.named_parameters() if "lora_" not in n)
    assert plain == sum(t.numel() for t in model.merged(model.read(), added.get).parameters())


def test_what_is_pretrained_is_read_in_float32_whatever_the_dtype(path):
    exact = CASES["gpt2"].load(path("gpt2"))
    rounded = CASES["gpt2"].load(path("gpt2"), dtype="bfloat16")
    for name in exact.layers:
        w = rounded.pretrained(name)
        assert w.dtype == torch.float32
        assert torch.equal(w, exact.pretrained(name))
        assert not torch.equal(w, w.bfloat16().float())
        w.zero_()  # a fresh tensor, not the file
        assert torch.equal(rounded.pretrained(name), exact.pretrained(name))


def test_full_fine_tuning_has_no_sites_and_trains_everything(path):
    model = load_model(
        ModelSpec(name=str(path("gpt2")), device="cpu"), None, seed=0, **CASES["gpt2-lm"].task
    )
    state = random_state(model)
    assert not model.layers
    assert not state.layers
    assert "lm_head.weight" not in state.head  # tied: once only
    model.write(state)
    assert_equal(model.read(), state)
    model.freeze(frozenset())
    assert all(p.requires_grad for p in model.module.parameters())
    model.place(lambda name: None)
    inputs = batch(model)
    changed = {n: t + 0.1 for n, t in state.head.items()}
    expected = model.merged(AdapterState({}, changed), lambda name: None)
    model.write(AdapterState({}, changed))
    assert torch.allclose(logits(model.module, inputs), logits(expected, inputs), atol=1e-5)


def test_the_head_of_a_bf16_model_is_trained_in_float32(path):
    model = CASES["roberta"].load(path("roberta"), dtype="bfloat16")
    model.freeze(frozenset())
    heads = [p for p in model.module.parameters() if p.requires_grad]
    assert {p.dtype for p in heads} == {torch.float32}
    before = model.read().head
    model.module(**batch(model)).logits.float().square().mean().backward()
    torch.optim.SGD(heads, lr=1e-5).step()  # lost in bfloat16
    after = model.read().head
    assert all(not torch.equal(t, after[n]) for n, t in before.items())


def test_a_state_of_another_model_is_refused(path):
    model = CASES["roberta"].load(path("roberta"))
    state = random_state(model)
    name = next(iter(model.layers))
    with pytest.raises(UserError, match="of another model"):
        model.write(AdapterState({}, state.head))
    with pytest.raises(UserError, match="of another model"):
        model.write(AdapterState(state.layers, {}))
    wrong = Factors(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    with pytest.raises(UserError, match=r"do not fit; expected A \(r, 16\)"):
        model.write(AdapterState({**state.layers, name: wrong}, state.head))
    head = {n: t.flatten() for n, t in state.head.items()}
    with pytest.raises(UserError, match="does not fit; expected"):
        model.write(AdapterState(state.layers, head))


def test_training_needs_no_cache_and_padding_is_known(path):
    model = CASES["llama"].load(path("llama"))
    config = model.module.config
    assert config.use_cache is False
    assert config.pad_token_id == model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
    assert model.device == torch.device("cpu")


def test_gaussian_initialisation_is_passed_on(path):
    model = CASES["gpt2"].load(path("gpt2"), lora={"init_lora_weights": "gaussian"})
    assert {s.std for s in model.layers.values()} == {1 / 3}
