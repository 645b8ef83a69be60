"""Adapters beside frozen layers: the source task is answered as it was, to the bit."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from fast.heads import (
    adapter_state,
    adapters,
    add_adapters,
    attach_adapters,
    merge_adapters,
    set_batch_norm,
    task_head,
)
from networks import IMAGE_NETWORKS, ConvNet, TextNet, images, sentences

pytest.importorskip("peft", reason="peft is not installed")
X = images(16, 4)[0]


def answers(model, inputs=X):
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def adapted(model, inputs=X, rank=4):
    """With a new head and adapters, all of which have moved."""
    fast.replace_head(model, 4, sample=inputs)
    set_batch_norm(model, "per_task")
    add_adapters(model, task_head(model), rank, inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


class Grouped(nn.Module):
    """Layers that get an adapter, and layers that do not."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(1, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.unused = nn.Linear(4, 4)
        self.pointwise = nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        for layer in (self.plain, self.depthwise, self.dilated, self.circular, self.frozen):
            x = layer(x)
        return self.fc(self.pointwise(self.normed(x)).relu().mean((2, 3)))


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as those of TensorFlow do."""

    def forward(self, x):
        most = self.kernel_size[0] - 1
        return F.conv2d(F.pad(x, (0, most, 0, most)), self.weight, self.bias)


class PaddedBefore(nn.Module):
    """It pads for its convolution, by what that says of itself (MobileNetV2 of transformers)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        less = self.conv.kernel_size[0] - self.conv.stride[0]
        return self.fc(self.conv(F.pad(x, (0, less, 0, less))).relu().mean((2, 3)))


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised at each pass."""

    def forward(self, x):
        weight = F.layer_norm(self.weight, self.weight.shape[1:])
        return F.conv2d(x, weight, self.bias)


class Derived(nn.Module):
    """Layers of derived classes: those with a kernel of one do what their parents do."""

    def __init__(self):
        super().__init__()
        self.padded = Padded(1, 4, 3)
        self.standardised = Standardised(4, 4, 1)
        self.pointwise = Padded(4, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.pointwise(self.standardised(self.padded(x))).relu().mean((2, 3)))


class Twice(nn.Module):
    """One layer under two names, the later of which is the one that a walk meets first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.again = self.blocks[0]
        self.fc = nn.Linear(64, 5)

    def forward(self, x):
        return self.fc(self.again(self.blocks(x.flatten(1))).relu())


