"""BatchNorm against the paper's equations in float64, and what the toggles put where."""

import copy
import itertools

import pytest
import torch
from networks import IMAGES, MODEL, NETWORKS, build
from torch import nn

from gaplab.nn.blocks import ACTIVATION_CLASSES, ACTIVATIONS, Layers, Normalize
from gaplab.nn.build import build_network


def norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


@pytest.mark.parametrize("shape", [(16, 5), (16, 5, 7, 3)])
def test_batchnorm_is_the_papers(shape):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 2
    norm = Layers(bn=True, bn_eps=1e-5, bn_momentum=0.25).norm_before(5, len(shape) // 2).double()
    axes = [axis for axis in range(len(shape)) if axis != 1]
    view = (1, 5) + (1,) * (len(shape) - 2)
    mean, biased = x.mean(axes), x.var(axes, correction=0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(5, generator=generator, dtype=torch.float64))
        norm.bias.copy_(torch.randn(5, generator=generator, dtype=torch.float64))
    alpha, beta = norm.weight.view(view), norm.bias.view(view)
    expected = alpha * (x - mean.view(view)) / (biased.view(view) + 1e-5).sqrt() + beta
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    # running statistics: the unbiased variance, weighted by the momentum, from 0 and 1
    torch.testing.assert_close(norm.running_mean, 0.25 * mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * x.var(axes, correction=1), rtol=0, atol=1e-12)
    norm.eval()
    population = (x - norm.running_mean.view(view)) / (norm.running_var.view(view) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), alpha * population + beta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 5), (16, 5, 7, 3)])
def test_alpha_root_of_variance_and_beta_mean_give_the_identity(shape):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    axes = [axis for axis in range(len(shape)) if axis != 1]
    norm = Layers(bn=True).norm_before(5, len(shape) // 2).double()
    with torch.no_grad():
        norm.weight.copy_((x.var(axes, correction=0) + norm.eps).sqrt())
        norm.bias.copy_(x.mean(axes))
    torch.testing.assert_close(norm(x), x, rtol=0, atol=1e-12)


def test_scaling_the_weights_before_batchnorm_changes_nothing_and_shrinks_the_gradient():
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = Layers(bn=True, bn_eps=1e-30, activation="tanh").dense_block(8, 4).double()
    outputs, gradients = [], []
    for _ in range(2):
        block.zero_grad()
        outputs.append(block(x))
        outputs[-1].square().sum().backward()
        gradients.append(block[0].weight.grad.clone())
        with torch.no_grad():
            block[0].weight.mul_(8)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0] / 8, gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "position"), list(itertools.product(NETWORKS, ["before_activation", "after_activation"]))
)
def test_bn_toggles_in_every_network(name, position):
    plain, normalized = build(name, bn_position=position), build(name, bn=True, bn_position=position)
    assert norms(plain) == []
    assert norms(normalized)
    for network in (plain, normalized):
        assert network(IMAGES).shape == (6, 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_have_a_bias_exactly_where_no_batchnorm_follows_directly(name):
    def biases(**toggles: object) -> set[bool]:
        layers = [module for module in build(name, **toggles).modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        *hidden, head = layers
        assert head.bias is not None
        return {layer.bias is not None for layer in hidden}

    assert biases(bn=True) == {False}
    assert biases(bn=True, bn_position="after_activation") == {True}
    assert biases(bn=False) == {True}


def test_bn_position_decides_what_is_normalized():
    before, after = (
        [type(module) for module in Layers(bn=True, bn_position=f"{place}_activation").dense_block(3, 4)]
        for place in ("before", "after")
    )
    assert before == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert after == [nn.Linear, nn.ReLU, nn.BatchNorm1d]


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_acts_in_training_and_is_the_identity_in_evaluation(name):
    network = build(name, dropout=0.5)
    assert torch.equal(network.eval()(IMAGES), build(name).eval()(IMAGES))
    assert not torch.equal(network.train()(IMAGES), network(IMAGES))


@pytest.mark.parametrize("name", NETWORKS)
def test_within_a_block_dropout_comes_after_the_last_batchnorm(name):
    blocks = [module for module in build(name, bn=True, dropout=0.5).modules() if isinstance(module, nn.Sequential)]
    orders = [[type(child) for child in block] for block in blocks]
    orders = [order[order.index(nn.Dropout) :] for order in orders if nn.Dropout in order]
    assert all(not {nn.BatchNorm1d, nn.BatchNorm2d} & set(order) for order in orders)
    assert orders or name in ("resnet8", "resnet18")  # theirs stands alone before the head


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_torchs_own(activation):
    x = torch.linspace(-2, 2, 9)
    found = Layers(activation=activation).activation()(x.clone())
    assert torch.equal(found, getattr(torch.nn.functional, activation)(x))
    assert isinstance(Layers(activation=activation).activation(), ACTIVATION_CLASSES)


def test_normalize_is_the_standard_score_and_travels_with_the_weights():
    normalize = Normalize(3)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 0.25, 0.125]).double()
    normalize.set_(mean, std)
    expected = (IMAGES.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(normalize(IMAGES).double(), expected, rtol=0, atol=1e-6)
    other = Normalize(3)
    other.load_state_dict(normalize.state_dict())
    assert torch.equal(other(IMAGES), normalize(IMAGES))
    assert not other.binary
    floats = IMAGES.float()
    normalize(floats)
    assert torch.equal(floats, IMAGES.float())  # the caller's tensor is left alone


def test_binary_pixels_are_those_above_half_of_the_range_and_travel_with_the_weights():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    network = build_network(MODEL | NETWORKS["mlp"], (1, 16, 16), 10)
    network.normalize.set_(torch.zeros(1), torch.ones(1), binary=True)
    again = build_network(MODEL | NETWORKS["mlp"], (1, 16, 16), 10, seed=1)
    again.load_state_dict(network.state_dict())
    for one in (network, again, copy.deepcopy(again).double()):
        found = one.normalize(levels)
        assert found.dtype == one.body.head.weight.dtype
        assert torch.equal(found, (levels > 127).to(found.dtype))
        assert found.sum() == 128
    assert torch.equal(network(levels), again(levels))
    again.load_state_dict(build_network(MODEL | NETWORKS["mlp"], (1, 16, 16), 10).state_dict())
    assert again.normalize(levels).unique().numel() == 256
