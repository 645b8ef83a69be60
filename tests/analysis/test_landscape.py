"""Losses over the plane, stiff shares and forecasts, against plain torch; nothing is changed."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fast
from fast.analysis.landscape import Plane, WeightPath
from fast.analysis.landscape.draw import draw
from fast.curvature.card.answers import backbone_parameters
from networks import ConvNet, TextNet, images, sentences

SOURCE, TARGET = images(60, 5), images(40, 3, seed=1)


def adapt(method="fast", net=None, source=SOURCE, target=TARGET, **options):
    recorder = fast.PathRecorder(source)
    net = copy.deepcopy(network() if net is None else net)
    options = {"steps": 12, "eval_every": 4, "batch_size": 20, "stall": 2, "ramp": 0} | options
    result = fast.finetune(net, target, target, source=recorder, method=method, **options)
    return recorder.path(result)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(5)


@pytest.fixture(scope="module")
def paths():
    return [adapt("fast"), adapt("vanilla")]


@pytest.fixture(scope="module")
def landscape(paths):
    return fast.landscape(paths, SOURCE, TARGET, resolution=5, num_stiff=3)


# A smooth network: the Hessian does not know of the kinks of ReLUs, the rise of a loss does.
TEXTS, QUESTIONS = sentences(60, 4), sentences(40, 3, seed=1)


def by_hand(displacements):
    """A path of a float64 network with a replaced head, along these displacements `[n, P]`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = fast.replace_head(TextNet(4).double(), 3, sample=QUESTIONS[0]).eval()
    params = backbone_parameters(net, None)
    origin = torch.cat([p.detach().flatten() for p in params.values()])
    weights = origin + torch.cat([torch.zeros(1, len(origin)), displacements(origin)])
    steps, names = list(range(len(weights))), tuple(params)
    return WeightPath(name="hand", steps=steps, weights=weights, parameters=names, model=net)


def source_hessian(path):
    """Dense Hessian of the source loss at the start of the path, by torch alone."""
    net = copy.deepcopy(path.model)
    x, y = TEXTS
    by_name = dict(net.named_parameters())
    shapes = [by_name[n].shape for n in path.parameters]

    def loss(w):
        parts = w.split([s.numel() for s in shapes])
        put = {n: p.view(s) for n, p, s in zip(path.parameters, parts, shapes, strict=True)}
        logits = torch.func.functional_call(net, put, (), x).logits
        return F.cross_entropy(logits, y)

    with fast.source_task(net):
        return torch.func.hessian(loss)(path.weights[0])


def test_the_recorder_keeps_the_weights_that_were_measured(paths):
    for path in paths:
        assert path.steps == [0, 4, 8, 12]
        assert path.weights.shape[0] == 4
        params = backbone_parameters(path.model, None)
        assert path.parameters == tuple(params)
        assert "decide.weight" not in str(path.parameters)
        last = torch.cat([p.detach().flatten() for p in params.values()])
        torch.testing.assert_close(path.weights[-1], last)
        before = dict(network().named_parameters())
        first = torch.cat([before[n].flatten() for n in path.parameters])
        assert torch.equal(path.weights[0], first)
        with fast.source_task(path.model), torch.no_grad():
            accuracy = (path.model(SOURCE[0]).argmax(1) == SOURCE[1]).float().mean().item()
        assert path.history[-1]["source_accuracy"] == pytest.approx(accuracy)


def test_losses_are_those_of_the_networks(landscape, paths):
    assert (landscape.source_samples, landscape.target_samples) == (60, 40)
    assert landscape.num_parameters == paths[0].weights.shape[1]
    with torch.no_grad():
        before = F.cross_entropy(network().eval()(SOURCE[0]), SOURCE[1]).item()
        assert landscape.source_loss_before == pytest.approx(before, rel=1e-5)
        for path, geometry in zip(paths, landscape.paths, strict=True):
            with fast.source_task(path.model):
                loss = F.cross_entropy(path.model(SOURCE[0]), SOURCE[1]).item()
            assert geometry.rise[0] == 0
            assert geometry.rise[-1] == pytest.approx(loss - before, abs=1e-5)
            assert geometry.drift[-1] == pytest.approx(
                (path.weights[-1] - path.weights[0]).norm().item(), rel=1e-5
            )
            assert geometry.target_accuracy[-1] == path.history[-1]["target_accuracy"]


def test_two_paths_end_in_the_plane(landscape):
    assert [len(row) for row in landscape.source_loss] == [len(landscape.x)] * len(landscape.y)
    assert max(len(landscape.x), len(landscape.y)) == 5
    for path in landscape.paths:
        assert (path.x[-1] ** 2 + path.y[-1] ** 2) ** 0.5 == pytest.approx(path.drift[-1], rel=1e-4)
        assert 0.3 < path.in_plane <= 1 + 1e-6
        assert landscape.x[0] < min(path.x) <= max(path.x) < landscape.x[-1]
        assert landscape.y[0] < min(path.y) <= max(path.y) < landscape.y[-1]


