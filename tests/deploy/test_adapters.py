"""A network with adapters, after it was saved and loaded."""

import pytest
import torch

import fast
from networks import ConvNet, images


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The result of a run with adapters, its folder, and its inputs."""
    x, y = images(64, 4, seed=1)
    torch.manual_seed(0)
    result = fast.finetune(
        ConvNet(), (x, y), (x, y), images(40, 5, seed=2), method="adapter", steps=6, lr=1e-2
    )
    folder = tmp_path_factory.mktemp("adapters") / "run"
    result.save(folder)
    return result, folder, x


def test_both_tasks_are_answered_as_before_saving(adapted):
    result, folder, x = adapted
    assert (folder / "adapters.safetensors").is_file()
    loaded = fast.load(folder, ConvNet(3))
    own, again = (p.predict(x).logits for p in (result, loaded))
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)  # its head was folded
    own, again = (p.predict(x, task="source").logits for p in (result, loaded))
    assert torch.equal(again, own)
    before = fast.load(folder, ConvNet()).evaluate(images(40, 5, seed=2), task="source")
    assert before.accuracy == result.source_accuracy == result.source_accuracy_before


@pytest.mark.parametrize("format", ["safetensors", "torch.export"])
def test_an_export_has_the_adapters_in_its_weights(adapted, tmp_path, format):
    result, folder, x = adapted
    fast.load(folder, ConvNet()).export(tmp_path / "served", format)
    answers = result.predict(x).logits
    if format == "torch.export":
        network = torch.export.load(tmp_path / "served" / "model.pt2").module()
    else:
        tensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
        network = ConvNet(4).eval()
        network.load_state_dict(tensors.load_file(tmp_path / "served" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(network(x), answers, rtol=1e-4, atol=1e-5)


def test_onnx_has_them_too(adapted, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="ONNX needs it")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was written")
    result, folder, x = adapted
    fast.load(folder, ConvNet()).export(tmp_path / "served", "onnx")
    session = runtime.InferenceSession(str(tmp_path / "served" / "model.onnx"))
    (answers,) = session.run(["logits"], {"input": x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(answers), result.predict(x).logits, rtol=1e-3, atol=1e-4
    )
