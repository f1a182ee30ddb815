"""
The Muon optimizer (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for convolutional networks and
transformers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose iterates bring singular values near 1, quickly
_NUM_ITERATIONS = 5
_EPS = 1e-14  # in the squared norm of a matrix
_UPDATE_RMS = 0.2  # of a step at learning rate 1, as AdamW's (arXiv 2502.16982, equation 4)


class Muon(torch.optim.Optimizer):
    """
    Muon for some weights, AdamW for the others, at one learning rate.

    A weight of shape (out, ...) is a matrix M of `out` rows. Its momentum is replaced by the nearest orthogonal matrix,
    so that every direction is learned at the same pace, and scaled so that its elements have the RMS of AdamW's steps:

        B <- momentum B + (1 - momentum) G
        M <- (1 - lr weight_decay) M - lr 0.2 sqrt(max(rows, columns)) orthogonalize(momentum B + (1 - momentum) G)

    Args:
        matrices (`Iterable[nn.Parameter]`): Weights of two or more dimensions, which Muon trains.
        others (`Iterable[nn.Parameter]`): Those that AdamW trains.
        lr (`float`): The learning rate of both.
        momentum (`float`): Muon's momentum, of Nesterov's kind.
        betas (`tuple[float, float]`), eps (`float`): AdamW's.
        weight_decay (`float`): The decoupled weight decay of both.
        fused (`bool`): Use torch's fused kernel for AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = False,
    ):
        groups = [
            {"params": list(matrices), "momentum": momentum},
            {"params": list(others), "betas": betas, "eps": eps, "fused": fused},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Takes a step; `closure`, if given, computes the loss and the gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, others = self.param_groups
        self._step_muon(matrices, [p for p in matrices["params"] if p.grad is not None])
        self._step_adamw(others, [p for p in others["params"] if p.grad is not None])
        return loss

    def _step_muon(self, group: dict[str, Any], weights: list[nn.Parameter]) -> None:
        by_shape = defaultdict(list)
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            by_shape[_as_matrix(weight).shape].append(weight)

        momentum, decay = group["momentum"], group["lr"] * group["weight_decay"]
        for (rows, columns), weights in by_shape.items():
            matrices = weights[0].new_empty(len(weights), rows, columns)
            for weight, matrix in zip(weights, matrices, strict=True):
                buffer = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                out = matrix.as_strided(weight.shape, weight.stride(), matrix.storage_offset())
                torch.lerp(weight.grad, buffer, momentum, out=out)
            step = -group["lr"] * _UPDATE_RMS * max(rows, columns) ** 0.5
            for weight, *factors in zip(weights, *orthogonal_factors(matrices), strict=True):
                _as_matrix(weight).addmm_(*factors, beta=1 - decay, alpha=step)

    def _step_adamw(self, group: dict[str, Any], weights: list[nn.Parameter]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["step"] = torch.zeros((), device=weight.device if group["fused"] else "cpu")
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
                self.state[weight]["exp_avg_sq"] = torch.zeros_like(weight)
        states, (beta1, beta2) = [self.state[weight] for weight in weights], group["betas"]
        adamw(
            weights,
            [weight.grad for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """
    Splits a network's parameters into those that Muon trains and the others. Muon trains the weights of all convolutions
    but the first and the last or, in a network without convolutions, of the linear layers in its repeated blocks. Others
    are first and last layers, embeddings, norms, biases, and linear layers beside convolutions.
    """
    parameters = list(module.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim == 4]
    if matrices:
        matrices = matrices[1:-1]
    else:
        names = getattr(module, "_repeated_blocks", None) or ()
        blocks = [block for block in module.modules() if type(block).__name__ in names]
        matrices = [parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2]
    matrices = dict.fromkeys(matrices)
    return list(matrices), [parameter for parameter in parameters if parameter not in matrices]


def orthogonal_factors(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns two factors of the nearest orthogonal matrices, roughly: singular values become 0.7 to 1.2, but for those below a
    hundredth of the largest, and singular vectors stay.

    Newton-Schulz iterates X <- (a + b X X^T + c (X X^T)^2) X, from X over its norm. Every iterate is a polynomial of the
    first X X^T, times the first X: so the polynomial alone is computed, of the smaller one of X X^T and X^T X.

    Args:
        matrices (`torch.Tensor` of shape `(N, rows, columns)`): The matrices X.
    """
    is_wide = matrices.shape[1] <= matrices.shape[2]
    gram = matrices @ matrices.mT if is_wide else matrices.mT @ matrices  # (N, size, size)
    square_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + _EPS
    gram = gram / square_norm
    polynomial = _quintic(gram)
    product = polynomial * square_norm.rsqrt()
    for _ in range(_NUM_ITERATIONS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _quintic(gram)
        product = polynomial @ product
    return (product, matrices) if is_wide else (matrices, product)


def _quintic(gram: torch.Tensor) -> torch.Tensor:
    """Computes a I + b X X^T + c (X X^T)^2."""
    a, b, c = _COEFFICIENTS
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Views a weight (rows, ...) as (rows, columns), the columns in the order of the memory, which Muon is free of."""
    rows = weight if weight.is_contiguous() else weight.movedim(1, -1)  # channels last
    return rows.view(len(weight), -1)
