"""PEFT: in which order to wrap, what a run does to adapters, and the card of LoRA factors."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
adapter_card = importlib.import_module("fast.integrations.peft").adapter_card

# PEFT asks transformers by a name that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TOKENS = torch.randint(5, 50, (48, 7), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
TRAIN = INPUTS, TOKENS[:, 0] % 4
KEPT = {name: x[:16] for name, x in INPUTS.items()}


def bert(num_labels=5):
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=num_labels,
        initializer_range=0.2,
    )
    return transformers.BertForSequenceClassification(config).eval()


def lora(model, task_type="SEQ_CLS", **options):
    options = {"target_modules": ["query", "value"], "r": 4} | options
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, **options)).eval()


def adapt(model, steps=6, **options):
    torch.manual_seed(0)
    adaptation = fast.Adaptation(model, TRAIN, steps=steps, batch_size=8, lr=1e-2, **options)
    model.train()
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step()
        adaptation.optimizer.zero_grad()
    return adaptation.finish()


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_wrap_then_adapt(tmp_path, task_type):
    """Adapters and head learn, the rest stays; folded, it is merged and saved as any other."""
    model = lora(bert(), task_type)
    before = copy.deepcopy(model.state_dict())
    result = adapt(model, source_inputs=KEPT)
    assert result.final["drift"] > 0
    after = model.state_dict()
    moved = {n for n, x in before.items() if n in after and not torch.equal(x, after[n])}
    assert moved
    assert all(".lora_" in name for name in moved)
    logits = model(**INPUTS).logits
    with fast.source_task(model):
        assert model(**INPUTS).logits.shape == (48, 5)
    fast.fold_head(model)
    torch.testing.assert_close(model(**INPUTS).logits, logits, rtol=1e-4, atol=1e-5)
    if task_type:
        model.save_pretrained(tmp_path)
        base = bert(4)
        base.load_state_dict(
            {n: x for n, x in bert().state_dict().items() if "classifier" not in n}, strict=False
        )
        read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(read(**INPUTS).logits, logits, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged.classifier) is nn.Linear
    torch.testing.assert_close(merged(**INPUTS).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_other_order_is_refused_by_name():
    """PEFT copies a head that is there already, or freezes it: it would be anchored at zero, or
    never learn."""
    copied = lora(fast.replace_head(bert(), 4))
    with pytest.raises(ValueError, match=r"original_module and .*modules_to_save.* Wrap the pre"):
        fast.param_groups(copied, anchor_decay=5.0)
    with pytest.raises(ValueError, match="several new heads"):
        fast.Adaptation(copied, TRAIN, steps=2)
    frozen = lora(fast.replace_head(bert(), 4), None)
    with pytest.raises(ValueError, match=r"new head is frozen.*wrap the pretrained network first"):
        fast.param_groups(frozen, anchor_decay=5.0)


def test_distillation_copies_adapters_and_no_frozen_weight():
    """The network at its pretrained weights is the one whose adapters are disabled."""
    model = lora(bert(), None)
    adaptation = fast.Adaptation(
        model, TRAIN, steps=6, batch_size=8, lr=1e-2, distill=1.0, rehearse=0.0, augmented=True
    )
    model.train()
    for inputs, labels, _ in adaptation.batches():
        logits, penalty = adaptation.forward(inputs)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step()
        adaptation.optimizer.zero_grad()
    frozen, *_ = adaptation._network.pretrained_copy()
    model.eval()
    frozen.eval()
    with torch.no_grad(), fast.source_task(frozen), fast.source_task(model):
        answers, moved = frozen(**INPUTS).logits, model(**INPUTS).logits
        with model.disable_adapter():
            torch.testing.assert_close(answers, model(**INPUTS).logits)
    assert (moved - answers).abs().max() > 1e-4
    own = {p.data_ptr() for p in model.parameters()}
    copied = {n for n, p in frozen.named_parameters() if p.data_ptr() not in own}
    assert copied == {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_card_of_adapters_is_that_of_the_weights_they_add_to():
    """Where A picks columns of W, B's curvature is that of these columns, up to the codes."""
    model = bert()
    card = fast.SourceCard.estimate(model, KEPT, num_samples=16, calibration_samples=4)
    model = lora(model, lora_alpha=8)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(32)[[3, 7, 11, 30]])
    mapped = adapter_card(card, model)
    assert mapped.is_bound(model)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"
    own = card.diagonal()["bert.encoder.layer.0.attention.self.query.weight"]
    expected = 4.0 * own[:, [3, 7, 11, 30]]  # lora_alpha / r = 2, squared
    torch.testing.assert_close(mapped.diagonal()[name], expected, rtol=0.1, atol=1e-12)
    assert not mapped.diagonal()[name.replace("lora_B", "lora_A")].any()
    # An estimate over the factors themselves agrees.
    direct = fast.SourceCard.estimate(model, KEPT, num_samples=16, calibration_samples=4)
    torch.testing.assert_close(direct.diagonal()[name], expected, rtol=0.2, atol=1e-12)
    free = copy.deepcopy(model)
    loose = adapt(free, method="ewc", card=adapter_card(card, free), anchor_decay=0.0)
    held = adapt(model, method="ewc", card=mapped, anchor_decay=1e4)
    norms = [layer_b(m).norm().item() for m in (loose.model, held.model)]
    assert norms[1] < 0.5 * norms[0]


def layer_b(model):
    layers = model.base_model.model.bert.encoder.layer
    return torch.cat([x.attention.self.query.lora_B["default"].weight for x in layers]).detach()


def test_a_card_that_does_not_fit_names_the_way_out():
    model = bert()
    card = fast.SourceCard.estimate(model, KEPT, num_samples=8, calibration_samples=4)
    wrapped = lora(model)
    with pytest.raises(ValueError, match=r"fast\.integrations\.peft\.adapter_card"):
        copy.deepcopy(card).bind(wrapped)
    with pytest.raises(ValueError, match="without LoRA factors"):
        adapter_card(card, bert())
    with torch.no_grad():
        wrapped.base_model.model.bert.encoder.layer[0].attention.self.query.lora_B[
            "default"
        ].weight.add_(1)
    with pytest.raises(ValueError, match="have learned already"):
        adapter_card(card, wrapped)
    other = bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.add_(1)
    with pytest.raises(ValueError, match=r"does not cover .* with these weights"):
        adapter_card(card, lora(other))
