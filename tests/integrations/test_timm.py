"""timm: the optimizers by name, layer decay, the training task, and what pixels networks see."""

from __future__ import annotations

import copy
import functools
import importlib
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fast
from fast.data.images.preprocessing import from_config
from fast.models.load import load_model

timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("timm.task", reason="this timm has no training tasks")
adapter = importlib.import_module("fast.integrations.timm")
Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")
create_optimizer = timm.optim.create_optimizer_v2

STEPS, BATCH = 6, 8
GENERATOR = torch.Generator().manual_seed(3)
LABELS = torch.arange(40) % 4
TRAIN = torch.randn(40, 3, 32, 32, generator=GENERATOR) + LABELS.view(-1, 1, 1, 1), LABELS
SOURCE = torch.randn(24, 3, 32, 32, generator=GENERATOR)


def network():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=5, drop_rate=0.1)


def vit():
    torch.manual_seed(1)
    return timm.create_model("test_vit", img_size=32, depth=3, num_classes=5)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("name", "ours", "options"),
    [
        ("anchoredadamw", fast.AdamW, {"betas": (0.8, 0.99)}),
        ("anchoredsgd", fast.SGD, {"momentum": 0.9}),
    ],
)
def test_an_optimizer_by_name_is_ours(name, ours, options):
    """The same steps as our class makes of the same groups; and the pull acts."""
    networks = [network() for _ in range(3)]
    options = {**options, "weight_decay": 0.05}
    optimizers = [
        create_optimizer(networks[0], name, lr=1e-2, anchor_decay=3.0, **options),
        ours(
            timm.optim.param_groups_weight_decay(networks[1], 0.05),
            lr=1e-2,
            anchor_decay=3.0,
            **options,
        ),
        create_optimizer(networks[2], name, lr=1e-2, **options),
    ]
    for model, optimizer in zip(networks, optimizers, strict=True):
        assert isinstance(optimizer, ours)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(TRAIN[0]), TRAIN[1]).backward()
            optimizer.step()
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])
    assert name in timm.optim.list_optimizers("anchored*")


def test_layer_decay_and_timms_scheduler():
    model = fast.replace_head(vit(), 4)
    optimizer = create_optimizer(
        model,
        "anchoredadamw",
        param_group_fn=functools.partial(
            fast.param_groups, lr=1e-3, anchor_decay=5.0, layer_decay=0.5, weight_decay=0.05
        ),
    )
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert groups["head"]["anchor_decay"] == 0
    assert groups["head"]["lr"] == pytest.approx(1e-2)
    # The layers are the embedding, three blocks and the final norm; the head comes after them.
    rates = {n: g["lr"] for n, g in groups.items() if n.endswith(("_0", "_1", "_2", "_3"))}
    assert rates["backbone_layer_3"] == pytest.approx(2 * rates["backbone_layer_2"])
    assert rates["backbone_layer_1"] == pytest.approx(2 * rates["backbone_layer_0"])
    from timm.scheduler import create_scheduler_v2

    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=10)
    scheduler.step(5)
    for name, rate in rates.items():
        assert groups[name]["lr"] == pytest.approx(rate / 2)


def test_a_head_of_zeros_is_not_anchored_in_silence():
    model = fast.replace_head(network(), 4)
    with pytest.raises(ValueError, match=r"\[4, 96\] is zero.*param_group_fn"):
        create_optimizer(model, "anchoredadamw", lr=1e-3, anchor_decay=5.0)
    with pytest.raises(ValueError, match=r"\[4, 96\] is zero"):
        create_optimizer(model, "anchoredsgd", lr=1e-3, anchor_decay=5.0, layer_decay=0.7)
    create_optimizer(model, "anchoredadamw", lr=1e-3)


def begin(**options):
    model = network()
    torch.manual_seed(0)
    adaptation = fast.Adaptation(
        model, TRAIN, source_inputs=SOURCE, steps=STEPS, batch_size=BATCH, **options
    )
    task = adapter.AdaptationTask(adaptation, F.cross_entropy, verbose=False)
    task.train()
    return task, adaptation, adaptation.scheduler()


def take(task, adaptation, scheduler, steps=STEPS):
    for (inputs, target, rows), _ in zip(adaptation.batches(), range(steps), strict=False):
        seen = task(inputs, target, rows)
        assert seen["loss"].item() == pytest.approx((seen["task_loss"] + seen["penalty"]).item())
        assert seen["output"].shape == (len(target), 4)
        seen["loss"].backward()
        adaptation.optimizer.step(), scheduler.step(), adaptation.optimizer.zero_grad()


