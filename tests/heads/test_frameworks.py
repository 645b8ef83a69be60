"""Networks of timm, torchvision and transformers: adapted, saved, loaded; or refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

import fast


def timm_model(name, **options):
    timm = pytest.importorskip("timm", reason="timm's networks")
    return lambda n: timm.create_model(name, num_classes=n, **options)


def torchvision_model(name, **options):
    models = pytest.importorskip("torchvision.models", reason="torchvision's networks")
    return lambda n: models.get_model(name, num_classes=n, **options)


def transformers_model(name, config, **options):
    library = pytest.importorskip("transformers", reason="transformers' networks")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = size | {"intermediate_size": 64} | options
    return lambda n: getattr(library, name)(getattr(library, config)(num_labels=n, **options))


def images(size, n=8):
    return torch.randn(n, 3, size, size)


TEXT = {
    "input_ids": torch.randint(5, 90, (8, 7)),
    "attention_mask": torch.ones(8, 7, dtype=torch.int64),
}
VISION = {"image_size": 32, "patch_size": 16}
slow = pytest.mark.slow
NETWORKS = [
    (timm_model, ["resnet10t"], {}, images(64)),
    (timm_model, ["vit_tiny_patch16_224"], {"img_size": 32}, images(32)),
    (timm_model, ["mobilenetv3_small_100"], {}, images(64)),
    pytest.param(timm_model, ["convnext_atto"], {}, images(64), marks=slow),
    pytest.param(timm_model, ["nfnet_l0"], {}, images(64), marks=slow),
    pytest.param(
        timm_model,
        ["swin_tiny_patch4_window7_224"],
        {"img_size": 64, "window_size": 2},
        images(64),
        marks=slow,
    ),
    (
        transformers_model,
        ["BertForSequenceClassification", "BertConfig"],
        {"vocab_size": 100},
        TEXT,
    ),
    (
        transformers_model,
        ["ViTForImageClassification", "ViTConfig"],
        VISION,
        {"pixel_values": images(32)},
    ),
    (
        transformers_model,
        ["ResNetForImageClassification", "ResNetConfig"],
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        {"pixel_values": images(32)},
    ),
]


def rows(x, n):
    return {k: v[:n] for k, v in x.items()} if isinstance(x, dict) else x[:n]


def adapted(model, x, **options):
    y = torch.arange(8) % 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the run diverged")  # random weights
        return fast.finetune(model, (x, y), steps=2, source_inputs=rows(x, 4), **options)


@pytest.mark.parametrize(
    ("library", "name", "options", "x"), NETWORKS, ids=lambda v: v[0] if type(v) is list else ""
)
def test_what_is_saved_loads_into_the_plain_network(library, name, options, x, tmp_path):
    make = library(*name, **options)
    result = adapted(make(6), x)
    result.save(tmp_path)
    plain = make(3).eval()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        answers = fast.heads.forward_logits(result.model, x)
        assert torch.allclose(fast.heads.forward_logits(plain, x), answers, rtol=1e-3, atol=1e-4)
    assert result.notes == []


def test_a_network_of_the_same_configuration_is_left_alone(tmp_path):
    """Adapting one model changed the classes of another that was made of the same object."""
    transformers = pytest.importorskip("transformers", reason="transformers' networks")
    names = {0: "neg", 1: "none", 2: "some", 3: "pos"}
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=names,
    )
    first, second, third = (transformers.BertForSequenceClassification(config) for _ in range(3))
    result = adapted(first, TEXT)
    assert first.config.num_labels == 3
    assert first.bert.encoder.layer[0].attention.self.config is first.config
    result.save(tmp_path)
    fast.load(tmp_path, third)
    assert third.config.num_labels == 3
    assert second.config is config
    assert config.id2label == names
    with fast.source_task(first):
        assert first.config.id2label == names


def test_a_network_in_a_module_of_ones_own_is_told_its_classes():
    """Only the outermost module was, so that the own loss of the network failed."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            make = transformers_model("BertForSequenceClassification", "BertConfig", vocab_size=100)
            self.network = make(4)

        def forward(self, **inputs):
            return self.network(**inputs).logits

    model = Wrapper()
    adapted(model, TEXT)
    network, labels = model.network, torch.arange(8)
    assert (network.num_labels, network.config.num_labels) == (3, 3)
    assert network(**TEXT, labels=labels % 3).loss.isfinite()
    with fast.source_task(model):
        assert len(network.config.id2label) == 4
        assert network(**TEXT, labels=labels % 4).loss.isfinite()


