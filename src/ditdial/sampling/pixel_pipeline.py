"""What diffusers lacks: a class-conditional pipeline in pixel space, with a seed per picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditdial.host.parametrization import (
    Parametrization,
    is_flow_scheduler,
    straight_level,
)
from ditdial.ops.flow import path_norm, velocity
from ditdial.plain.checks import require, whole
from ditdial.plain.kinds import check_kind
from ditdial.plan.plan import MOST_STEPS

MOST_SCALE = 10_000
"""Far beyond it predictions leave the range of their numbers."""

MOST_SIDE = 2**16
"""Rows of a picture; attention over it would take years."""

OUTPUTS = ("pil", "np", "pt", "latent")
"""Forms that pictures can be asked for in."""

BELOW = 1e-4
"""Share by which levels lie lower than even ones: far more than float32 rounds, nothing to see."""


class PixelDiTPipeline(DiffusionPipeline):
    """Class-conditional sampling without an autoencoder.

    The network predicts the unit-variance target of `ditdial.ops.flow`. Flow-matching
    schedulers get its velocity; variance-preserving schedulers with
    ``prediction_type="v_prediction"`` use it as it is.

    Args:
        transformer: a `DiTTransformer2DModel`.
        scheduler: a flow-matching or a variance-preserving diffusers scheduler.
        data_mean, data_std: statistics of pixels in [0, 1] that the training data was normalised
            with.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self, transformer: Any, scheduler: Any, data_mean: float = 0.5, data_std: float = 0.5
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(data_mean=data_mean, data_std=data_std)

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 25,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one picture per label.

        Args:
            class_labels: ``B`` class numbers.
            guidance_scale: classifier-free guidance; 1 turns it off.
            num_inference_steps: of the scheduler.
            seeds: one seed per picture. A picture depends on its own seed only, not on the batch it
                is in.
            generator: diffusers' usual argument, if no seeds are given.
            output_type: ``pil``, ``np`` (``(B, H, W, C)`` in [0, 1]), ``pt`` (``(B, C, H, W)`` in
                [0, 1]) or ``latent`` (the samples ``(B, C, H, W)`` as the solver left them).
            height, width: of the pictures, whole patches, the same number twice; those of
                ``latents`` if these are given, by default what the network was trained at.
            latents: what sampling starts from instead of new noise, ``(B, C, height, width)``.

        Raises:
            ValueError: labels, seeds, steps, scale, output type, size or latents out of range.
        """
        labels = self._labels(class_labels)
        self._check(labels, guidance_scale, num_inference_steps, seeds, generator, output_type)
        side = self._side(height, width, latents, len(labels))
        if seeds is not None:
            generator = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        x = self._noise(len(labels), side, generator) if latents is None else latents
        x = x.to(self._execution_device, torch.float32)
        labels = labels.to(x.device)
        # An elastic model looks for this name in its pipeline's `__call__` (`host.pipelines`).
        do_classifier_free_guidance = guidance_scale != 1
        if do_classifier_free_guidance:
            null = self.transformer.config.num_embeds_ada_norm
            labels = torch.cat([labels, torch.full_like(labels, null)])
        self.set_timesteps(self.scheduler, num_inference_steps, x.device)
        images = self._pictures(self._solve(x, labels, guidance_scale, generator), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def set_timesteps(self, scheduler: Any, steps: int, device: Any = None) -> None:
        """Give a scheduler the timesteps of a run; plans ask a copy of it the same.

        The noise levels of a flow scheduler are 1, (N - 1)/N, ..., 1/N. Its own would be N even
        ones from 1 to 0.001, the last of which lies at the data already: N - 1 of ours draw the
        pictures of N of those. All but the first lie a hair (`BELOW`) lower, so that a step which
        begins where a stretch of a schedule ends is the first of the next one, however numbers are
        rounded: the noisiest half of 12 steps is 6. A scheduler that takes no levels (Heun's), or
        has flow levels that stop short of the data anyway, keeps its own.

        Args:
            scheduler: is changed.
            steps: N.
            device: of the timesteps.
        """
        levels = np.linspace(1.0, 1 / steps, steps)
        levels[1:] *= 1 - BELOW
        given: dict[str, Any] = {}
        if is_flow_scheduler(scheduler) and not scheduler.config.get("use_flow_sigmas", False):
            given = _accepted(scheduler.set_timesteps, sigmas=levels)
        if not given:
            given = {"num_inference_steps": steps}
        scheduler.set_timesteps(**given, device=device)

    def _noise(self, count: int, side: int, generator: Any) -> Tensor:
        """Where sampling starts, ``(count, C, side, side)``, in float32.

        Solvers run in float32 whatever the network's precision.
        """
        config, device = self.transformer.config, self._execution_device
        shape = (count, config.in_channels, side, side)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _solve(self, x: Tensor, labels: Tensor, scale: float, generator: Any) -> Tensor:
        """Take noise ``(B, C, H, W)`` to the data, at the scheduler's timesteps.

        Args:
            labels: ``B`` classes, and the null class as often behind them where guidance is on.
        """
        scheduler = self.scheduler
        is_flow = is_flow_scheduler(scheduler)
        if hasattr(scheduler, "init_noise_sigma"):
            x = x * scheduler.init_noise_sigma
        arguments = _accepted(scheduler.step, generator=generator)
        levels = (scheduler.timesteps / 1000).to(torch.float32)
        dtype = self.transformer.dtype  # slow to ask for: diffusers looks at every module
        steps = zip(scheduler.timesteps, levels, path_norm(levels), strict=True)
        for t, level, norm in self.progress_bar(list(steps)):
            network_input = x / norm if is_flow else scheduler.scale_model_input(x, t)
            prediction = self._predict(network_input.to(dtype), t, labels, scale)
            if is_flow:
                prediction = velocity(network_input, prediction, level, norm)
            x = scheduler.step(prediction, t, x, **arguments).prev_sample
        return x

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The network's prediction, guided where there are labels of both branches."""
        branches = len(labels) // len(x)
        batch = torch.cat([x] * branches)
        prediction = self.transformer(
            batch,
            timestep=t[None].expand(len(batch)),
            class_labels=labels,
        ).sample.float()
        if branches == 1:
            return prediction
        conditional, null = prediction.chunk(2)
        return null + scale * (conditional - null)

    def _pictures(self, x: Tensor, output_type: str) -> Any:
        """Samples of the data's statistics as pictures, in the form that was asked for."""
        self.maybe_free_model_hooks()
        statistics, images = self.config, x
        if output_type != "latent":
            images = (x * statistics["data_std"] + statistics["data_mean"]).clamp(0, 1)
        if output_type in ("pt", "latent"):
            with torch.inference_mode(False):
                return images.clone()  # to be used where gradients are recorded
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    @property
    def parametrization(self) -> Parametrization:
        """Of the network: whatever the scheduler, it sees a latent of unit variance."""

        def scales(level: float) -> tuple[float, float]:
            norm = ((1 - level) ** 2 + level**2) ** 0.5
            return (1 - level) / norm, level / norm

        return Parametrization("v_prediction", scales, straight_level)

    def _labels(self, class_labels: Any) -> Tensor:
        """Class numbers ``(B,)``; see `__call__`."""
        classes = self.transformer.config.num_embeds_ada_norm
        try:
            labels = torch.as_tensor(class_labels).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:  # whatever torch says of no numbers
            raise ValueError(f"class_labels = {class_labels!r}; legal: 0..{classes - 1}") from error
        if not len(labels):
            raise ValueError("class_labels is empty; legal: at least one label")
        other = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        if other or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels = {labels.tolist()}; legal: 0..{classes - 1}")
        return labels

    def _side(self, height: Any, width: Any, latents: Any, count: int) -> int:
        """Rows of the pictures, and columns; see `__call__`.

        The network puts its patches together as a square.

        Args:
            count: of labels.
        """
        check_kind("latents", latents, Tensor | None)
        config = self.transformer.config
        patch, side = config.patch_size, config.sample_size
        if latents is not None:
            side = latents.shape[-1] if latents.ndim else 0
            shape = (count, config.in_channels, side, side)
            fits = latents.shape == shape and side and side % patch == 0
            if not fits or not latents.is_floating_point():
                raise ValueError(
                    f"latents of shape {tuple(latents.shape)} in {latents.dtype}; legal: floating "
                    f"numbers ({count}, {config.in_channels}, S, S), S a multiple of {patch}"
                )
        sides = {"height": height, "width": width}
        given = {name: each for name, each in sides.items() if each is not None}
        for name, each in given.items():
            whole(name, each, patch, MOST_SIDE)
            fixed = latents is not None and each != side
            if fixed or each % patch or len(set(given.values())) > 1:
                legal = f"that of the latents, {side}" if fixed else f"a multiple of {patch}"
                raise ValueError(f"{name} = {each}; legal: {legal}, for height and width alike")
        return next(iter(given.values()), side)

    def _check(
        self,
        labels: Tensor,
        scale: float,
        steps: int,
        seeds: Sequence[int] | None,
        generator: Any,
        output_type: str,
    ) -> None:
        check_kind("guidance_scale", scale, float)
        check_kind("seeds", seeds, Sequence[int] | Tensor | None)
        check_kind("generator", generator, torch.Generator | list[torch.Generator] | None)
        if isinstance(generator, list):
            require(len(generator) == len(labels), "generator", generator, "one for each label")
        if not 0 <= scale <= MOST_SCALE:
            raise ValueError(
                f"guidance_scale = {scale}; legal: a number >= 0, at most {MOST_SCALE}"
            )
        whole("num_inference_steps", steps, 1, MOST_STEPS)
        if seeds is not None and len(seeds) != len(labels):
            raise ValueError(
                f"{len(seeds)} seeds for {len(labels)} labels; legal: one seed per label"
            )
        for seed in () if seeds is None else seeds:
            if not -(2**63) <= int(seed) < 2**64:  # what torch takes
                raise ValueError(f"seed = {seed}; legal: -2**63..2**64 - 1")
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator are both given; legal: one of them")
        if output_type not in OUTPUTS:
            legal = ", ".join(map(repr, OUTPUTS))
            raise ValueError(f"output_type = {output_type!r}; legal: {legal}")
        kind = self.scheduler.config.get("prediction_type")
        if kind != "v_prediction" and not is_flow_scheduler(self.scheduler):
            raise ValueError(
                f"scheduler with prediction_type = {kind!r}; "
                "legal: 'v_prediction' or a flow scheduler"
            )


def flow_matched_betas(count: int = 1000) -> list[float]:
    """Betas whose step ``t`` has the noise-to-signal ratio of the flow's level ``t / count``.

    With ``trained_betas`` set to them, DDIM, DDPM and DPM-Solver run a flow-trained network at the
    times it knows. The last levels are kept below pure noise, where these solvers divide by the
    signal.
    """
    level = torch.arange(count, dtype=torch.float64) / count
    level = level.clamp(1e-3, 0.999)
    signal = (1 - level) ** 2 / ((1 - level) ** 2 + level**2)
    betas = 1 - signal / torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    return betas.clamp(1e-8, 0.9999).tolist()


def _accepted(function: Any, **arguments: Any) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {key: value for key, value in arguments.items() if key in names}