def test_the_surface_is_the_loss_of_both_heads_on_the_plane(paths):
    path = paths[1]
    landscape = fast.landscape(path, SOURCE, TARGET, resolution=3, num_stiff=1)
    plane = Plane.through(path.weights[0], path.weights - path.weights[0])
    net = copy.deepcopy(path.model)
    by_name = dict(net.named_parameters())
    with torch.no_grad():
        parts = plane.at(landscape.x[0], landscape.y[-1]).split(
            [by_name[n].numel() for n in path.parameters]
        )
        for name, part in zip(path.parameters, parts, strict=True):
            by_name[name].copy_(part.view_as(by_name[name]))
        target = F.cross_entropy(net(TARGET[0]), TARGET[1]).item()
        with fast.source_task(net):
            source = F.cross_entropy(net(SOURCE[0]), SOURCE[1]).item()
    assert landscape.source_loss[-1][0] == pytest.approx(source, rel=1e-4)
    assert landscape.target_loss[-1][0] == pytest.approx(target, rel=1e-4)


@pytest.fixture(scope="module")
def eigenvectors():
    """`(values, vectors)` of the dense Hessian of the source loss at w0, ascending."""
    still = by_hand(lambda origin: torch.zeros(1, len(origin), dtype=torch.float64))
    return torch.linalg.eigh(source_hessian(still))


def test_forecast_is_the_second_order_of_the_rise(eigenvectors):
    stiff = eigenvectors[1][:, -1]
    path = by_hand(lambda _: torch.stack([0.03 * stiff, -0.03 * stiff]))
    options = {"resolution": 3, "num_stiff": 1, "matrix": "hessian"}
    (geometry,) = fast.landscape(path, TEXTS, QUESTIONS, **options).paths
    # The first order alone has opposite signs in the two.
    curvature = 0.03**2 * float(eigenvectors[0][-1])
    assert sum(geometry.forecast[1:]) == pytest.approx(curvature, rel=1e-3)
    for rise, forecast in zip(geometry.rise[1:], geometry.forecast[1:], strict=True):
        assert forecast == pytest.approx(rise, abs=0.05 * curvature)


