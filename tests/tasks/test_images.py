"""Images: a Vision Transformer federated on real digits, and rows that are no good."""

import json
from collections import Counter

import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Dataset, Image
from sklearn.datasets import load_digits
from small_runs import oracle
from tiny import tiny

from fedex_lora.data.digits import LABELS, digits
from fedex_lora.data.load import load
from fedex_lora.engines.setup import set_up
from fedex_lora.errors import UserError
from fedex_lora.recipe import DataSpec, Recipe, task_spec
from fedex_lora.runs.export import export_model
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import build_task

CATS = ("cat", "dog")
TASK = build_task(task_spec(kind="image-classification", labels=list(CATS)))
DIGITS = build_task(task_spec(kind="image-classification"), LABELS)
PLAIN = transformers.AutoModelForImageClassification
# random features of which a linear head makes something at once
SIZE = {"image_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny("vit", tmp_path_factory.mktemp("vit") / "model", **SIZE)


def recipe(model, **blocks):
    raw = {
        "name": "digits",
        "model": {"name": str(model)},
        "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        "federation": {"clients": 3, "rounds": 2, "partition": {"kind": "dirichlet", "alpha": 2.0}},
        "task": {"kind": "image-classification"},
        "data": {"source": "digits", "train_examples": 600},
        "training": {"learning_rate": 2e-2, "per_device_train_batch_size": 16},
        "records": {"save_updates": True},
    }
    for name, block in blocks.items():
        raw[name] = {**raw.get(name, {}), **block}
    raw["training"].setdefault("num_train_epochs", 1)
    return Recipe.model_validate(raw)


@pytest.fixture(scope="module", params=["fedex", "fedit"])
def run(request, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    return out, start_run(recipe(model, method={"name": request.param}), out)


def picture(path, seed=0):
    """A seeded image of 9 × 7 pixels, written to `path`."""
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Image().encode_example(pixels)["bytes"])
    return path


def processed(model, rows):
    """Pixels as plain transformers makes them."""
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    return processor([i.convert("RGB") for i in rows["image"]], return_tensors="pt")


def logits(module, inputs):
    module.eval()
    with torch.no_grad():
        return module(**inputs).logits


def test_digits_are_scikit_learn_s_with_30_of_each_held_out_twice():
    parts, (pixels, labels) = digits(), load_digits(return_X_y=True)
    for split in ("validation", "test"):
        assert Counter(parts[split]["label"]) == dict.fromkeys(range(10), 30)
    every = Counter(label for rows in parts.values() for label in rows["label"])
    assert every == Counter(labels.tolist())
    last = parts["test"][-1]
    assert last["label"] == labels[-1]
    assert np.abs(np.asarray(last["image"]).ravel() / 255 - pixels[-1] / 16).max() < 0.003


def test_a_federated_vit_reads_digits(run):
    out, results = run
    assert results["last"]["scores"]["test"]["accuracy"] > 0.4  # by chance 0.1
    first, last = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert last["scores"]["validation"]["loss"] < first["scores"]["validation"]["loss"]


def test_the_exported_model_is_the_mean_of_the_clients_where_the_method_is_exact(run, tmp_path):
    out, results = run
    trained = open_run(out, "last")
    export_model(trained, tmp_path / "model")
    plain = PLAIN.from_pretrained(tmp_path / "model")
    errors = []
    for site, change in oracle(out).items():
        ideal = trained.model.pretrained(site).double() + change
        errors.append((plain.get_submodule(site).weight - ideal).norm() / change.norm())
    assert len(errors) == 2
    assert max(errors) < 1e-5 if results["method"] == "fedex" else min(errors) > 1e-3


def test_exports_give_the_run_s_logits_with_plain_transformers_and_peft(run, model, tmp_path):
    out, _ = run
    trained, rows = open_run(out), digits()["test"].select(range(0, 300, 40))
    export_model(trained, tmp_path / "model")
    trained.show()
    expected = logits(trained.model.module, processed(model, rows))
    merged = PLAIN.from_pretrained(tmp_path / "model")
    base = PLAIN.from_pretrained(model, num_labels=10)
    adapted = peft.PeftModel.from_pretrained(base, out / "final" / "adapter")
    for module in (merged, adapted):
        assert torch.allclose(logits(module, processed(model, rows)), expected, atol=1e-5)
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "model"))
    found = [pipe(image, top_k=1)[0]["label"] for image in rows["image"]]
    assert found == [LABELS[i] for i in expected.argmax(dim=1)]


