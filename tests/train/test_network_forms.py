"""Networks whose head is not simply the last layer of one row per sample."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fast
from fast.adapt.network.shared_forward import cuts_at_head
from fast.heads import check_rows, forward_logits, task_head
from fast.models.saved import load_saved
from helpers import same_state
from networks import ConvHead, images

TRAIN, VAL, SOURCE = images(100, 4, seed=1), images(40, 4, seed=2), images(80, 5, seed=3)


class Positions(nn.Module):
    """Answers the mean over the 8 rows of an image, which go through the head as `fold` says."""

    fold = "positions in a dimension of their own"

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.embed(x.squeeze(1)))).mean(1)


class Folded(Positions):
    """The batch of the head is samples times positions."""

    def forward(self, x):
        rows = torch.relu(self.embed(x.squeeze(1))).flatten(0, 1)
        return self.fc(rows).view(len(x), 8, -1).mean(1)


class Mixed(Positions):
    """The first positions of all samples come first."""

    def forward(self, x):
        rows = torch.relu(self.embed(x.squeeze(1))).transpose(0, 1).flatten(0, 1)
        return self.fc(rows).view(8, len(x), -1).mean(0)


class Last(Positions):
    """Counts the samples by its inputs to pick one position of each, as GPT-2 does."""

    def forward(self, x):
        return self.fc(torch.relu(self.embed(x.squeeze(1))))[torch.arange(len(x)), -1]


class Ends(nn.Sequential):
    def __init__(self, *ending, head=None):
        head = head or nn.Linear(16, 5)
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), head, *ending)


class Padded(nn.Module):
    """Eight outputs, of which the first `count` count."""

    def __init__(self, count=5):
        super().__init__()
        self.body, self.fc, self.kept = nn.Linear(64, 16), nn.Linear(16, 8), count

    def forward(self, x):
        return self.fc(self.body(x.flatten(1)).relu())[:, : self.kept]


def run(kind, **options):
    torch.manual_seed(0)
    return fast.finetune(kind(), **({"train": TRAIN, "val": VAL, "steps": 6, "lr": 1e-2} | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"source_inputs": SOURCE},
        {"source_inputs": SOURCE[0], "grad_accum_steps": 4},
        {"train": DataLoader(TensorDataset(*TRAIN), 25), "num_classes": 4, "distill": 1.0},
    ],
    ids=["distilling", "rehearsing", "in parts", "without row numbers"],
)
def test_rows_of_a_sample_count_as_one_however_they_are_laid_out(options):
    plain, by_row = (run(kind, **options) for kind in (Positions, Folded))
    pairs = zip(plain.model.state_dict().values(), by_row.model.state_dict().values(), strict=True)
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5) for a, b in pairs)
    assert by_row.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-4)


def test_mixed_rows_are_refused_where_they_matter():
    with pytest.raises(ValueError, match=r"rows of several samples mixed.*rehearse=0"):
        run(Mixed)
    assert run(Mixed, distill=0.0, rehearse=0.0).target_accuracy is not None
    model = fast.replace_head(Folded(), 4, sample=TRAIN[0])
    check_rows(model, task_head(model), TRAIN[0])
    assert not cuts_at_head(model, task_head(model), TRAIN[0], SOURCE[0][:8])


def test_source_rows_run_apart_where_the_network_counts_its_inputs():
    """In one batch with the target's, they would be cut off before it counts."""
    result = run(Last, source_inputs=SOURCE, steps=40)
    assert result.history[-1]["loss"] < result.history[1]["loss"]


