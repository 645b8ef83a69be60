"""`FastCallback` in Lightning's Trainer: the run of a plain loop, to the bit, also when resumed."""

from __future__ import annotations

import copy
import importlib
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from networks import ConvNet, images

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
FastCallback = importlib.import_module("fast.integrations.lightning").FastCallback
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

# Lightning advises (a loader has few workers, modules are in evaluation mode), and so does torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
TRAIN, VAL, SOURCE = images(200, 4, seed=1), images(100, 4, seed=2), images(120, 5, seed=3)
STEPS, BATCH = 12, 32
RUNS = {
    "source inputs": {"source_inputs": SOURCE, "batch_size": BATCH},
    "none": {"batch_size": BATCH},
    "budget": {"source_inputs": SOURCE, "forget_budget": 0.01, "batch_size": BATCH},
}


class Classifier(lightning.LightningModule):
    def __init__(self, network, callback):
        super().__init__()
        self.network, self.fast = network, callback
        self.evaluated = []

    def configure_optimizers(self):
        return self.fast.optimizers()

    def training_step(self, batch, index):
        inputs, labels, *rows = batch
        logits, penalty = self.fast.forward(inputs, *rows)
        return F.cross_entropy(logits, labels) + penalty

    def validation_step(self, batch, index):
        inputs, labels = batch
        self.evaluated.append(copy.deepcopy(self.network.state_dict()))
        self.log("accuracy", (self.network(inputs).argmax(1) == labels).float().mean())


def network():
    """One whose dropout draws random numbers in every step."""
    torch.manual_seed(1)
    model = nn.Sequential(ConvNet(), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 5))
    torch.manual_seed(0)
    return model


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = quiet | {"enable_checkpointing": False, "max_steps": STEPS} | options
    return lightning.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **options)


def fit(options, *callbacks, ckpt_path=None, **trainer_options):
    model = network()
    callback = FastCallback(model, TRAIN, **options)
    module = Classifier(model, callback)
    host = trainer(callback, *callbacks, **trainer_options)
    host.fit(module, callback.loader, ckpt_path=ckpt_path)
    return callback


def loader(data, size=BATCH):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=size)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", RUNS)
def test_the_trainer_gives_the_weights_of_finetune(name):
    callback, model = fit(RUNS[name]), network()
    result = fast.finetune(model, TRAIN, steps=STEPS, **RUNS[name])
    assert same(callback.network, model)
    assert not same(callback.network, fast.replace_head(network(), 4))
    assert callback.result.final["drift"] == result.final["drift"] > 0


def test_accumulated_gradients_are_those_of_one_batch():
    weights = []
    for parts in (1, 2):
        model = copy.deepcopy(network()[0])
        callback = FastCallback(
            model, TRAIN, steps=6, batch_size=BATCH, source_inputs=SOURCE[0], batch_norm="frozen"
        )
        host = trainer(callback, max_steps=6, accumulate_grad_batches=parts)
        host.fit(Classifier(model, callback), callback.loader)
        assert callback.adaptation.done == 6
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


class Checkpoint(lightning.Callback):
    """Saves one in the middle of the run, and may end the process there."""

    def __init__(self, path, step, dies=False):
        self.path, self.step, self.dies = path, step, dies

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            if self.dies:
                raise ConnectionError("the machine is gone")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_the_bit(tmp_path, name):
    """With dropout, in the middle of an epoch, from a checkpoint of Lightning's own."""
    options = RUNS[name] | {"dropout": True}
    whole = fit(options)
    path = tmp_path / "7.ckpt"
    with pytest.raises(ConnectionError):
        fit(options, Checkpoint(path, 7, dies=True))
    torch.manual_seed(99)
    resumed = fit(options, ckpt_path=path)
    assert resumed.adaptation.done == STEPS
    assert same(resumed.network, whole.network)


