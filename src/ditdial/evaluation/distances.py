"""Distances between two sets of images, taken between their features, and the noise of each.

Frechet distance: 1706.08500, equation 6. Kernel distance, an unbiased squared MMD with a cubic
kernel: 1801.01401. Both are torchmetrics', given features instead of images;
`frechet_from_statistics` is the same Frechet distance between stored means and covariances, so that
a reference set need not be shipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ditdial.host import tensor_files
from ditdial.plain.checks import require


class _PassThrough(nn.Module):
    """Stands where torchmetrics expects a network: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real_feats: Tensor, fake_feats: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, in float64.

    Biased upwards by small sets: compare only values taken at equal sample counts, well above the
    feature width.

    Args:
        real_feats: ``(n, d)``.
        fake_feats: ``(m, d)``.

    Raises:
        ValueError: fewer than 2 samples, different widths, NaN or infinity.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check_pair(real_feats, fake_feats)
    metric = FrechetInceptionDistance(feature=_PassThrough(real_feats.shape[1]))
    metric = metric.to(real_feats.device)
    # The metric sums in float64 but hands its result back in the dtype of the features.
    metric.update(real_feats.double(), real=True)
    metric.update(fake_feats.double(), real=False)
    return metric.compute().item()


def kernel_distance(
    real_feats: Tensor,
    fake_feats: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Squared kernel distance with ``k(x, y) = (x.y / d + 1)^3``, in float64.

    The mean over random subsets. Unbiased at any sample count, hence negative about half the time
    when both sets come from one distribution.

    Args:
        real_feats: ``(n, d)``.
        fake_feats: ``(m, d)``.
        subsets: how many random subsets to average over.
        subset_size: samples drawn from each set for one subset.
        seed: chooses the subsets; torch's global random state is left as it was.

    Raises:
        ValueError: fewer than 2 samples or than ``subset_size``, different widths, NaN or infinity.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check_pair(real_feats, fake_feats)
    smallest = min(len(real_feats), len(fake_feats))
    legal = f"2..{smallest}, the size of the smaller set"
    require(2 <= subset_size <= smallest, "subset_size", subset_size, legal)
    require(subsets >= 1, "subsets", subsets, ">= 1")
    with warnings.catch_warnings():
        # It warns that it will keep all features in memory; ours are there before it.
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        metric = KernelInceptionDistance(
            feature=_PassThrough(real_feats.shape[1]), subsets=subsets, subset_size=subset_size
        )
    metric = metric.to(real_feats.device)
    metric.update(real_feats.double(), real=True)
    metric.update(fake_feats.double(), real=False)
    # The metric draws its subsets from the global CPU generator and cannot be given another.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, _ = metric.compute()
    return mean.item()


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStatistics:
    """What a Frechet distance needs to know of a set of features.

    Args:
        mean: float64 ``(d,)``.
        covariance: float64 ``(d, d)``, symmetric, unbiased (divided by ``count - 1``).
        count: samples they were taken from.
        features: name of the feature network, as `load_features` takes it.

    Raises:
        ValueError: shapes or dtypes that do not fit, a count below 2, NaN or infinity.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    features: str = ""

    def __post_init__(self) -> None:
        require(self.count >= 2, "count", self.count, ">= 2 samples")
        require(self.mean.ndim == 1, "shape of mean", tuple(self.mean.shape), "(d,)")
        width = len(self.mean)
        shape = tuple(self.covariance.shape)
        require(shape == (width, width), "shape of covariance", shape, f"({width}, {width})")
        for name in ("mean", "covariance"):
            value = getattr(self, name)
            require(value.dtype == torch.float64, f"dtype of {name}", value.dtype, "torch.float64")
            _check_finite(value, name)

    @classmethod
    def of(cls, feats: Tensor, features: str = "") -> FeatureStatistics:
        """Statistics of features ``(n, d)``, computed in float64.

        Raises:
            ValueError: fewer than 2 samples, NaN or infinity.
        """
        _check(feats, "features")
        feats = feats.double()
        covariance = torch.cov(feats.T).reshape(feats.shape[1], feats.shape[1])
        return cls(
            mean=feats.mean(dim=0), covariance=covariance, count=len(feats), features=features
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, complete or not at all."""
        tensors = {
            "mean": self.mean.contiguous(),
            "covariance": self.covariance.contiguous(),
            "count": torch.tensor(self.count),
        }
        tensor_files.save(path, tensors, {"features": self.features})

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a safetensors file of something else.
        """
        tensors, metadata = tensor_files.load(path)
        names, legal = sorted(tensors), "['count', 'covariance', 'mean']"
        require(str(names) == legal, f"tensors in {str(path)!r}", names, legal)
        return cls(
            mean=tensors["mean"],
            covariance=tensors["covariance"],
            count=int(tensors["count"]),
            features=metadata.get("features", ""),
        )


def frechet_from_statistics(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance between two Gaussians, in float64.

    ``|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (R S_b R)^(1/2)`` with ``R = S_a^(1/2)``. The
    product in the last term is symmetric, so its eigenvalues are real and accurate even where there
    are fewer samples than features; those of ``S_a S_b`` are the same in exact arithmetic only.

    Raises:
        ValueError: different widths, or features of two different networks.
    """
    require(
        len(a.mean) == len(b.mean), "feature width", len(b.mean), f"{len(a.mean)}, as the other set"
    )
    if a.features and b.features:
        require(
            a.features == b.features, "features", b.features, f"{a.features!r}, as the other set"
        )
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return (apart + a.covariance.trace() + b.covariance.trace() - 2 * overlap).item()


def with_noise(
    metric: Callable[[Tensor], float], feats: Tensor, groups: int, *, seed: int = 0
) -> tuple[float, float]:
    """A metric and its own noise, without which a difference between two rows means nothing.

    The groups are smaller than the whole set, so this overstates the noise of the value.

    Args:
        metric: takes features ``(n, d)``, e.g. ``functools.partial(frechet_distance, real_feats)``.
        feats: ``(n, d)``.
        groups: disjoint groups of equal size; what is left over is used in the value only.
        seed: chooses the groups. They are random, since sampled sets are often ordered by class.

    Returns:
        The metric of all samples, and the standard deviation of the metric over the groups.

    Raises:
        ValueError: fewer than 2 samples in a group, fewer than 2 groups, NaN or infinity.
    """
    _check(feats, "features")
    most = len(feats) // 2
    require(
        2 <= groups <= most, "groups", groups, f"2..{most}, for 2 samples in each of {len(feats)}"
    )
    order = torch.randperm(len(feats), generator=torch.Generator().manual_seed(seed))
    size = len(feats) // groups
    chosen = order.to(feats.device)[: groups * size].reshape(groups, size)
    values = [metric(feats[rows]) for rows in chosen]
    return metric(feats), torch.tensor(values, dtype=torch.float64).std().item()


def _check_pair(real_feats: Tensor, fake_feats: Tensor) -> None:
    _check(real_feats, "real features")
    _check(fake_feats, "fake features")
    real, fake = real_feats.shape[1], fake_feats.shape[1]
    require(real == fake, "width of fake features", fake, f"{real}, as the real features")


def _check(feats: Tensor, name: str) -> None:
    shaped = feats.ndim == 2 and feats.shape[1] >= 1 and feats.is_floating_point()
    require(shaped, name, f"{feats.dtype} {tuple(feats.shape)}", "floats (n, d)")
    require(len(feats) >= 2, f"number of {name}", len(feats), ">= 2 samples")
    _check_finite(feats, name)


def _check_finite(values: Tensor, name: str) -> None:
    broken = int((~values.isfinite()).sum())
    require(broken == 0, f"NaN or infinite values in {name}", broken, "0")