def test_a_log_softmax_may_follow_the_head():
    torch.manual_seed(0)
    plain = Ends()
    with_log_softmax = Ends(nn.LogSoftmax(1))
    with_log_softmax.load_state_dict(plain.state_dict())
    options = {"steps": 6, "lr": 1e-2, "stall": 2, "head_steps": 0, "source_inputs": SOURCE}
    ends = [fast.finetune(m, TRAIN, VAL, **options).model for m in (plain, with_log_softmax)]
    a, b = (forward_logits(m, VAL[0]).log_softmax(1) for m in ends)
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("method", ["fast", "vanilla"])
def test_probabilities_are_refused(method):
    with pytest.raises(ValueError, match=r"Ends returns probabilities .a softmax follows its head"):
        fast.finetune(Ends(nn.Softmax(1)), TRAIN, steps=2, method=method)


def test_a_padded_head_is_found_and_a_cut_that_loses_classes_is_said():
    assert run(Padded, steps=40).target_accuracy > 0.5
    start = Padded(count=3)
    with pytest.raises(ValueError, match=r"head of 4 classes at fc the logits have shape \[2, 3\]"):
        fast.finetune(start, TRAIN, steps=2)
    assert isinstance(start.fc, nn.Linear)


def test_a_head_without_bias_is_saved_with_the_one_it_needs(tmp_path):
    torch.manual_seed(0)
    start = Ends(head=nn.Linear(16, 5, bias=False))
    result = fast.finetune(copy.deepcopy(start), TRAIN, VAL, steps=6, source_inputs=SOURCE)
    result.save(tmp_path)
    assert "3 has a bias" in json.loads((tmp_path / "result.json").read_text())["notes"][0]
    assert set(load_file(tmp_path / "source_head.safetensors")) == {"weight"}
    networks = load_saved(tmp_path, copy.deepcopy(start), VAL[0])
    result.model.eval()
    assert torch.allclose(networks.target.eval()(VAL[0]), result.model(VAL[0]), atol=1e-5)
    with fast.source_task(result.model):
        assert torch.allclose(networks.source.eval()(VAL[0]), result.model(VAL[0]), atol=1e-5)


def test_head_steps_are_for_heads_that_come_last():
    with pytest.raises(ValueError, match="head_steps: something follows the head"):
        fast.finetune(ConvHead(), TRAIN, steps=2, head_steps=50)
    torch.manual_seed(0)
    options = {"method": "vanilla", "steps": 1, "stall": 1}
    loss = {n: run(Ends, head_steps=n, **options).history[0]["target_loss"] for n in (0, 200)}
    assert loss[200] < 0.5 * loss[0]


def test_a_random_head_has_a_bias_only_where_the_own_one_has(tmp_path):
    start = Ends(head=nn.Linear(16, 5, bias=False))
    result = fast.finetune(start, TRAIN, steps=2, method="vanilla")
    result.save(tmp_path)
    assert result.notes == []
    plain = Ends(head=nn.Linear(16, 4, bias=False))
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_auxiliary_heads_are_noted():
    class Auxiliary(Padded):
        """Answers with a second head in training, as GoogLeNet does."""

        def __init__(self):
            super().__init__(count=8)
            self.side = nn.Linear(16, 8)

        def forward(self, x):
            f = self.body(x.flatten(1)).relu()
            return (self.fc(f), self.side(f)) if self.training else self.fc(f)

    assert "side: auxiliary heads keep" in fast.finetune(Auxiliary(), TRAIN, steps=2).notes[0]


NORMS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "old weight norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_normed_head_is_saved_as_the_plain_layer_that_it_is(tmp_path, name, bias):
    def normed():
        model = Ends(head=nn.Linear(16, 5, bias=bias))
        NORMS[name](model[3])
        return model.eval()

    start = normed()
    with torch.no_grad():
        before = start(VAL[0])
    result = fast.finetune(start, TRAIN, steps=2, lr=1e-12)
    result.save(tmp_path)
    assert any("3 is a plain Linear, and the network's own" in note for note in result.notes)
    for model in (normed(), Ends(head=nn.Linear(16, 5, bias=bias))):
        networks = load_saved(tmp_path, model, VAL[0])
        with torch.no_grad():
            assert torch.allclose(networks.source.eval()(VAL[0]), before, atol=1e-6)
            assert torch.allclose(networks.target.eval()(VAL[0]), result.model(VAL[0]), atol=1e-5)