def test_stiff_share_is_one_along_an_eigenvector_and_zero_across(eigenvectors):
    values, vectors = eigenvectors
    stiff, soft = vectors[:, -1], vectors[:, len(values) // 2]
    path = by_hand(lambda _: 0.1 * torch.stack([stiff, stiff + soft, stiff + soft]))
    options = {"resolution": 3, "num_stiff": 1, "matrix": "hessian"}
    landscape = fast.landscape(path, TEXTS, QUESTIONS, **options)
    assert landscape.eigenvalues[0] == pytest.approx(float(values[-1]), rel=1e-3)
    share = landscape.paths[0].stiff_share
    assert share[0] == pytest.approx(1, abs=1e-3)
    assert share[1] == pytest.approx(0, abs=0.05)
    assert share[2] is None  # nothing moved
    assert landscape.chance == pytest.approx(len(values) ** -0.5)


def state_of(model):
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [(m.training, getattr(m, "answers_source", None)) for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return tensors, modes, grads


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(paths, training):
    path = copy.deepcopy(paths[0])
    path.model.train(training)
    weights, (tensors, modes, grads) = path.weights.clone(), state_of(path.model)
    random = torch.get_rng_state()
    fast.landscape(path, SOURCE, TARGET, resolution=3, num_stiff=1)
    after = state_of(path.model)
    assert all(torch.equal(tensors[k], after[0][k]) for k in tensors)
    assert (modes, grads) == after[1:]
    assert torch.equal(weights, path.weights)
    assert torch.equal(random, torch.get_rng_state())


def test_it_is_plain_data_and_the_same_again(landscape, paths):
    again = fast.landscape(paths, SOURCE, TARGET, resolution=5, num_stiff=3)
    assert json.loads(json.dumps(landscape.to_dict())) == json.loads(json.dumps(again.to_dict()))


def test_texts_from_a_dataset_and_a_loader():
    source, target = sentences(50, 4), sentences(40, 3, seed=1)
    loader = DataLoader(TensorDataset(source[0]["ids"], source[0]["mask"], source[1]), 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = adapt("l2-sp", TextNet(4), source, target, stall=0)
    landscape = fast.landscape(path, loader, target, resolution=3, num_stiff=1, samples=30)
    assert (landscape.source_samples, landscape.target_samples) == (30, 30)
    assert max(landscape.paths[0].drift) > 0


def test_batch_norm_kept_per_task():
    path = adapt("fast", batch_norm="per_task")
    landscape = fast.landscape(path, SOURCE, TARGET, resolution=3, num_stiff=1)
    with fast.source_task(path.model), torch.no_grad():
        loss = F.cross_entropy(path.model(SOURCE[0]), SOURCE[1]).item()
    assert landscape.paths[0].rise[-1] + landscape.source_loss_before == pytest.approx(
        loss, rel=1e-4
    )


def test_a_card_of_the_pretrained_network_forecasts(paths):
    # A card knows parameters by name, and they keep their names when the head is replaced.
    card = fast.SourceCard.estimate(network(), SOURCE, seed=0)
    given = fast.landscape(paths[1], SOURCE, TARGET, resolution=3, num_stiff=1, card=card)
    assert given.paths[0].card_forecast[0] == 0
    assert given.paths[0].card_forecast[-1] > 0
    other = fast.SourceCard.estimate(copy.deepcopy(paths[1].model), SOURCE)
    with pytest.raises(ValueError, match="of other weights"):
        fast.landscape(paths[1], SOURCE, TARGET, resolution=3, num_stiff=1, card=other)


def test_correlation(landscape):
    table = [
        torch.tensor([getattr(p, name) for p in landscape.paths], dtype=torch.float64).flatten()
        for name in ("forecast", "rise")
    ]
    expected = float(torch.corrcoef(torch.stack(table))[0, 1])
    assert landscape.correlation() == pytest.approx(expected)
    still = copy.deepcopy(landscape)
    for path in still.paths:
        path.rise = [0.0] * len(path.rise)
    assert still.correlation() is None


def test_figure(landscape):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    figure = draw(landscape, title="job")
    source, _, stiff, forecast = figure.axes[:4]
    paths = {line.get_label().split()[0]: line for line in source.get_lines()[:2]}
    assert set(paths) == {"fast", "vanilla"}
    assert list(paths["fast"].get_xdata()) == landscape.paths[0].x
    assert "3 stiffest" in stiff.get_ylabel()
    assert forecast.get_title(loc="left").startswith("How foreseen")
    still = copy.deepcopy(landscape)
    for path in still.paths:
        path.rise = [0.0] * len(path.rise)
    figure = draw(still)
    assert "the source loss did not rise" in [t.get_text() for t in figure.axes[3].texts]


def changed(path, **values):
    other = copy.copy(path)
    for name, value in values.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p: [], {}, "paths is empty"),
        (lambda p: p, {"matrix": "fisher"}, "matrix must be one of ggn, hessian; got 'fisher'"),
        (lambda p: p, {"resolution": 2}, "resolution must be at least 3; got 2"),
        (lambda p: p, {"num_stiff": 0}, "num_stiff must lie between 1 and P"),
        (lambda p: changed(p, steps=[0]), {}, "has 1 points"),
        (lambda p: [p, changed(p, weights=p.weights + 1)], {}, "start from different weights"),
        (lambda p: changed(p, weights=p.weights / 0), {}, "not finite"),
        (lambda p: changed(p, weights=p.weights[:1].expand(4, -1)), {}, "did not move"),
        (lambda p: changed(p, model=network()), {}, "must answer both tasks"),
        (lambda p: changed(p, parameters=("x",)), {}, "the path moves 'x'"),
    ],
)
def test_bad_input(paths, change, options, message):
    with pytest.raises(ValueError, match=message):
        fast.landscape(change(paths[0]), SOURCE, TARGET, **({"resolution": 3} | options))


def test_wrong_labels_are_named(paths):
    with pytest.raises(ValueError, match=r"source: labels must be 0\.\.4; got 0\.\.7"):
        fast.landscape(paths, (SOURCE[0], SOURCE[1] % 5 + (SOURCE[1] == 4) * 3), TARGET)
    inputs = DataLoader(TensorDataset(SOURCE[0]), 16)
    with pytest.raises(TypeError, match="source: the DataLoader gives no labels"):
        fast.landscape(paths, inputs, TARGET)


def test_statistics_of_batch_norm_are_no_place():
    with pytest.raises(ValueError, match="batch_norm='track' changes the source loss"):
        adapt("vanilla", batch_norm="track")
    with pytest.warns(UserWarning, match="the network has no batch norm"):
        adapt("vanilla", TextNet(5), (sentences(20, 5)), sentences(20, 3), batch_norm="track")


def test_adapters_have_no_path():
    pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(ValueError, match="method 'adapter' moves no weight of the source task"):
        adapt("adapter")


def test_a_recorder_is_for_one_run():
    recorder = fast.PathRecorder(SOURCE)
    options = {"steps": 2, "source": recorder, "method": "vanilla"}
    fast.finetune(network(), TARGET, **options)
    result = fast.finetune(network(), TARGET, **options)
    with pytest.raises(ValueError, match="give each run a recorder of its own"):
        recorder.path(result)