def test_a_loader_of_ones_own_and_the_length_of_the_run():
    model = network()
    callback = FastCallback(model, TRAIN, source_inputs=SOURCE[0], augmented=True)
    host = trainer(callback, max_steps=-1, max_epochs=3)
    host.fit(Classifier(model, callback), loader(TRAIN))
    assert callback.adaptation.plan.steps == 3 * 7 == callback.adaptation.done


def test_validation_sees_the_average_and_the_source_is_measured(tmp_path):
    model = network()
    callback = FastCallback(
        model, TRAIN, source=SOURCE, source_inputs=SOURCE, lr=1e-2, ramp=0, average=4, steps=20
    )
    module = Classifier(model, callback)
    path = tmp_path / "10.ckpt"
    host = trainer(callback, Checkpoint(path, 10), max_steps=20, val_check_interval=10)
    host.fit(module, callback.loader, loader(VAL, 100))
    assert len(module.evaluated) == 2 + 1  # the first is Lightning's sanity check
    # The checkpoint has the weights that the run went on with, and the average beside them.
    saved = torch.load(path, weights_only=False)
    weights = {k.removeprefix("network."): v for k, v in saved["state_dict"].items()}
    average = next(iter(saved["callbacks"].values()))["adaptation"]["guards"]["WeightAverage"]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    index = names.index("3.linear.weight")
    order = [id(p) for p in callback.adaptation.params]
    place = order.index(id(dict(model.named_parameters())[names[index]]))
    assert torch.equal(module.evaluated[1]["3.linear.weight"], average[str(place)])
    assert not torch.equal(weights["3.linear.weight"], average[str(place)])
    with fast.source_task(model), torch.no_grad():
        kept = (model(SOURCE[0]).argmax(1) == SOURCE[1]).double().mean().item()
    assert host.callback_metrics["source_accuracy"].item() == pytest.approx(kept)
    assert callback.result.source_accuracy == pytest.approx(kept)
    before = network().eval()
    right = (before(SOURCE[0]).argmax(1) == SOURCE[1]).double().mean().item()
    assert callback.result.source_accuracy_before == pytest.approx(right)
    # A later validation changes nothing.
    accuracy = host.validate(module, loader(VAL, 100), verbose=False)[0]["accuracy"]
    assert accuracy == host.callback_metrics["accuracy"].item()
    assert same(callback.result.model, model)


def test_what_does_not_fit_is_refused_by_name():
    model = network()
    with pytest.raises(RuntimeError, match=r"pass it to Trainer\(callbacks="):
        FastCallback(model, TRAIN).optimizers()
    with pytest.raises(ValueError, match="shard: Lightning's strategies wrap the network"):
        FastCallback(model, TRAIN, shard=True)
    callback = FastCallback(network(), TRAIN, steps=4)
    with pytest.raises(ValueError, match="is no part of Classifier"):
        trainer(callback).fit(Classifier(model, callback), loader(TRAIN))
    callback = FastCallback(model, TRAIN, steps=4)
    with pytest.raises(ValueError, match=r"takes 12 steps and the plan .* ends after 4"):
        trainer(callback, max_epochs=9).fit(Classifier(model, callback), loader(TRAIN))
    with pytest.raises(ValueError, match="adapted its network already"):
        trainer(callback).fit(Classifier(model, callback), loader(TRAIN))
    callback = FastCallback(model, TRAIN, steps=4)
    with pytest.raises(ValueError, match="replaced already"):
        trainer(callback).fit(Classifier(model, callback), loader(TRAIN))
    callback = FastCallback(network(), TRAIN, steps=4)
    clips = {"gradient_clip_val": 1.0, "precision": "bf16-mixed", "max_steps": 4}
    with pytest.raises(ValueError, match="leave it out, and pass max_grad_norm=1 to FastCallback"):
        trainer(callback, **clips).fit(Classifier(callback.network, callback), loader(TRAIN))
    callback = FastCallback(network(), TRAIN)
    with pytest.raises(ValueError, match=r"Trainer\(max_steps=\)"):
        trainer(callback, max_steps=-1, max_epochs=-1).fit(
            Classifier(callback.network, callback), loader(TRAIN)
        )


