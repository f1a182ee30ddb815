"""Muon's steps have singular values near 1, equal a reference's, and its other weights are AdamW's."""

import copy

import pytest
import torch
from torch import nn

from tiny_diffusers.training.muon import Muon, orthogonal_factors, split_parameters


def _reference(matrix):
    """The five iterations as published, in float64."""
    X = matrix.double() / matrix.double().norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.float()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 72), (2, 72, 8), (1, 1, 5), (2, 64, 576)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    left, right = orthogonal_factors(matrices)
    steps = left @ right
    for matrix, step in zip(matrices, steps, strict=True):
        torch.testing.assert_close(step, _reference(matrix), atol=1e-4, rtol=1e-3)
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        values = U.T @ step @ Vh.T
        torch.testing.assert_close(values, values.diagonal().diag(), atol=1e-3, rtol=0)
        values = values.diagonal()[S > 0.02 * S.norm()]  # smaller ones are on their way
        assert len(values) and 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e10])
def test_gradients_of_any_size_have_a_finite_step(scale):
    left, right = orthogonal_factors(torch.ones(1, 4, 6) * scale)  # of rank one, or zero
    assert torch.isfinite(left @ right).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_that_of_the_published_equations(memory_format):
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 3)])
    module.append(nn.Conv2d(6, 4, 1)).to(memory_format=memory_format)
    expected = copy.deepcopy(module)
    optimizer = Muon(*split_parameters(module), lr=0.01, weight_decay=0.1, fused=True)
    _, others = split_parameters(expected)
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    buffers = [torch.zeros_like(layer.weight) for layer in expected[1:-1]]
    for _ in range(3):
        for parameter, other in zip(module.parameters(), expected.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape)  # contiguous, as a hook may leave it
            other.grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        for layer, buffer in zip(expected[1:-1], buffers, strict=True):
            buffer.mul_(0.95).add_(layer.weight.grad, alpha=0.05)
            update = _reference((0.05 * layer.weight.grad + 0.95 * buffer).flatten(1))
            scale = 0.2 * max(update.shape) ** 0.5
            layer.weight.data = 0.999 * layer.weight - 0.01 * scale * update.view_as(layer.weight)
    for parameter, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4)


def test_weights_without_a_gradient_stay():
    module = nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(3)])
    before = copy.deepcopy(module.state_dict())
    Muon(*split_parameters(module)).step()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_all_convolutions_but_the_first_and_the_last_are_matrices():
    inner = nn.Conv2d(4, 4, 3)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), inner, nn.Linear(4, 4), nn.Conv2d(4, 1, 3))
    matrices, others = split_parameters(module)
    assert len(matrices) == 1 and matrices[0] is inner.weight
    assert len(others) == len(list(module.parameters())) - 1


def test_a_matrix_of_bad_condition_is_learned_faster_than_by_adamw():
    """M of |(M - T) D|^2 for D of condition 1,000, as convolutions after correlated features are."""
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16))
    D, target = rotation @ torch.logspace(-3, 0, 16).diag(), torch.randn(16, 16) / 4
    distances = []
    for make in (lambda p, lr: Muon([p], [], lr), lambda p, lr: torch.optim.AdamW([p], lr)):
        best = []
        for lr in (0.01, 0.03, 0.1):
            weight = nn.Parameter(torch.zeros(16, 16, 1, 1))
            optimizer = make(weight, lr)
            for step in range(100):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - step / 100)
                ((weight[..., 0, 0] - target) @ D).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            best.append(float((weight.detach()[..., 0, 0] - target).norm()))
        distances.append(min(best))
    assert distances[0] < 0.8 * distances[1], distances