class Doubled(nn.Linear):
    """Computes more than its weight and bias say."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_with_a_forward_of_its_own_is_noted(tmp_path):
    result = run(lambda: Ends(head=Doubled(16, 5)))
    assert "(Doubled with weights or a forward of its own)" in result.notes[0]
    folder = result.export(tmp_path / "served", "safetensors")
    assert result.notes[0] in (folder / "README.md").read_text()
    plain = Ends(head=nn.Linear(16, 4)).eval()
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.allclose(plain(VAL[0]), result.model(VAL[0]), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make", [Doubled, *NORMS.values()], ids=["doubled", *NORMS])
def test_a_head_that_is_kept_is_read_as_it_is(tmp_path, make):
    def network():
        model = Ends(head=Doubled(16, 5) if make is Doubled else nn.Linear(16, 5))
        if make is not Doubled:
            make(model[3])
        return model

    result = fast.finetune(network(), TRAIN, source_inputs=SOURCE[0], head="keep", steps=2)
    result.save(tmp_path)
    again = fast.load(tmp_path, network()).model
    with torch.no_grad():
        assert torch.allclose(again.eval()(VAL[0]), result.model.eval()(VAL[0]), atol=1e-6)


class OneOutput(Ends):
    def __init__(self):
        super().__init__(head=nn.Linear(16, 1))


def test_of_one_output_nothing_is_counted_that_softmax_makes_sure():
    """Softmax gives any single number the probability 1, so that nothing were ever lost."""
    result = run(OneOutput, source_inputs=SOURCE[0], forget_budget=0.01)
    assert result.final["forecast"] != 0
    with pytest.raises(ValueError, match="task source: the network has one output"):
        result.predict(VAL[0], task="source")
    with pytest.raises(ValueError, match="source: the network has one output"):
        run(OneOutput, source=(SOURCE[0], torch.zeros(80)))
    with pytest.raises(ValueError, match="source_skill='answers': the source head has one output"):
        run(OneOutput, source_inputs=SOURCE[0], source_skill="answers")


def test_a_lazy_network_is_told_to_run_once():
    with pytest.raises(ValueError, match=r"1\.weight is lazy.*run the model once"):
        run(lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))


class Parallel(Ends):
    """Two outputs of different widths: which are the logits?"""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 7)

    def forward(self, x):
        features = self[2](self[1](self[0](x)))
        return self.project(features), self[3](features)


def test_which_of_several_outputs_are_the_logits_is_told():
    message = (
        r"the first, of shape \[2, 7\], is taken for the logits, and not \[2, 5\] \(head='project'"
    )
    with pytest.warns(UserWarning, match=message):
        run(Parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Parallel, head="project")


class Mixed16(nn.Module):
    """Norms in float32 in a network of 16 bits, as large networks have it."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.body, self.norm = nn.Linear(64, 16).to(dtype), nn.LayerNorm(16)
        self.fc = nn.Linear(16, 5).to(dtype)

    def forward(self, x):
        y = self.norm(self.body(x.flatten(1)).float()).relu()
        return self.fc(y.to(self.fc.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "vanilla"}, {"source_inputs": SOURCE}, {"method": "ewc"}],
    ids=["fast", "vanilla", "rehearsing", "ewc"],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_network_of_16_bits_learns_as_one_of_32(dtype, options, mixed):
    make = (lambda: Mixed16(dtype)) if mixed else (lambda: Ends().to(dtype))
    torch.manual_seed(0)
    start = make()
    half = {k: (v[0].to(dtype), v[1]) for k, v in (("train", TRAIN), ("val", VAL))}
    wide = {k: (x.float(), y) for k, (x, y) in half.items()}
    if "source_inputs" in options:
        half["source_inputs"] = (SOURCE[0].to(dtype), SOURCE[1])
        wide["source_inputs"] = (half["source_inputs"][0].float(), SOURCE[1])
    options = options | {"steps": 5, "lr": 1e-4}
    expected = fast.finetune(copy.deepcopy(start).float(), **(options | wide))
    with pytest.warns(UserWarning, match=r"returned in float32.*result\.model\.to"):
        result = fast.finetune(start, **(options | half))
    assert result.history[-1]["target_loss"] == expected.history[-1]["target_loss"]
    assert same_state(start, expected.model)
    assert not start._forward_pre_hooks