class WithAdam(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (WithAdam, {}, r"WithAdam gives Adam, .* return fast_callback\.optimizers\(\)"),
        (Classifier, {"precision": "bf16-true"}, "casts the weights.*'bf16-mixed'"),
        (
            Classifier,
            {"callback": "StochasticWeightAveraging"},
            "^StochasticWeightAveraging would",
        ),
        (Classifier, {"callback": "EMAWeightAveraging"}, "^EMAWeightAveraging would put"),
        (Classifier, {"callback": "LearningRateFinder"}, "^LearningRateFinder trains .* out .*lr="),
    ],
)
def test_a_trainer_that_would_undo_the_method_is_refused(module, options, message):
    model = network()
    callback, others = FastCallback(model, TRAIN, steps=STEPS), []
    options = dict(options)
    if name := options.pop("callback", None):
        kind = getattr(lightning.pytorch.callbacks, name)
        others = [kind(1e-3)] if name.startswith("Stochastic") else [kind()]
    host = trainer(callback, *others, max_epochs=9, **options)
    with pytest.raises(ValueError, match=message):
        host.fit(module(model, callback), loader(TRAIN))


def test_data_that_a_module_makes_in_setup_come_too_late_for_the_length():
    class Own(Classifier):
        def setup(self, stage):
            self.train_data = TRAIN

        def train_dataloader(self):
            return loader(self.train_data)

    model = network()
    callback = FastCallback(model, TRAIN)
    host = trainer(callback, max_steps=-1, max_epochs=1)
    with pytest.raises(ValueError, match=r"no loader yet .*train_data.*FastCallback\(steps="):
        host.fit(Own(model, callback))
    callback = FastCallback(model, TRAIN, steps=7)
    trainer(callback, max_steps=-1, max_epochs=1).fit(Own(model, callback))
    assert callback.adaptation.done == 7


def test_a_checkpoint_in_the_middle_of_an_evaluation_is_refused(tmp_path):
    """It held the average as the weights, and these as the average."""

    class Saves(Classifier):
        def on_validation_end(self):
            self.trainer.save_checkpoint(tmp_path / "end.ckpt")

    class SavesEarly(Classifier):
        def on_validation_epoch_end(self):
            self.trainer.save_checkpoint(tmp_path / "early.ckpt")

    model = network()
    callback = FastCallback(model, TRAIN, steps=4)
    host = trainer(callback, max_steps=4, num_sanity_val_steps=0, val_check_interval=2)
    host.fit(Saves(model, callback), callback.loader, loader(VAL, 100))
    assert (tmp_path / "end.ckpt").is_file()
    model = network()
    callback = FastCallback(model, TRAIN, steps=4)
    host = trainer(callback, max_steps=4, num_sanity_val_steps=0, val_check_interval=2)
    with pytest.raises(RuntimeError, match=r"middle of an evaluation.* in on_validation_end"):
        host.fit(SavesEarly(model, callback), callback.loader, loader(VAL, 100))


def test_a_network_in_evaluation_mode_is_trained():
    """`from_pretrained` returns one, and Lightning leaves it so: no dropout, no statistics."""
    weights = []
    for training in (True, False):
        model = network().train(training)
        callback = FastCallback(model, TRAIN, **RUNS["none"])
        trainer(callback).fit(Classifier(model, callback), callback.loader)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


def test_a_trainer_that_ends_early_says_so():
    model = network()
    callback = FastCallback(model, TRAIN, steps=40)
    with pytest.warns(UserWarning, match="ends after 12 of the 40 steps"):
        trainer(callback, max_epochs=9).fit(Classifier(model, callback), loader(TRAIN))
    assert callback.result.final["step"] == STEPS