class Attention(nn.Module):
    """In evaluation torch runs the whole layer at once, and reads the weights of those inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.layer(self.embed(x.squeeze(1))).mean(1))


class Asking(nn.Module):
    """Attention to keys of another width, which has three weights; and one that never runs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.ask = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)
        self.unused = nn.MultiheadAttention(16, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = x.squeeze(1)
        return self.fc(self.ask(self.embed(x), x, x, need_weights=False)[0].mean(1))


NETWORKS = {
    **IMAGE_NETWORKS,
    "grouped": Grouped,
    "derived": Derived,
    "padded before": PaddedBefore,
    "twice": Twice,
    "attention": Attention,
    "asking": Asking,
}


def test_the_source_has_the_parameters_that_can_learn_as_it_had_them():
    """torch sums some products of a frozen weight in another order: LeViT answered 1e-6 apart."""
    model = Grouped().eval()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    layers = list(before)[:-2]  # all but the head

    def learn():
        own = dict(model.named_parameters())
        names = [n if n in own else n.replace(".weight", ".base_layer.weight") for n in layers]
        names = [n if n in own else n.replace(".bias", ".base_layer.bias") for n in names]
        return {n: own[name].requires_grad for n, name in zip(layers, names, strict=True)}

    adapted(model)
    assert not any(learn().values())
    with fast.source_task(model), fast.source_task(model):
        assert learn() == {n: before[n] for n in layers}
    assert not any(learn().values())


@pytest.mark.parametrize("name", [*NETWORKS, "text"])
def test_the_source_is_answered_to_the_bit_and_the_target_by_merged_weights(name):
    torch.manual_seed(0)
    model = (TextNet if name == "text" else NETWORKS[name])().eval()
    inputs = sentences(16, 4)[0] if name == "text" else X
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    before, fresh = answers(model, inputs), copy.deepcopy(model)
    target = answers(adapted(model, inputs), inputs)
    with fast.source_task(model):
        assert torch.equal(answers(model, inputs), before)
    assert torch.equal(answers(model, inputs), target)
    alone = answers(fast.replace_head(fresh, 4, sample=inputs), inputs)
    assert not torch.allclose(target, alone, atol=1e-2)  # zeros: the head has moved, too
    assert answers(copy.deepcopy(model), inputs).equal(target)
    fast.fold_head(model)
    torch.testing.assert_close(answers(model, inputs), target, atol=1e-4, rtol=1e-4)
    assert set(trainable) <= {n for n, _ in model.named_parameters()}
    assert all(p.requires_grad == trainable.get(n, True) for n, p in model.named_parameters())
    assert not hasattr(model, "peft_config")


def test_which_layers_get_one():
    model = adapted(Grouped().eval())
    assert list(adapters(model)) == ["plain", "dilated", "circular", "pointwise"]
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {f"{n}.lora_{f}.target.weight" for n in ("plain", "pointwise") for f in "AB"}
    factors |= {f"{n}.lora_{f}.weight" for n in ("dilated", "circular") for f in "AB"}
    assert learns == factors | {"fc.linear.weight", "fc.linear.bias"}
    assert list(adapters(adapted(Derived().eval()))) == ["padded", "standardised", "pointwise"]
    assert list(adapters(adapted(Twice().eval()))) == ["blocks.0"]
    inside = ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert list(adapters(adapted(Attention().eval()))) == ["embed", *(f"layer.{n}" for n in inside)]
    assert list(adapters(adapted(Asking().eval()))) == ["embed", "ask", "ask.out_proj"]


def test_what_reads_the_weights_of_attention_gets_the_adapters_in_either_mode():
    torch.manual_seed(0)
    model = adapted(Attention().eval())
    at_once = answers(model)
    model.layer.dropout.p = model.layer.dropout1.p = model.layer.dropout2.p = 0.0
    model.layer.self_attn.dropout = 0.0
    model.layer.train()
    one_by_one = model(X)
    torch.testing.assert_close(one_by_one, at_once, atol=1e-5, rtol=1e-4)
    one_by_one.square().mean().backward()
    factors = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    assert len(factors) == 10
    assert all(grad is not None and bool(grad.any()) for grad in factors.values())


def test_a_sum_of_weights_learns_as_an_adapter_beside_its_layer_does(monkeypatch):
    torch.manual_seed(0)
    model = adapted(ConvNet().eval())

    def learned(largest):
        monkeypatch.setattr(sys.modules["fast.heads.adapters"], "SUMMED", largest)
        model.zero_grad()
        output = model(X)
        output.square().mean().backward()
        return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    beside, theirs = learned(0)
    summed, ours = learned(2**17)
    assert not torch.equal(summed, beside)  # else both went one way
    torch.testing.assert_close(summed, beside)
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4 * scale, rtol=0)


