"""What libraries and networks declare of their input is what is done: the same pixels."""

import numpy as np
import pytest
import torch
from torch import nn

from fast.data.images.preprocessing import Preprocessing, declared, from_config, from_preset
from fast.models.load import load_model

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")


def photo(width=300, height=200):
    noise = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def check(says, expected, channels=3):
    ours = says.format("BGR" if says.bgr else channels).prepare(photo())
    assert ours.shape == expected.shape
    assert (ours - expected).abs().mean() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1", "convnext_tiny", "swin_t"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    check(from_preset(preset, "torchvision"), preset(photo()))


@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.875, "interpolation": "bilinear"},
        {"crop_pct": 0.95, "interpolation": "bicubic"},
        {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "squash"},
        {"crop_pct": 1.0, "interpolation": "lanczos"},
    ],
)
def test_timm(config):
    timm = pytest.importorskip("timm.data", reason="timm is not installed")
    whole = {"input_size": (3, 64, 64), "mean": (0.4,) * 3, "std": (0.2,) * 3, **config}
    check(from_config(whole, "timm"), timm.create_transform(**whole)(photo()))


PROCESSORS = [
    ("ViTImageProcessor", {}),
    ("ViTImageProcessor", {"do_normalize": False}),
    ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
    (
        "ViTImageProcessor",
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    ("DeiTImageProcessor", {}),
    ("CLIPImageProcessor", {}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("EfficientNetImageProcessor", {}),
    ("LevitImageProcessor", {}),
    (
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}},
    ),
]


@pytest.mark.parametrize(("name", "options"), PROCESSORS)
def test_transformers(name, options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torchvision", reason="image processors need torchvision")
    from fast.data.images.processor import measure

    processor = getattr(transformers, name)(**options)
    check(measure(processor), processor(photo(), return_tensors="pt")["pixel_values"][0])


class Odd:
    """A processor that does what cannot be had here."""

    def __init__(self, function):
        self.function, self.resample = function, 2

    def __call__(self, images, return_tensors):
        arrays = [torch.from_numpy(np.array(image)).movedim(-1, 0) / 255 for image in images]
        return {"pixel_values": self.function(torch.stack(arrays))}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: 1 - x[..., :300], "mixes or inverts the colours"),
        (lambda x: x.roll(1, 1)[..., :300], "mixes or inverts the colours"),
        (lambda x: x[..., :200], "gives pictures of 200x300, which are not square"),
        (lambda x: x[..., :300].square(), "pads pictures, or crops"),
        (lambda x: x[..., :100, :100], "gives other pixels than here"),
        (lambda x: nn.functional.pad(x[..., ::2, ::2], (0, 0, 25, 25)), "pads pictures, or crops"),
        (lambda x: x[:, None], "does not make one picture"),
    ],
)
def test_processors_that_do_other_things_are_refused(function, message):
    from fast.data.images.processor import measure

    with pytest.raises(ValueError, match=f"Odd {message}.*in Python, and call fast.finetune"):
        measure(Odd(function))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    "attributes",
    [
        {"mean": IMAGENET[0], "std": IMAGENET[1]},
        {"pretrained_cfg": {"mean": IMAGENET[0], "std": IMAGENET[1]}},
        {
            "default_cfg": type("Config", (), {})(),
            "preprocessing": dict(zip(("mean", "std"), IMAGENET, strict=True)),
        },
    ],
)
def test_a_network_of_a_file_may_say_it_itself(attributes):
    network = nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(network, name, value)
    says = declared(network)
    assert (says.mean, says.std) == IMAGENET
    assert says.origin.startswith("the network's ")


def test_buffers_are_of_a_network_that_normalises_by_itself():
    network = nn.Linear(2, 2)
    for name in ("mean", "std"):
        network.register_buffer(name, torch.ones(3))
    assert declared(network) == Preprocessing()


@pytest.mark.parametrize("spec", ["timm:resnet_18", "torchvision:resnet_18"])
def test_names_that_are_almost_right(spec):
    pytest.importorskip(spec.split(":")[0], reason="the library is not installed")
    pytest.importorskip("torchvision", reason="timm needs torchvision")
    with pytest.raises(ValueError, match="did you mean resnet18"):
        load_model(spec)


@pytest.mark.parametrize(
    "spec", ["timm:resnet10t(pretrained=False)", "torchvision:squeezenet1_1(weights=None)"]
)
def test_pretrained_may_be_refused(spec):
    pytest.importorskip(spec.split(":")[0], reason="the library is not installed")
    pytest.importorskip("torchvision", reason="timm needs torchvision")
    assert any("without pretrained weights" in note for note in load_model(spec).notes)


def test_without_a_hub_the_way_out_is_named_at_once(monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("torchvision", reason="timm needs torchvision")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"model timm:resnet10t: .*--weights FILE"):
        load_model("timm:resnet10t")


def test_half_precision_is_trained_in_full(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef net(): return nn.Linear(3, 2).bfloat16()\n"
    )
    loaded = load_model(f"{tmp_path}/nets.py:net")
    assert loaded.model.weight.dtype == torch.float32
    assert "weights in bfloat16 are trained in float32" in loaded.notes
