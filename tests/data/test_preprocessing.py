"""What libraries and networks declare of their input is what is done: the same pixels."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fast.data.images.format import ImageFormat, evaluation_transform
from fast.data.images.pixels import prepare_images
from fast.data.images.preprocessing import Preprocessing, declared, from_preset
from fast.data.sources import EncodedImages, Split
from fast.models.load import load_model

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")


def photo(width=300, height=200):
    noise = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def check(says, expected, channels=3):
    ours = says.format("BGR" if says.bgr else channels).prepare(photo())
    assert ours.shape == expected.shape
    assert (ours - expected).abs().mean() < 1e-3 * expected.abs().max()


TIMM = {
    "resnet10t": {},  # crop_pct 0.875, bicubic
    "test_vit": {"pretrained_cfg_overlay": {"crop_pct": 0.9, "interpolation": "bilinear"}},
    "test_resnet": {"pretrained_cfg_overlay": {"crop_mode": "squash", "crop_pct": 0.95}},
    "test_efficientnet": {"pretrained_cfg_overlay": {"mean": (0.0,) * 3, "std": (1.0,) * 3}},
    "test_byobnet": {"pretrained_cfg_overlay": {"crop_mode": "border", "crop_pct": 1.0}},
}
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


def as_in_a_run(says, picture, channels=3):
    """What a saved run makes of a picture: through JSON, as its description is kept."""
    saved = json.loads(json.dumps(says.format("BGR" if says.bgr else channels).description))
    return evaluation_transform(saved)(picture)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1", "convnext_tiny", "swin_t"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    says = from_preset(preset, "torchvision")
    expected = preset(photo())
    assert torch.equal(as_in_a_run(says, photo()), expected)
    assert torch.equal(as_in_a_run(replace(says, library=None), photo()), expected)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm.data", reason="timm is not installed")
    options = {"pretrained": False, **TIMM[name]}
    arguments = ", ".join(f"{k}={v!r}" for k, v in options.items())
    loaded = load_model(f"timm:{name}({arguments})")
    expected = timm.create_transform(**timm.resolve_data_config({}, model=loaded.model))(photo())
    assert torch.equal(as_in_a_run(loaded.preprocessing, photo()), expected)
    if TIMM[name].get("pretrained_cfg_overlay", {}).get("crop_mode") != "border":
        ours = as_in_a_run(replace(loaded.preprocessing, library=None), photo())
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("name", "options"), PROCESSORS)
def test_transformers(name, options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torchvision", reason="image processors need torchvision")
    from fast.data.images.processor import measure

    processor = getattr(transformers, name)(**options)
    says = measure(processor)
    expected = processor(photo(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(as_in_a_run(says, photo()), expected)
    # Resizing by other code differs by a few levels of 255 at single pixels.
    check(replace(says, library=None), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos", "box"])
@pytest.mark.parametrize("stretch", [False, True])
def test_a_network_of_a_file_gets_the_pixels_of_torchvision(interpolation, stretch):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    form = ImageFormat(
        size=48, resize=57, stretch=stretch, interpolation=interpolation, mean=(0.4,), std=(0.3,)
    )
    side = (57, 57) if stretch else 57
    steps = [
        v2.Resize(side, v2.InterpolationMode(interpolation)),
        v2.CenterCrop(48),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.4] * 3, [0.3] * 3),
    ]
    levels = v2.Compose([*steps[:2], v2.PILToTensor()])(photo())
    assert torch.equal(torch.from_numpy(form.fit(photo())), levels)
    # Here v2 multiplies by 1 / 255, where the presets of torchvision divide.
    ours, theirs = evaluation_transform(form.description)(photo()), v2.Compose(steps)(photo())
    torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor), rtol=0, atol=1e-6)


def test_a_large_photo_is_not_shrunk_while_it_is_decoded(tmp_path):
    """The decoder could, for other pixels."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    file = str(tmp_path / "large.jpg")
    photo(2000, 1500).save(file)
    form = from_preset(preset, "torchvision").format(3)
    images = EncodedImages(names=[file], open=lambda i: file)
    x, _ = prepare_images(Split(inputs=images, labels=np.zeros(1, int)), form)
    with Image.open(file) as picture:
        assert torch.equal(x[0], preset(picture.convert("RGB")))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"size": 8, "library": {"library": "os"}}, "names the library 'os'"),
        ({"mean": 3}, "the preprocessing cannot be read"),
        (
            {"library": {"library": "transformers", "processor": {"image_processor_type": "Path"}}},
            "has no image processor 'Path'",
        ),
    ],
)
def test_a_damaged_description(description, message):
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(ValueError, match=message):
        evaluation_transform(description)


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