class Manual(Classifier):
    """Two batches make a step, and a layer beside the network has an optimizer of its own."""

    def __init__(self, network, fast):
        super().__init__(network, fast)
        self.automatic_optimization = False
        self.beside = nn.Linear(4, 4)

    def configure_optimizers(self):
        other = torch.optim.SGD(self.beside.parameters(), lr=0.1)
        return [self.fast.optimizer, other], [self.fast.optimizers()["lr_scheduler"]]

    def training_step(self, batch, index):
        inputs, labels, *_ = batch
        logits, penalty = self.fast.forward(inputs)
        self.manual_backward((F.cross_entropy(self.beside(logits), labels) + penalty) / 2)
        if index % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.lr_schedulers().step()


def test_a_module_that_optimizes_manually_says_how_many_steps_it_takes():
    """The Trainer counts a step for each batch, and while it runs one for each optimizer."""
    model = network()
    callback = FastCallback(model, TRAIN)
    with pytest.raises(ValueError, match=r"Manual optimizes manually, .* FastCallback\(steps="):
        trainer(callback, max_steps=-1, max_epochs=2).fit(Manual(model, callback), loader(TRAIN))
    callback = FastCallback(model, TRAIN, steps=6, grad_accum_steps=2)
    trainer(callback, max_steps=-1, max_epochs=2).fit(Manual(model, callback), loader(TRAIN))
    assert callback.adaptation.done == 6  # two epochs of seven batches
    assert callback.result.final["lr"] < callback.adaptation.plan.lr / 2


def test_a_step_of_accumulated_batches_has_a_size_that_they_divide():
    model = network()
    callback = FastCallback(model, TRAIN, batch_size=64)
    host = trainer(callback, max_steps=4, accumulate_grad_batches=3)
    message = r"batch_size=64 .* Trainer\(accumulate_grad_batches=3\).*; 63 or 66 is"
    with pytest.raises(ValueError, match=message):
        host.fit(Classifier(model, callback), loader(TRAIN))
    callback = FastCallback(model, TRAIN)
    host = trainer(callback, max_steps=4, accumulate_grad_batches=3)
    host.fit(Classifier(model, callback), callback.loader)
    assert callback.adaptation.done == 4
    assert callback.adaptation.plan.grad_accum_steps == 3


def test_the_best_checkpoint_is_the_result_once_it_was_tested(tmp_path):
    """`trainer.test(ckpt_path="best")` left the weights of a step, and not their average."""

    class Accuracy(Classifier):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            self.log("chosen", -float(self.trainer.global_step))  # the first is the best

    model = network()
    callback = FastCallback(model, TRAIN, source=SOURCE, source_inputs=SOURCE, lr=1e-2, steps=12)
    best = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="chosen", mode="max")
    module = Accuracy(model, callback)
    host = trainer(callback, best, enable_checkpointing=True, val_check_interval=6)
    host.fit(module, callback.loader, loader(VAL, 100))
    assert callback.result.final["step"] == 12
    host.validate(module, loader(VAL, 100), ckpt_path="best", verbose=False)
    assert callback.result.final["step"] == 6
    _, then, _, again = module.evaluated
    now = model.state_dict()
    for name in ("0.project.weight", "3.linear.weight"):
        assert torch.equal(now[name], then[name])
        assert torch.equal(again[name], then[name])
    assert not callback.result.model.training


def test_a_module_that_is_the_network_and_holds_the_callback_is_saved(tmp_path):
    """To save a network is to copy it, and the copy went into the callback and the Trainer."""

    class Whole(Classifier):
        def __init__(self):
            super().__init__(network(), None)
            self.fast = FastCallback(self, TRAIN)

        def forward(self, x):
            return self.network(x)

    module = Whole()
    trainer(module.fast, max_steps=2).fit(module, loader(TRAIN))
    module.fast.result.save(tmp_path)
    again = fast.load(tmp_path, Whole())
    answers = module.fast.result.predict(VAL[0]).logits
    assert torch.allclose(again.predict(VAL[0]).logits, answers, atol=1e-4)
