"""Source cards: what they measure, that they belong to one network, and that a file is whole."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fast
from fast.curvature import fisher_diagonal
from fast.curvature.card.calibrate import fit
from networks import ConvNet, TextNet, images, sentences

X, Y = images(120, 5, seed=3)
OPTIONS = {"num_samples": 60}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = ConvNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def card(model):
    return fast.SourceCard.estimate(model, X, **OPTIONS)


def backbone(model):
    return {n: p for n, p in model.named_parameters() if not n.startswith("decide")}


def test_diagonal_is_the_fisher_diagonal_of_the_backbone(model):
    data = (X[:60], Y[:60])
    card = fast.SourceCard.estimate(model, data, labels="data", temperature=1.0, **OPTIONS)
    truth = fisher_diagonal(model, F.cross_entropy, data, labels="data")
    assert list(card.entries) == list(backbone(model))
    for name, value in card.diagonal().items():
        # Codes are a quarter of an octave apart, down to 2^-30 of the largest of their block.
        assert torch.allclose(value, truth[name], rtol=1 / 8, atol=1e-9 * float(truth[name].max()))
    loss = F.cross_entropy(model(X[:60]), Y[:60])
    assert card.source_loss == pytest.approx(float(loss.detach()), rel=1e-5)


def test_every_form_of_data_gives_the_same_card(model):
    x, y = X[:60], Y[:60]
    card = fast.SourceCard.estimate(model, x, **OPTIONS)
    forms = [
        (x, y),
        TensorDataset(x, y),
        TensorDataset(x),
        DataLoader(TensorDataset(x, y), batch_size=25),
        [x[:30], X[30:]],
    ]
    for data in forms:
        other = fast.SourceCard.estimate(model, data, **OPTIONS)
        assert other.num_samples == 60
        for name, value in other.diagonal().items():
            assert torch.allclose(value, card.diagonal()[name], rtol=1e-3)


def test_mapping_inputs():
    inputs, labels = sentences(40, 5)
    for data in (inputs, (inputs, labels), inputs | {"labels": labels}):
        card = fast.SourceCard.estimate(TextNet().eval(), data, **OPTIONS)
        assert card.num_samples == 40
        assert card.mean > 0


def test_estimating_leaves_the_model_as_it_was(model):
    net = copy.deepcopy(model).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    fast.SourceCard.estimate(net, X, **OPTIONS)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_a_replaced_head_changes_nothing(model, card):
    net = fast.replace_head(copy.deepcopy(model), 3, sample=X[:20])
    other = fast.SourceCard.estimate(net, X, **OPTIONS)
    assert list(other.entries) == list(card.entries)
    for name, value in other.diagonal().items():
        assert torch.equal(value, card.diagonal()[name])


def test_forecast_follows_the_rise_along_a_step_of_adam(model, card):
    """Within the spread that the card itself states, and a factor of 3 for other labels."""
    net = copy.deepcopy(model)
    bound = card.bind(net)
    params = list(backbone(net).values())
    assert bound.forecast(params) == 0.0
    labels = torch.randint(5, (60,), generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad(F.cross_entropy(net(X[:60]), labels), params)
    before = net(X[60:]).log_softmax(1).detach()
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p -= 2e-3 * g.sign()
    rise = F.kl_div(net(X[60:]).log_softmax(1), before, log_target=True, reduction="batchmean")
    ratio = bound.forecast(params) / float(rise.detach())
    limit = 3 * card.calibration.spread
    assert 1 / limit < ratio < limit
    raw = bound.energy(params)
    assert raw < float(rise.detach()), "the diagonal alone understates a coherent step"


def test_calibration_is_a_power_law_within_limits():
    exact = fit([(1e-4, 2e-3), (1e-3, 2e-2), (1e-2, 2e-1)], 1.0)
    assert exact.exponent == pytest.approx(1)
    assert exact.nats(5e-3) == pytest.approx(0.1)
    assert exact.energy(exact.nats(3e-4)) == pytest.approx(3e-4)
    assert exact.spread == pytest.approx(1)
    steep = fit([(1e-4, 1e-6), (1e-3, 1.0)], 1.0)
    assert steep.exponent == 2
    moved = exact.through(1e-3, 0.5)
    assert moved.nats(1e-3) == pytest.approx(0.5)
    assert exact.through(0.0, 0.5) == exact
    with pytest.raises(ValueError, match="do not change"):
        fit([(1e-4, 0.0)], 1.0)


def test_saved_and_loaded(tmp_path, model, card):
    path = card.save(tmp_path / "sub" / "card.safetensors")
    assert [f.name for f in path.parent.iterdir()] == ["card.safetensors"]
    other = fast.SourceCard.load(path)
    assert other.calibration == card.calibration
    assert other.fingerprints == card.fingerprints
    assert str(other) == str(card)
    for name, value in other.diagonal().items():
        assert torch.equal(value, card.diagonal()[name])


def test_a_file_takes_less_than_a_byte_per_weight(tmp_path):
    """Names, hashes and the text included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 501), nn.ReLU(), nn.Linear(501, 5)).eval()
    card = fast.SourceCard.estimate(model, X, num_samples=4)
    path = card.save(tmp_path / "card.safetensors")
    assert path.stat().st_size < 65 * 501
    other = fast.SourceCard.load(path)
    for name, value in other.diagonal().items():
        assert torch.equal(value, card.diagonal()[name])