REFUSED = [
    (
        timm_model,
        ["deit_tiny_distilled_patch16_224"],
        {"img_size": 32},
        images(32),
        "head, head_dist",
    ),
    pytest.param(
        timm_model, ["levit_128s"], {}, images(224), r"head\.linear, head_dist\.linear", marks=slow
    ),
    (
        transformers_model,
        ["DeiTForImageClassificationWithTeacher", "DeiTConfig"],
        VISION,
        {"pixel_values": images(32)},
        "cls_classifier, distillation_classifier",
    ),
]


@pytest.mark.parametrize(("library", "name", "options", "x", "heads"), REFUSED)
@pytest.mark.parametrize("num_classes", [6, 3])
def test_two_heads_are_named(library, name, options, x, heads, num_classes):
    model = library(*name, **options)(6)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=f"two heads .*{heads} make them together"):
        adapted(model, x, num_classes=num_classes)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("head", ["head", "head_dist"])
def test_two_heads_of_a_distilled_network_are_refused_without_a_sample(head):
    model = timm_model("deit_tiny_distilled_patch16_224", img_size=32)(6)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="has two heads, head, head_dist, which make the logits"):
        fast.replace_head(model, 3, head=head)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_backbone_of_timm_gets_a_head_of_its_own(name):
    backbone = timm_model(name, **({"img_size": 32} if "vit" in name else {}))(0)
    x = images(32)
    with pytest.raises(ValueError, match=r"no head .num_classes=0."):
        adapted(backbone, x)
    model = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.num_features, 6))
    assert adapted(model, x).model(x).shape == (8, 3)


def test_the_head_of_squeezenet_starts_at_random():
    make = torchvision_model("squeezenet1_1")
    with pytest.raises(ValueError, match=r"a ReLU .*max_entropy=False"):
        adapted(make(6), images(64))
    adapted(make(6), images(64), max_entropy=False)


@pytest.mark.slow
def test_the_auxiliary_heads_of_googlenet_are_noted():
    model = torchvision_model("googlenet", init_weights=False)(6)
    assert adapted(model, images(64)).notes[0].startswith("aux1.fc2, aux2.fc2: auxiliary heads")


def test_the_bias_that_gpt2_lacks_is_noted():
    model = transformers_model(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=100,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )(6)
    assert adapted(model, TEXT).notes[0].startswith("score has a bias")


def test_an_adapter_on_the_head_is_named():
    peft = pytest.importorskip("peft", reason="adapters")

    def network():
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)
        )

    x = images(2)
    for classes in (6, 3):
        model = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["1", "3"]))
        with pytest.raises(ValueError, match=r"an adapter adds to .*merge_and_unload"):
            adapted(model, x, num_classes=classes)
    merged = model.merge_and_unload().requires_grad_(True)
    assert adapted(merged, x).model(x).shape == (8, 3)
    saved = peft.LoraConfig(target_modules=["1"], modules_to_save=["3"])
    assert adapted(peft.get_peft_model(network(), saved), x).model(x).shape == (8, 3)


@pytest.mark.parametrize("name", ["VisionTransformer", "MNASNet"])
def test_adapters_of_torchvision_are_saved_and_loaded(name, tmp_path):
    """Its attention reads weights of layers that it does not call, and MNASNet asks a state for its
    version."""
    pytest.importorskip("peft", reason="adapters are its layers")
    models = pytest.importorskip("torchvision.models", reason="torchvision's networks")
    sizes = (0.5,) if name == "MNASNet" else (32, 8, 2, 2, 16, 32)
    torch.manual_seed(0)
    model, x = getattr(models, name)(*sizes, num_classes=6).eval(), images(32)
    head = model.classifier[1] if name == "MNASNet" else model.heads.head
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():
        before = model(x)
    result = fast.finetune(model, (x, torch.arange(8) % 3), steps=2, method="adapter")
    attention = [n for n in fast.heads.adapters(model) if "self_attention" in n]
    assert len(attention) == (0 if name == "MNASNet" else 4)
    result.save(tmp_path)
    loaded = fast.load(tmp_path, getattr(models, name)(*sizes, num_classes=6))
    for network in (model, loaded.model):
        with fast.source_task(network), torch.no_grad():
            assert torch.equal(network(x), before)
    answers = result.predict(x).logits
    torch.testing.assert_close(loaded.predict(x).logits, answers, rtol=1e-3, atol=1e-4)
