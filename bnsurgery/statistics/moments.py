"""Per-channel moments that merge exactly, however the data was split."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Count, mean and centred sum of squares of each channel.

    Attributes:
        count: samples per channel, N·H·W.
        mean: μ, shape (C,), float64, in activation units.
        m2: Σ(x − μ)², shape (C,), float64, in activation units squared.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance σ² = m2 / count, shape (C,), float64: no Bessel correction."""
        return self.m2 / self.count

    def merge(self, other: "ChannelMoments") -> "ChannelMoments":
        """The moments of both samples together.

        m2 = m2ₐ + m2_b + δ²·nₐ·n_b/n with δ = μ_b − μₐ. No large sums are subtracted.

        References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1.
        """
        if not other.count:
            return self
        count, delta = self.count + other.count, other.mean - self.mean
        share = other.count / count
        m2 = self.m2 + other.m2 + delta * delta * (self.count * share)
        return ChannelMoments(count, self.mean + delta * share, m2)


def digest(moments: Mapping[str, ChannelMoments]) -> str:
    """SHA-256 of all moments by site name: equal for two calibrations if all their bits are."""
    sha = hashlib.sha256()
    for name, site in moments.items():
        sha.update(f"{name}\0{site.count}\0".encode())
        sha.update(torch.stack([site.mean, site.m2]).to(torch.float64).numpy().tobytes())
    return sha.hexdigest()
