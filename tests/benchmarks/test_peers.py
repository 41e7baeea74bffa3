"""The peers' models: twins of the right shape, and a peer that fails."""

import numpy as np
import torch
from torch import nn

from benchmarks import peers, zoo


def test_onnx_runtime_computes_what_the_twin_does():
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8)).eval()
    x = torch.randn(1, 3, 10, 10)
    found, missing = peers.runners(twin, x, which=("ORT fp32", "ORT int8"))
    assert not missing
    exact, rounded = (np.asarray(found[name]()[0]) for name in ("ORT fp32", "ORT int8"))
    expected = twin(x).detach().numpy()
    # Sums of 27 products of floats in another order; and activations in 256 steps over a range of about 6.
    assert np.abs(exact - expected).max() < 1e-5
    assert 0 < np.abs(rounded - expected).max() < 0.2


def test_a_peer_that_fails_is_missing_with_its_reason(monkeypatch):
    def fails(model, x):
        raise RuntimeError("no compiler\nfor this machine")

    monkeypatch.setattr(peers, "_compiled", fails)
    layer = nn.Sequential(nn.ReLU())
    found, missing = peers.runners(layer, torch.randn(2, 2), which=("torch fp32", "torch.compile"))
    assert list(found) == ["torch fp32"]
    assert missing == {"torch.compile": "RuntimeError: no compiler"}


def test_a_float_twin_has_the_weights_of_its_network_as_signs_and_no_other_sign():
    from benchmarks import bitorch_networks as networks

    model, _ = networks.build("QuickNetSmall", side=64)
    twin = zoo.float_twin(networks.build("QuickNetSmall", side=64)[0])
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() == 4}
    signs = [name for name, weight in twin.named_parameters() if weight.dim() == 4 and "qconv" in name]
    assert len(signs) == 16
    for name in signs:
        twin_weight = twin.get_parameter(name)
        assert torch.equal(twin_weight.abs(), torch.ones_like(twin_weight))
        assert torch.equal(twin_weight >= 0, weights[name] >= 0)
    assert not [node for node in twin.graph.nodes if "sign" in str(node.target)]


def test_melius_net_has_as_many_binary_products_as_larq_zoo_s():
    """Improvement blocks and all, as `larq.models.ModelProfile` counts larq-zoo's MeliusNet22."""
    from bitorch.layers.qconv2d import QConv2d_NoAct

    sizes: list[int] = []

    def count(layer, inputs, output):
        sizes.append(output.numel() * layer.in_channels * layer.kernel_size[0] ** 2)

    model, image = zoo.melius_net_22()
    binary = [module for module in model.modules() if isinstance(module, QConv2d_NoAct)]
    for module in binary:
        module.register_forward_hook(count)
    with torch.no_grad():
        model(image)
    assert len(binary) == len(sizes) == 2 * (4 + 5 + 4 + 4)
    assert sum(sizes) == 4_624_220_160