def test_a_call_that_fails_gives_the_16_bits_back():
    start = Mixed16(torch.bfloat16)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    with pytest.warns(UserWarning, match="bfloat16"), pytest.raises(ValueError, match="body"):
        fast.finetune(start, TRAIN, steps=2, head="body")
    after = start.state_dict()
    assert all(v.dtype == after[k].dtype and torch.equal(v, after[k]) for k, v in before.items())


def test_a_card_of_16_bits_is_still_of_its_weights():
    start = Ends().bfloat16()
    card = fast.SourceCard.estimate(
        start, SOURCE[0].bfloat16(), num_samples=16, calibration_samples=8
    )
    with pytest.warns(UserWarning, match="bfloat16"):
        result = fast.finetune(start, TRAIN, steps=2, card=card)
    assert result.final["forecast"] is not None


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "data-parallel": nn.DataParallel,
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"source_inputs": SOURCE}, {"source_inputs": SOURCE, "method": "replay"}],
    ids=["fast", "rehearsing", "replay"],
)
def test_of_a_wrapped_network_the_one_inside_is_trained(name, options):
    torch.manual_seed(0)
    start = Ends().eval()
    expected = fast.finetune(copy.deepcopy(start), TRAIN, steps=3, **options).model
    wrapper = WRAPPERS[name](start)
    with torch.no_grad():
        wrapper(VAL[0])  # compiled code has no hooks that come later
    with pytest.warns(UserWarning, match="the Ends inside is trained"):
        result = fast.finetune(wrapper, TRAIN, steps=3, **options)
    assert result.model is start
    with torch.no_grad():
        assert torch.equal(wrapper(VAL[0]), expected(VAL[0]))
        with fast.source_task(wrapper), fast.source_task(expected):
            assert torch.equal(wrapper(VAL[0]), expected(VAL[0]))


def test_compiled_parts_are_saved_under_plain_names_and_may_not_hold_the_head(tmp_path):
    start = Ends()
    start[1] = torch.compile(start[1], backend="eager")
    result = fast.finetune(start, TRAIN, steps=2)
    result.save(tmp_path)
    plain = load_saved(tmp_path, Ends(), VAL[0]).target.eval()
    assert torch.allclose(plain(VAL[0]), result.model(VAL[0]), atol=1e-5)
    start = Ends()
    start[3] = torch.compile(start[3], backend="eager")
    with pytest.raises(ValueError, match=r"head 3\._orig_mod is in a compiled part"):
        fast.finetune(start, TRAIN, steps=2)


def batch_normed():
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())
    return nn.Sequential(body, nn.Linear(16, 5))


@pytest.mark.parametrize(
    "options",
    [
        {"source_inputs": SOURCE},
        {"batch_norm": "track"},
        {"batch_norm": "track", "train": (TRAIN[0][:24], TRAIN[1][:24]), "grad_accum_steps": 8},
        {"batch_norm": "track", "method": "replay", "source_inputs": SOURCE},
    ],
    ids=["per task", "tracked", "in parts of one", "replay"],
)
def test_a_batch_of_one_sample_is_a_batch(options):
    loader = DataLoader(TensorDataset(TRAIN[0][:25], TRAIN[1][:25]), 8)
    options = {"train": loader, "batch_size": 8, "num_classes": 4, "steps": 9} | options
    result = fast.finetune(batch_normed(), **options)
    assert all(b.isfinite().all() for b in result.model.state_dict().values())