def test_optimizer_takes_a_card_in_groups_and_before_it_is_bound(model, card, tmp_path):
    loaded = fast.SourceCard.load(card.save(tmp_path / "c.safetensors"))
    net = fast.replace_head(copy.deepcopy(model), 3, sample=X[:20])
    groups = fast.param_groups(net, lr=1e-3, anchor_decay=10.0, weight_decay=0.1)
    opt = fast.AdamW(groups, curvature=loaded)
    total = numel = 0
    for name, p in backbone(net).items():
        f = opt.state[p]["curvature"]
        assert torch.allclose(f, loaded.diagonal()[name] / loaded.mean)
        total, numel = total + float(f.sum()), numel + f.numel()
    assert total / numel == pytest.approx(1, rel=1e-4)
    bound = loaded.bind(net)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(net(X), Y % 3).backward()
        opt.step()
    energy = float(opt.stats()["forgetting"]) * card.mean
    assert energy > 0
    assert energy == pytest.approx(bound.energy(net.parameters()), rel=1e-3)
    anchors = list(backbone(model).values())
    assert energy == pytest.approx(bound.energy(backbone(net).values(), anchors), rel=1e-3)


@pytest.mark.parametrize("cut", [10, 200, -50])
def test_truncated_file(tmp_path, card, cut):
    path = card.save(tmp_path / "card.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"card\.safetensors is truncated"):
        fast.SourceCard.load(path)


def test_files_that_are_no_cards(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no such file"):
        fast.SourceCard.load(tmp_path / "none.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="is no source card"):
        fast.SourceCard.load(tmp_path / "w.safetensors")


def test_card_of_another_model(model, card):
    with pytest.raises(ValueError, match=r"of another model: its tensor 'features\.0\.weight'"):
        card.bind(TextNet())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.project.bias += 1
    with pytest.raises(ValueError, match=r"of other weights: 'project\.bias' differs"):
        card.bind(other)
    with pytest.raises(ValueError, match="none of the 1 parameters is one of this card"):
        card.curvature_for([nn.Parameter(torch.ones(3))])


def test_a_parameter_in_the_place_of_a_freed_one_is_not_taken_for_it(model, card):
    net = copy.deepcopy(model)
    bound = card.bind(net)
    freed = {id(p) for p in backbone(net).values()}
    del net
    gc.collect()
    others: list[nn.Parameter] = []
    while not others or id(others[-1]) not in freed:
        others.append(nn.Parameter(torch.ones(3)))
        assert len(others) < 100_000, "no memory was used again"
    with pytest.raises(ValueError, match="none of the 1 parameters is one of this card"):
        bound.energy(others[-1:])


def test_a_card_without_weights_needs_anchors(model, card):
    net = copy.deepcopy(model)
    bound = card.bind(net)
    light = bound.without_weights()
    params = list(backbone(net).values())
    anchors = [p.detach().clone() for p in params]
    with torch.no_grad():
        params[0] += 0.1
    with pytest.raises(ValueError, match="does not know the pretrained weights"):
        light.energy(params)
    assert light.energy(params, anchors) == bound.energy(params) > 0
    assert bound.energy(params) == bound.energy(params, anchors), "the card itself is unchanged"


def test_a_copied_card_is_bound_again(model, card):
    net = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(card.bind(net)))
    with torch.no_grad():
        net.project.bias += 1
    with pytest.raises(ValueError, match=r"Call card.bind\(model\)"):
        again.energy([net.project.bias])
    assert again.bind(model).energy(model.parameters()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "true"}, "labels must be one of"),
        ({"labels": "data"}, "needs labelled data"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"params": "nothing"}, "matches no parameter name"),
    ],
)
def test_bad_options(model, change, message):
    with pytest.raises(ValueError, match=message):
        fast.SourceCard.estimate(model, X, **change)
    with pytest.raises(TypeError, match="source data: got int; give inputs"):
        fast.SourceCard.estimate(model, 3)


def test_str_says_what_the_forecast_is_worth(card):
    text = str(card)
    assert f"{card.num_samples} source samples" in text
    assert "within a factor" in text
    assert math.isfinite(card.calibration.coherence)
    assert f"coherence {card.calibration.coherence:.0f}" in text


def test_a_card_without_the_exact_product(model, card):
    cheap = fast.SourceCard.estimate(model, X, coherence=False, **OPTIONS)
    assert math.isnan(cheap.calibration.coherence)
    assert cheap.calibration.points == card.calibration.points
    assert "coherence" not in str(cheap)