def test_folders_paths_and_encoded_images_are_the_same_rows(model, tmp_path):
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    files = [picture(tmp_path / "f" / "train" / c / f"{i}.png", i) for i, c in enumerate(CATS)]
    names = [{"image": str(f.relative_to(tmp_path)), "label": f.parent.name} for f in files]
    bytes_ = [{"image": f.read_bytes(), "label": CATS.index(f.parent.name)} for f in files]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(n) + "\n" for n in names))
    (tmp_path / "p").mkdir()
    Dataset.from_list(bytes_).to_parquet(tmp_path / "p" / "train.parquet")
    batches = []
    for folder in (tmp_path / "f", tmp_path, tmp_path / "p"):
        data = load(DataSpec(path=folder), TASK, 0)
        encoded = TASK.encode(data.train, processor, 0)
        batches.append(TASK.collator(processor)([encoded[i] for i in range(len(encoded))]))
    first, *others = batches
    assert first["labels"].tolist() == [0, 1] and first["pixel_values"].shape == (2, 3, 8, 8)
    assert not torch.equal(*first["pixel_values"])
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)


def test_a_client_s_folder_may_lack_classes(tmp_path):
    picture(tmp_path / "ann" / "cat" / "1.png")
    picture(tmp_path / "bob" / "dog" / "2.png")
    data = load(DataSpec(clients=[tmp_path / "ann", tmp_path / "bob"]), TASK, 0)
    assert {n: rows["label"][:] for n, rows in data.clients.items()} == {
        "ann": ["cat"],
        "bob": ["dog"],
    }


BAD = {
    "a broken image": (
        {"image": "note.png", "label": "cat"},
        r"line 2: image .*/note.png is no im",
    ),
    "half an image": ({"image": "half.png", "label": "cat"}, r"line 2: image .*/half.png is no im"),
    "no such file": (
        {"image": "gone.png", "label": "cat"},
        r"line 2: image .*/gone.png: no such f",
    ),
    "an address": ({"image": "https://a.b/c.png", "label": "cat"}, "line 2: .*no such file"),
    "no image": ({"image": None, "label": "cat"}, "line 2: image is missing"),
    "no label": ({"image": "1.png", "label": None}, "line 2: label is None; expected one of cat"),
    "an unknown class": ({"image": "1.png", "label": "owl"}, "line 2: label is 'owl'; expected"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_row_is_named_by_file_and_line(what, tmp_path):
    row, message = BAD[what]
    picture(tmp_path / "1.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "1.png").read_bytes()[:100])
    (tmp_path / "note.png").write_text("no image")
    rows = [{"image": "1.png", "label": "cat"}, row]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=rf"train\.jsonl, {message}"):
        load(DataSpec(path=tmp_path), TASK, 0)


def test_a_broken_image_in_a_folder_is_named_by_its_path(tmp_path):
    picture(tmp_path / "train" / "cat" / "1.png")
    (tmp_path / "train" / "cat" / "2.png").write_text("no image")
    with pytest.raises(UserError, match=r"image .*/train/cat/2\.png is no image that can be read"):
        load(DataSpec(path=tmp_path), TASK, 0)


def test_folders_and_columns_without_images_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train: no images can be read there"):
        load(DataSpec(path=tmp_path), TASK, 0)
    (tmp_path / "train").rmdir()
    (tmp_path / "train.jsonl").write_text('{"image": 3, "label": "cat"}\n')
    with pytest.raises(UserError, match="column 'image' holds neither paths of images nor"):
        load(DataSpec(path=tmp_path), TASK, 0)
    (tmp_path / "train.jsonl").write_text('{"picture": "1.png", "label": "cat"}\n')
    with pytest.raises(UserError, match="no column 'image'; there are: picture, label"):
        load(DataSpec(path=tmp_path), TASK, 0)


def test_a_processor_that_does_not_go_with_the_model_is_refused(tmp_path):
    tiny("vit", tmp_path / "m", **SIZE)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"image processor makes: Input image size \(32\*32\)"):
        set_up(recipe(tmp_path / "m"))
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded as .* preprocessor_config\.json"):
        set_up(recipe(tmp_path / "m"))


def test_running_statistics_are_refused(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    transformers.ConvNextImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="normalises batches by running statistics"):
        set_up(recipe(tmp_path))


def test_lengths_belong_to_texts(model):
    with pytest.raises(ValueError, match=r"max_length.*does not use it"):
        recipe(model, task={"max_length": 64})
    with pytest.raises(UserError, match=r"training: ValueError: .*lengths"):
        set_up(recipe(model, training={"train_sampling_strategy": "group_by_length"}))
