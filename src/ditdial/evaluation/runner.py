"""Judge sampled pictures: distribution, class accuracy, likeness to the full run; each with noise.

Every figure is taken over several disjoint sets of seeds of equal size. Its value is the mean over
the sets, its noise the standard error of that mean. Rows of the same seeds are compared by
`Figure.minus`; a difference of less than twice its noise tells nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.evaluation.distances import (
    FeatureStatistics,
    frechet_from_statistics,
    kernel_distance,
)
from ditdial.evaluation.features import ClassifierFeatures, SmallClassifier, load_features
from ditdial.evaluation.pairwise import psnr, ssim
from ditdial.host import tensor_files
from ditdial.plain.checks import require


@dataclass(frozen=True)
class Figure:
    """A metric, its noise over disjoint sets of seeds, and its value in each set."""

    value: float
    noise: float
    sets: tuple[float, ...]

    @classmethod
    def over(cls, values: list[float]) -> Figure:
        """Mean and its standard error; the noise of a single value is NaN, that is, unknown."""
        numbers = torch.tensor(values, dtype=torch.float64)
        noise = numbers.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(numbers.mean().item(), noise, tuple(values))

    def minus(self, other: Figure) -> Figure:
        """The difference, set by set: pictures of the same seeds share most of their noise.

        Raises:
            ValueError: another number of sets.
        """
        count = len(self.sets)
        require(len(other.sets) == count, "number of sets", len(other.sets), str(count))
        return Figure.over([a - b for a, b in zip(self.sets, other.sets, strict=True)])


class Judge:
    """Metrics against one reference set in one feature space.

    Args:
        features: what `ditdial.evaluation.features.load_features` takes.
        statistics: of the reference set, in those features.
        real: features ``(n, d)`` of some of the reference set, for the kernel distance.
        classifier: for class accuracy; the feature network itself if it is a classifier.
    """

    def __init__(
        self,
        features: str,
        statistics: FeatureStatistics,
        real: Tensor | None = None,
        classifier: SmallClassifier | None = None,
    ) -> None:
        self.network, self.features = load_features(features)
        if classifier is None and isinstance(self.network, ClassifierFeatures):
            classifier = self.network.classifier
        self.statistics, self.real, self.classifier = statistics, real, classifier

    @classmethod
    def load(cls, features: str, path: str | Path) -> Judge:
        """A judge with the reference set that `save_reference_set` wrote."""
        tensors, _ = tensor_files.load(path)
        statistics = FeatureStatistics(
            mean=tensors["mean"], covariance=tensors["covariance"], count=int(tensors["count"])
        )
        return cls(features, statistics, tensors["sample"].float())

    @torch.no_grad()
    def judge(
        self, images: Tensor, labels: list[int], *, sets: int = 4, full: Tensor | None = None
    ) -> dict[str, Figure]:
        """All figures of some pictures.

        Args:
            images: ``(n, C, H, W)`` in [0, 1], in the order of their seeds.
            labels: the class each was asked for.
            sets: disjoint sets of seeds the pictures are split into, in order.
            full: the same seeds in full mode, for PSNR and SSIM.

        Raises:
            ValueError: fewer than 2 pictures per set, or labels that do not match.
        """
        require(1 <= sets <= len(images) // 2, "sets", sets, f"1..{len(images) // 2}")
        require(len(labels) == len(images), "number of labels", len(labels), f"{len(images)}")
        size = len(images) // sets
        feats = torch.cat([self.network(part) for part in images.split(250)])
        figures: dict[str, list[float]] = {"frechet": []}
        wanted = torch.tensor(labels)
        for start in range(0, sets * size, size):
            rows = slice(start, start + size)
            statistics = FeatureStatistics.of(feats[rows])
            figures["frechet"].append(frechet_from_statistics(self.statistics, statistics))
            if self.real is not None:
                subset = min(1000, size, len(self.real))
                distance = kernel_distance(self.real, feats[rows], subset_size=subset)
                figures.setdefault("kernel", []).append(distance)
            if self.classifier is not None:
                guess = torch.cat([self.classifier(x) for x in images[rows].split(250)])
                right = (guess.argmax(dim=1) == wanted[rows]).float().mean().item()
                figures.setdefault("accuracy", []).append(right)
            if full is not None:
                figures.setdefault("psnr", []).append(psnr(images[rows], full[rows]).mean().item())
                figures.setdefault("ssim", []).append(ssim(images[rows], full[rows]).mean().item())
        return {name: Figure.over(values) for name, values in figures.items()}


@torch.no_grad()
def save_reference_set(
    network: nn.Module, images: Tensor, path: str | Path, *, sample: int = 2000
) -> None:
    """Write statistics and some features of real pictures ``(n, C, H, W)`` in [0, 1].

    Args:
        network: whose features they are; `Judge.load` has to be given the same.
        path: a safetensors file.
        sample: pictures, drawn with a fixed seed, whose features are kept for the kernel distance,
            in half precision.
    """
    feats = torch.cat([network(part) for part in images.split(250)])
    statistics = FeatureStatistics.of(feats)
    chosen = torch.randperm(len(feats), generator=torch.Generator().manual_seed(0))[:sample]
    tensors = {
        "mean": statistics.mean,
        "covariance": statistics.covariance.contiguous(),
        "count": torch.tensor(statistics.count),
        "sample": feats[chosen].half().contiguous(),
    }
    tensor_files.save(path, tensors)


def as_row(figures: dict[str, Figure], **facts: Any) -> dict[str, Any]:
    """One flat row of a results file: facts, values, noises and the values of each set.

    Args:
        figures: by name; ``frechet`` becomes ``frechet``, ``frechet_noise`` and ``frechet_sets``.
        facts: first in the row.
    """
    row = dict(facts)
    for name, figure in figures.items():
        row[name], row[f"{name}_noise"] = figure.value, figure.noise
        row[f"{name}_sets"] = list(figure.sets)
    return row
