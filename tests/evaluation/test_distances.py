"""Distances: closed-form Gaussians, identities, agreement of the two Frechet forms, round trips."""

from functools import partial

import pytest
import torch

from ditdial.evaluation.distances import (
    FeatureStatistics,
    frechet_distance,
    frechet_from_statistics,
    kernel_distance,
    with_noise,
)


def normal(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def whitened(count: int, width: int, seed: int) -> torch.Tensor:
    """Samples whose own mean is exactly 0 and whose own covariance is exactly the identity."""
    x = normal(count, width, seed)
    x = x - x.mean(dim=0)
    factor = torch.linalg.cholesky(torch.cov(x.T))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


def from_statistics(real: torch.Tensor, fake: torch.Tensor) -> float:
    return frechet_from_statistics(FeatureStatistics.of(real), FeatureStatistics.of(fake))


@pytest.mark.parametrize("distance", [frechet_distance, from_statistics])
def test_frechet_of_known_gaussians(distance) -> None:
    real_std = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    fake_std = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    offset = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    real, fake = whitened(50, 3, 0) * real_std, whitened(70, 3, 1) * fake_std + offset
    expected = (offset.square() + (real_std - fake_std).square()).sum().item()
    assert distance(real, fake) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", [frechet_distance, from_statistics])
def test_frechet_to_itself_is_zero_and_symmetric(distance) -> None:
    a, b = normal(200, 8, 0), normal(300, 8, 1) * 2 + 1
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)


@pytest.mark.parametrize(("count", "width"), [(500, 16), (20, 48), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_form_equals_torchmetrics(count, width, dtype) -> None:
    mix = normal(width, width, 2)
    real = (normal(count, width, 0) @ mix).to(dtype)
    fake = (normal(count + 3, width, 1) @ mix * 0.7 + 0.3).to(dtype)
    # Both sides get the same numbers; only the form of the square root differs.
    assert from_statistics(real, fake) == pytest.approx(frechet_distance(real, fake), rel=1e-3)


def test_statistics_file_round_trip(tmp_path) -> None:
    statistics = FeatureStatistics.of(normal(30, 4, 0), "reference")
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert (loaded.count, loaded.features) == (30, "reference")
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_statistics_of_different_networks_are_not_compared() -> None:
    feats = normal(30, 4, 0)
    ours, theirs = (
        FeatureStatistics.of(feats, "reference"),
        FeatureStatistics.of(feats, "inception"),
    )
    with pytest.raises(ValueError, match=r"inception.*reference"):
        frechet_from_statistics(ours, theirs)
    with pytest.raises(ValueError, match="width"):
        frechet_from_statistics(ours, FeatureStatistics.of(normal(30, 5, 0)))


def test_statistics_check_themselves() -> None:
    mean, covariance = torch.zeros(3).double(), torch.eye(3).double()
    with pytest.raises(ValueError, match="covariance"):
        FeatureStatistics(mean=mean, covariance=covariance[:2], count=5)
    with pytest.raises(ValueError, match="count = 1"):
        FeatureStatistics(mean=mean, covariance=covariance, count=1)
    with pytest.raises(ValueError, match="dtype"):
        FeatureStatistics(mean=mean.float(), covariance=covariance, count=5)


def test_kernel_distance_separates_shifted_sets_only() -> None:
    real, same, shifted = normal(400, 8, 0), normal(400, 8, 1), normal(400, 8, 2) + 1
    distance = partial(kernel_distance, subsets=10, subset_size=200)
    assert abs(distance(real, same)) < 0.02 < 0.5 < distance(real, shifted)


def test_kernel_distance_of_one_subset_is_the_closed_form() -> None:
    real, fake = normal(20, 3, 0), normal(20, 3, 1) + 0.5
    rr, ff, rf = ((x @ y.T / 3 + 1) ** 3 for x, y in ((real, real), (fake, fake), (real, fake)))
    off_diagonal = (rr.sum() - rr.trace() + ff.sum() - ff.trace()) / (20 * 19)
    expected = (off_diagonal - 2 * rf.mean()).item()
    assert kernel_distance(real, fake, subsets=1, subset_size=20) == pytest.approx(expected)


def test_kernel_distance_repeats_and_leaves_the_global_generator_alone() -> None:
    real, fake = normal(60, 4, 0), normal(60, 4, 1)
    before = torch.get_rng_state()
    first = kernel_distance(real, fake, subsets=3, subset_size=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_distance(real, fake, subsets=3, subset_size=20) == first
    assert kernel_distance(real, fake, subsets=3, subset_size=20, seed=1) != first


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_illegal_features_are_refused(distance) -> None:
    good = normal(10, 4, 0)
    with pytest.raises(ValueError, match=r"= 1 .*>= 2"):
        distance(good, good[:1])
    with pytest.raises(ValueError, match=r"= 3 .*4"):
        distance(good, good[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        distance(good.clone().fill_(torch.nan), good)
    with pytest.raises(ValueError, match="floats"):
        distance(good.long(), good)


def test_kernel_distance_refuses_subsets_larger_than_the_sets() -> None:
    with pytest.raises(ValueError, match=r"subset_size = 11 .*2\.\.10"):
        kernel_distance(normal(12, 4, 0), normal(10, 4, 1), subset_size=11)


def test_noise_is_the_deviation_over_disjoint_groups() -> None:
    feats = torch.arange(12.0)[:, None]
    seen: list[torch.Tensor] = []

    def mean(group: torch.Tensor) -> float:
        seen.append(group)
        return group.mean().item()

    value, noise = with_noise(mean, feats, groups=3)
    assert value == 5.5
    assert [len(group) for group in seen] == [4, 4, 4, 12]
    assert torch.equal(torch.cat(seen[:3]).sort(dim=0).values, feats)
    means = torch.tensor([group.mean().item() for group in seen[:3]])
    assert noise == pytest.approx(means.std().item(), rel=1e-6)


def test_noise_of_frechet_and_its_bounds() -> None:
    real, fake = normal(400, 4, 0), normal(400, 4, 1) + 1
    value, noise = with_noise(partial(frechet_distance, real), fake, groups=4)
    assert value == frechet_distance(real, fake)
    assert 0 < noise < value
    with pytest.raises(ValueError, match=r"groups = 201 .*2\.\.200"):
        with_noise(partial(frechet_distance, real), fake, groups=201)