def test_half_precision_and_keywords_are_as_without_adapters():
    class Keyword(ConvNet):
        def forward(self, x):
            self.features[0](input=x)
            return super().forward(x)

    model = adapted(Keyword().eval()).to(torch.bfloat16)
    assert answers(model, X.to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_layer_with_two_names_has_one_adapter_at_both():
    model = adapted(Twice().eval())
    assert model.again is model.blocks[0]
    merged = fast.fold_head(model)
    assert merged.again is merged.blocks[0]
    assert type(merged.again) is nn.Linear


class Tied(ConvNet):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(16, 16), nn.Linear(16, 16)
        self.back.weight = self.there.weight
        self.project = nn.Sequential(self.project, self.there, nn.Tanh(), self.back)


def test_layers_of_one_weight_have_none():
    """Each had one, and both were merged into the weight: the network answered otherwise."""
    model = adapted(Tied().eval()).eval()
    assert list(adapters(model)) == ["features.0", "project.0"]
    before = answers(model)
    torch.testing.assert_close(answers(fast.fold_head(model)), before, rtol=1e-4, atol=1e-4)


def test_fresh_adapters_change_nothing():
    torch.manual_seed(0)
    model = fast.replace_head(ConvNet().eval(), 4, sample=X)
    nn.init.normal_(task_head(model).linear.weight)
    before = answers(model)
    add_adapters(model, task_head(model), 8, X)
    assert torch.equal(answers(model), before)


def test_what_is_saved_is_enough_for_both_functions():
    torch.manual_seed(0)
    start = ConvNet().eval()
    model = adapted(copy.deepcopy(start))
    state = adapter_state(model)
    assert set(state) == {
        f"{n}.{p}" for n in ("features.0", "project") for p in ("weight", "A", "B")
    }
    assert state["project.A"].shape == (4, 32)
    assert state["project.B"].shape == (16, 4)
    plain = fast.fold_head(copy.deepcopy(model))
    again = attach_adapters(copy.deepcopy(plain), state)
    torch.testing.assert_close(answers(again), answers(model), atol=1e-4, rtol=1e-4)
    with fast.source_task(again):
        torch.testing.assert_close(
            again.project(torch.ones(1, 32)), start.project(torch.ones(1, 32))
        )
    assert torch.equal(again.project.base_layer.weight, start.project.weight)
    with pytest.raises(ValueError, match=r"adapters are of another network: project differs"):
        attach_adapters(copy.deepcopy(plain), {**state, "project.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("network", [Attention, Asking])
def test_what_is_saved_of_attention_is_enough_for_both_functions(network):
    torch.manual_seed(0)
    start = network().eval()
    before = answers(start)
    model = adapted(start)
    state, target, source = adapter_state(model), answers(model), task_head(model).source
    plain = fast.fold_head(copy.deepcopy(model))
    assert {type(m) for m in plain.modules()} == {type(m) for m in network().modules()}
    assert plain.state_dict().keys() == network().state_dict().keys()
    again = attach_adapters(copy.deepcopy(plain), state)
    torch.testing.assert_close(answers(again), target, atol=1e-4, rtol=1e-4)
    with fast.source_task(again):
        again.fc = source
        assert torch.equal(answers(again), before)


@pytest.mark.parametrize("network", [Attention, None])
def test_a_network_with_adapters_can_be_pickled(network):
    layers = nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5)
    model = adapted((nn.Sequential(*layers) if network is None else network()).eval())
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(answers(again), answers(model))
    with fast.source_task(again), fast.source_task(model):
        assert torch.equal(answers(again), answers(model))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.requires_grad_(False), "SequentialHead has no layer to adapt"),
        (lambda m: adapted(m), "the network has adapters of PEFT already; merge them"),
    ],
)
def test_what_cannot_be_adapted(spoil, message):
    model = IMAGE_NETWORKS["sequential head"]().eval()
    fast.replace_head(model, 4, sample=X)
    if message.startswith("the network"):
        add_adapters(model, task_head(model), 4, X)
    else:
        spoil(model)
    with pytest.raises(ValueError, match=message):
        add_adapters(model, task_head(model), 4, X)


def test_a_rank_that_no_layer_can_have_is_named():
    model = fast.replace_head(ConvNet().eval(), 4, sample=X)
    with pytest.raises(ValueError, match=r"adapter_rank=1000000 is more than the rank 16 that"):
        add_adapters(model, task_head(model), 10**6, X)
    add_adapters(model, task_head(model), 32, X)  # which costs little where no layer can have it


def test_without_adapters_merging_does_nothing():
    model = ConvNet()
    before = [p for p in model.parameters()]
    assert merge_adapters(model) is model
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_layers_of_transformers_are_adapted_and_switched():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shared = {"vocab_size": 50, "num_labels": 5, "pad_token_id": 0}
    bert = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **shared
    )
    gpt = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **shared)
    inputs = {"input_ids": torch.randint(1, 50, (8, 7))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for config, make, kind in (
        (bert, transformers.BertForSequenceClassification, nn.Linear),
        (gpt, transformers.GPT2ForSequenceClassification, transformers.pytorch_utils.Conv1D),
    ):
        torch.manual_seed(0)
        model = make(config).eval()
        before = answers(model, inputs)
        target = answers(adapted(model, inputs), inputs)
        assert any(type(layer.base_layer) is kind for layer in adapters(model).values())
        assert len(adapters(model)) >= 8
        with fast.source_task(model):
            assert torch.equal(answers(model, inputs), before)
        fast.fold_head(model)
        torch.testing.assert_close(answers(model, inputs), target, atol=1e-4, rtol=1e-4)
