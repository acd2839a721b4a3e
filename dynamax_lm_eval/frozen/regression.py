"""Ridge regression with an intercept from second moments, which are summed batch by batch: nothing is kept of tokens.

T tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens of inputs x, of outputs y, and of products."""

    count: Tensor  # ()
    x: Tensor  # (D,)
    y: Tensor  # (O,)
    xx: Tensor  # (D, D)
    xy: Tensor  # (D, O)

    @classmethod
    def zero(cls, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> Moments:
        """Returns the sums over nothing, for D inputs and O outputs."""
        sizes = ((), (inputs,), (outputs,), (inputs, inputs), (inputs, outputs))
        return cls(*(torch.zeros(size, dtype=dtype, device=device) for size in sizes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds tokens: inputs (T, D) and outputs (T, O)."""
        x, y = (part.to(self.xx) for part in (x, y))
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def added_up(self, add_up: Callable[[Tensor], Tensor]) -> Moments:
        """Returns the sums over several processes, which ``add_up`` adds up tensor by tensor."""
        return Moments(*map(add_up, (self.count, self.x, self.y, self.xx, self.xy)))

    @property
    def mean_square(self) -> float:
        """The mean square of a coordinate of x."""
        return float(self.xx.diagonal().double().mean() / self.count)

    @property
    def covariance(self) -> Tensor:
        """That of x, (D, D), in float64."""
        mean = self.x.double() / self.count
        return self.xx.double() / self.count - torch.outer(mean, mean)

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Returns A (O, D) and b (O,) with the least mean of |y - A x - b|^2 + ``penalty`` * |A|^2, in float64.

        b is free. A penalty of 0 with too few tokens for one solution gives the one with the least A.
        """
        mean_x, mean_y = self.x.double() / self.count, self.y.double() / self.count
        xy = self.xy.double() / self.count - torch.outer(mean_x, mean_y)
        values, vectors = torch.linalg.eigh(self.covariance)
        values = values.clamp(min=0) + penalty
        usable = values > values.max() * 1e-12
        inverse = torch.where(usable, 1 / values.where(usable, values.new_ones(())), values.new_zeros(()))
        a = (vectors @ (inverse[:, None] * (vectors.T @ xy))).T
        return a, mean_y - a @ mean_x