def test_the_task_is_a_plain_loop_and_goes_on_to_the_bit():
    whole, adaptation, scheduler = begin()
    take(whole, adaptation, scheduler)

    plain, source = network(), SOURCE
    torch.manual_seed(0)
    loop = fast.Adaptation(plain, TRAIN, source_inputs=source, steps=STEPS, batch_size=BATCH)
    schedule = loop.scheduler()
    plain.train()
    for inputs, labels, rows in loop.batches():
        logits, penalty = loop.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        loop.optimizer.step(), schedule.step(), loop.optimizer.zero_grad()
    assert same(plain, whole.trainable_module)

    task, adaptation, scheduler = begin()
    take(task, adaptation, scheduler, 3)
    file = io.BytesIO()
    state = task.get_checkpoint_state()
    assert set(state) == {"state_dict", "task_state"}
    parts = (adaptation.optimizer, scheduler)
    torch.save([state, *(p.state_dict() for p in parts), torch.get_rng_state()], file)
    file.seek(0)
    state, *others, generator = torch.load(file, weights_only=True)
    task, adaptation, scheduler = begin(resuming=True)
    task.load_checkpoint_state(state["state_dict"], state["task_state"])
    for part, value in zip((adaptation.optimizer, scheduler), others, strict=True):
        part.load_state_dict(value)
    torch.set_rng_state(generator)
    assert adaptation.done == 3
    take(task, adaptation, scheduler)
    assert same(task.trainable_module, whole.trainable_module)
    with pytest.raises(ValueError, match="no task state"):
        task.load_checkpoint_state(state["state_dict"])


def test_soft_labels_and_an_average_of_timms_own():
    """Mixup changes inputs, so that no row is known; ModelEma copies a network that is watched."""
    adaptation = fast.Adaptation(
        network(), TRAIN, source_inputs=SOURCE, steps=3, batch_size=BATCH, augmented=True
    )
    criterion = timm.loss.SoftTargetCrossEntropy()
    task = adapter.AdaptationTask(adaptation, criterion, verbose=False)
    mixup = timm.data.Mixup(num_classes=4)
    average = task.setup_ema(decay=0.5)
    before = copy.deepcopy(average.module.state_dict())
    for inputs, target, _ in adaptation.batches():
        even = len(target) // 2 * 2
        task(*mixup(inputs[:even].clone(), target[:even]))["loss"].backward()
        adaptation.optimizer.step()
        adaptation.optimizer.zero_grad()
        task.update_ema(step=adaptation.done)
    assert adaptation.done == 3
    now = average.module.state_dict()
    assert any(not torch.equal(now[name], value) for name, value in before.items())


def photos():
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    sizes = ((301, 200), (400, 713))
    return [Image.fromarray(noise).resize(s, Image.Resampling.BICUBIC) for s in sizes]


def declared_forms():
    """Networks of timm, one for each way in which their pretrained weights say to make pixels."""
    forms = {}
    for name in timm.list_pretrained():
        config = timm.models.get_pretrained_cfg(name).to_dict()
        height, width = config["input_size"][-2:]
        keys = ("crop_pct", "crop_mode", "interpolation")
        if height == width <= 256 and config["crop_mode"] != "border" and config["crop_pct"] <= 1:
            forms.setdefault((width, *(config[key] for key in keys)), config)
    return forms


def test_pixels_are_those_of_timms_own_transform():
    """Crop and interpolation come from the network, to the bit."""
    forms = declared_forms()
    assert len(forms) > 20
    assert {form[2] for form in forms} == {"center", "squash"}
    assert {form[3] for form in forms} >= {"bicubic", "bilinear"}
    keys = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    for config in forms.values():
        transform = timm.data.create_transform(**{k: config[k] for k in keys}, normalize=False)
        form = from_config(config, "timm").format(3)
        for photo in photos():
            assert torch.equal(torch.from_numpy(form.fit(photo)), transform(photo)), config


def test_pixels_that_cannot_be_made_here_are_announced():
    """Three networks pad (crop_pct 1.15), others take rectangles."""
    notes = load_model("timm:volo_d1_224(pretrained=False)").notes
    assert not any("central square" in note for note in notes)
    cut = "volo_d1_224(pretrained=False, pretrained_cfg_overlay={'crop_pct': 1.15})"
    loaded = load_model(f"timm:{cut}")
    assert any("crop_pct 1.15)" in n and "the central square" in n for n in loaded.notes)
    assert loaded.preprocessing.format(3).resize == 224
