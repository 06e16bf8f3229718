"""Every diffusers pipeline of a supported class, built of tiny parts from what its signatures say.

The list is diffusers' own, so that a new version brings its new pipelines along. A component is
known by the class that ``__init__`` annotates it with, an argument by its name in ``__call__``;
what cannot be read from there stands in two short tables: of families, one for each transformer,
and of pipelines whose transformer takes more channels than it gives.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import PIL.Image
import torch
import transformers
from tests.backbones import pipes
from tests.backbones.pipes import embeddings, transformer
from tests.wild.pictures import noise, quiet

from ditdial.backbones import BACKBONES

STEPS = 10
TEXT = 6


@functools.cache
def every_pipeline() -> dict[str, str]:
    """Names of pipelines whose transformer is of a supported class, and of that class."""
    found = {}
    for name in dir(diffusers):
        each = getattr(diffusers, name)
        if not (isinstance(each, type) and issubclass(each, diffusers.DiffusionPipeline)):
            continue
        part = inspect.signature(each.__init__).parameters.get("transformer")
        told = "" if part is None else str(part.annotation)
        known = [model for model in BACKBONES if re.search(rf"\b{model}\b", told)]
        if known:
            (found[name],) = known
    return found


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the pipelines of one transformer share.

    Args:
        case: of the transformer in `tests.backbones.tiny`.
        sides: height and width in pixels.
        frames: of a video.
        config: of the transformer, beside that of its case.
        scheduler: of its pipelines.
        call: arguments that all of its pipelines take alike.
        halvings: of the picture by its autoencoder, where that is not of one kind.
    """

    case: str
    sides: tuple[int, int] = (16, 16)
    frames: int = 9
    config: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable[[], Any] = diffusers.FlowMatchEulerDiscreteScheduler
    call: dict[str, Any] = field(default_factory=dict)
    halvings: int = 0


TALL = (128, 112)
WHOLE = {"use_resolution_binning": False, "clean_caption": False}
UNIPC = functools.partial(
    diffusers.UniPCMultistepScheduler,
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=3.0,
)
COGVIEW4 = functools.partial(pipes.shifting, **pipes.COGVIEW4_SHIFT)
QWENIMAGE = functools.partial(pipes.shifting, **pipes.QWEN_SHIFT)

FAMILIES = {
    "AuraFlowTransformer2DModel": Family(case="auraflow"),
    "ChromaTransformer2DModel": Family(
        case="chroma",
        scheduler=pipes.shifting,
        call={
            "prompt_attention_mask": torch.ones(1, TEXT),
            "negative_prompt_attention_mask": torch.ones(1, TEXT),
        },
    ),
    "CogVideoXTransformer3DModel": Family(
        case="cogvideox-5b", sides=TALL, scheduler=diffusers.CogVideoXDDIMScheduler
    ),
    "CogView4Transformer2DModel": Family(case="cogview4", sides=TALL, scheduler=COGVIEW4),
    "DiTTransformer2DModel": Family(
        case="dit",
        config={"num_embeds_ada_norm": 1000},
        scheduler=diffusers.DDIMScheduler,
        call={"class_labels": [3], "output_type": "pt"},
    ),
    "Flux2Transformer2DModel": Family(
        case="flux2", sides=TALL, scheduler=pipes.shifting, halvings=3
    ),
    "FluxTransformer2DModel": Family(
        case="flux",
        scheduler=pipes.shifting,
        call={
            "max_area": 16 * 16,
            "_auto_resize": False,
            "upsampling_height": 32,
            "upsampling_width": 32,
        },
    ),
    "HunyuanVideoTransformer3DModel": Family(case="hunyuan-video", sides=TALL),
    "LTXVideoTransformer3DModel": Family(case="ltx", sides=(32, 64), scheduler=pipes.shifting),
    "LatteTransformer3DModel": Family(
        case="latte", frames=3, scheduler=diffusers.DDIMScheduler, call={"clean_caption": False}
    ),
    "Lumina2Transformer2DModel": Family(case="lumina2", sides=TALL),
    "PixArtTransformer2DModel": Family(
        case="pixart",
        config={"use_additional_conditions": False},
        scheduler=diffusers.DDIMScheduler,
        call=WHOLE,
    ),
    "QwenImageTransformer2DModel": Family(case="qwenimage", sides=TALL, scheduler=QWENIMAGE),
    "SD3Transformer2DModel": Family(case="sd3", sides=(32, 32), config={"pos_embed_max_size": 24}),
    "SanaTransformer2DModel": Family(case="sana", sides=(256, 224), call=WHOLE),
    "WanTransformer3DModel": Family(case="wan", sides=(64, 96), scheduler=UNIPC),
    "ZImageTransformer2DModel": Family(case="z-image", sides=(256, 224), halvings=3),
}

MORE_CHANNELS = {
    r"^FluxControl(?!Net)": {"in_channels": 32, "out_channels": 16},
    r"^(FluxFill|VisualCloze)": {"in_channels": 36, "out_channels": 16},
    r"^CogVideoX(ImageToVideo|Fun)": {"in_channels": 8},
    r"^CogView4Control": {"in_channels": 8},
    r"^LucyEdit": {"in_channels": 8},
    r"^WanImageToVideo": {"in_channels": 12},
    r"^HunyuanSkyreels": {"in_channels": 8},
    r"^HunyuanVideoImageToVideo": {"in_channels": 9, "image_condition_type": "latent_concat"},
    r"^Flux2Klein": {"guidance_embeds": False},
    r"^StableDiffusion3Inpaint": {"in_channels": 16, "out_channels": 16},
    r"^QwenImageLayered": {"use_layer3d_rope": True, "use_additional_t_cond": True},
    r"^ZImageOmni": {"siglip_feat_dim": 24},
    r"^SanaSprint": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
}
"""Config of the transformers of some pipelines: given pictures come as channels, mostly."""


NORMS = {"layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
SMALL = {"AutoencoderKLWan": "video_vae", "AutoencoderKLLTXVideo": "ltx_vae"}
"""Autoencoders that `tests.backbones.pipes` has."""


def halving(blocks: int) -> dict[str, Any]:
    """Blocks of an autoencoder of pictures."""
    return {
        "block_out_channels": (8,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        **NORMS,
    }


VAES: dict[str, Callable[[int], dict[str, Any]]] = {
    "AutoencoderKL": lambda blocks: {**halving(blocks), "shift_factor": 0.1},
    "AutoencoderKLFlux2": halving,
    "AutoencoderKLQwenImage": lambda blocks: {
        "base_dim": 2,
        "z_dim": 4,
        "dim_mult": [1] * blocks,
        "num_res_blocks": 1,
        "temperal_downsample": [False] * (blocks - 1),
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    },
    "AutoencoderDC": lambda _: {
        "latent_channels": 4,
        "attention_head_dim": 2,
        **{f"{end}_block_out_channels": (4,) * 6 for end in ("encoder", "decoder")},
        **{f"{end}_layers_per_block": (1,) * 6 for end in ("encoder", "decoder")},
        **{f"{end}_qkv_multiscales": ((),) * 6 for end in ("encoder", "decoder")},
    },
    "AutoencoderKLCogVideoX": lambda blocks: {"block_out_channels": (8,) * blocks, **NORMS},
    "AutoencoderKLHunyuanVideo": lambda blocks: {
        "block_out_channels": (8,) * blocks,
        "mid_block_add_attention": False,
        **NORMS,
    },
}
"""Configs of tiny autoencoders with a number of blocks; each but the first halves the picture."""


@dataclass(frozen=True)
class Built:
    """A pipeline of tiny parts, and what its call may be given.

    Args:
        name: of the pipeline's class.
    """

    name: str

    @property
    def cls(self) -> Any:
        """The pipeline's class."""
        return getattr(diffusers, self.name)

    @property
    def family(self) -> Family:
        """What is known of its transformer."""
        return FAMILIES[every_pipeline()[self.name]]

    @functools.cached_property
    def takes(self) -> dict[str, inspect.Parameter]:
        """Arguments of its call."""
        return dict(inspect.signature(self.cls.__call__).parameters)

    @property
    def has_strength(self) -> bool:
        """Whether a run may begin in the middle."""
        return "strength" in self.takes  # of LTX's condition pipeline it is ``denoise_strength``

    @property
    def reads_words(self) -> bool:
        """Whether it insists on making its embeddings itself."""
        return "prompt_embeds" not in self.takes or "task_prompt" in self.takes

    def transformer(self, seed: int = 1) -> Any:
        """With noise on every parameter."""
        config = dict(self.family.config)
        for pattern, more in MORE_CHANNELS.items():
            if re.search(pattern, self.name):
                config |= more
        model = transformer(self.family.case, seed, **config)
        if "ChromaInpaint" in self.name:
            model.register_to_config(guidance_embeds=False)  # asked for as if it were FLUX
        return model

    def pipe(self) -> Any:
        """The same pipeline each time."""
        torch.manual_seed(0)
        model, parts = self.transformer(), {}
        for name, each in inspect.signature(self.cls.__init__).parameters.items():
            if name not in ("self", "transformer"):
                part = self._part(name, str(each.annotation), model)
                if part is not None or each.default is each.empty:
                    parts[name] = part
        return quiet(self.cls(transformer=model, **parts))

    def _part(self, name: str, told: str, model: Any) -> Any:
        """One component, by its name and the class that it is annotated with."""
        if name == "scheduler":
            if "Sprint" in self.name:
                return diffusers.SCMScheduler()
            plain = re.search("LTX(Condition|I2VLong)", self.name)
            return diffusers.FlowMatchEulerDiscreteScheduler() if plain else self.family.scheduler()
        if name == "vae":
            return self._vae(re.findall(r"Autoencoder\w+", told)[0], model)
        if name == "controlnet":
            return controlnet_of(told, model, self.name)
        if name.startswith("tokenizer"):
            return pipes.tokenizer()
        if name.startswith("text_encoder") and self.reads_words:
            return pipes.clip(transformers.CLIPTextModel, 20, 20) if "clip" in told else pipes.t5()
        if name == "text_encoder" and "Layered" in self.name:
            return pipes.t5()  # it asks for its dtype
        if name == "pag_applied_layers":
            return "blocks.1"
        return {"resolution": 32, "is_distilled": False}.get(name)

    @property
    def large(self) -> bool:
        """Whether it makes a large picture of any that it is given."""
        return "processor" in inspect.signature(self.cls.__init__).parameters

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.family.sides
        return (8 * height, 8 * width) if self.large else (height, width)

    def _vae(self, told: str, model: Any) -> Any:
        """A tiny autoencoder of an annotated class."""
        if told not in VAES:
            return getattr(pipes, SMALL[told])()
        blocks = 1 + (6 if self.large else self.family.halvings or 3)
        if told == "AutoencoderKL":
            blocks = 1 + self.family.halvings
        facts = VAES[told](blocks)
        if told == "AutoencoderKL":
            facts["latent_channels"] = {"sd3": model.config.in_channels}.get(self.family.case, 4)
        return getattr(diffusers, told)(**facts).eval()

    def call(self, *, steps: int = STEPS, strength: float = 1.0, guided: bool = True) -> Any:
        """Arguments of a small run."""
        known = self._words() if self.reads_words else self._embeddings(guided)
        known |= self._pictures() | self._scales(guided)
        height, width = self.sides
        known |= {
            "height": height,
            "width": width,
            "num_frames": self.family.frames,
            "video_length": self.family.frames,
            "num_inference_steps": steps,
            "strength": strength,
            "denoise_strength": strength,
            "intermediate_timesteps": None,
            # The layered pipeline has no answer in latents.
            "output_type": "pt" if "Layered" in self.name else "latent",
            "generator": noise(1),
            "max_sequence_length": TEXT,
        }
        known |= self.family.call
        if "denoise_strength" in self.takes and strength < 1:
            known |= {"strength": 1.0, "latents": embeddings(8, 3, height // 4, width // 4)}
        return {name: value for name, value in known.items() if name in self.takes}

    def _scales(self, guided: bool) -> dict[str, Any]:
        """What turns guidance on and off."""
        if "true_cfg_scale" in self.takes:
            return {"true_cfg_scale": 3.0 if guided else 1.0}
        return {"guidance_scale": 4.0 if guided else (0.0 if "ZImage" in self.name else 1.0)}

    def _words(self) -> dict[str, Any]:
        """Prompts."""
        word = {"prompt": "red cat", "negative_prompt": "old house", "prompt_segments": None}
        return word | {"task_prompt": "red cat", "content_prompt": "blue dog"}

    def _embeddings(self, guided: bool) -> dict[str, Any]:
        """Embeddings of prompts, whatever each pipeline calls them."""
        known: dict[str, Any] = {}
        for seed, sign in enumerate(("", "negative_") if guided else ("",), start=5):
            ones = torch.ones(1, TEXT, dtype=torch.long)
            known |= {
                f"{sign}prompt_embeds": embeddings(TEXT, 24, seed=seed),
                f"{sign}pooled_prompt_embeds": embeddings(20, seed=seed),
                f"{sign}prompt_attention_mask": ones,
                f"{sign}prompt_embeds_mask": ones,
            }
        if "ZImage" in self.name:
            lists = ("prompt_embeds", "negative_prompt_embeds")
            known |= {name: [known[name][0]] for name in lists if name in known}
        if "Layered" in self.name:
            known["prompt"] = "red cat"
        # Pipelines whose own default is an empty prompt.
        for name in ("prompt", "negative_prompt"):
            if name in self.takes and self.takes[name].default == "":
                known[name] = None
        return known

    def _pictures(self) -> dict[str, Any]:
        """Pictures, masks and videos to start from, whatever each pipeline calls them."""
        height, width = self.sides
        torch.manual_seed(0)
        pixels = (torch.rand(height, width, 3) * 255).byte().numpy()
        picture = PIL.Image.fromarray(pixels)
        mask = PIL.Image.fromarray(pixels[..., 0])
        known = {"image": picture, "image_reference": picture, "mask_image": mask}
        known |= {"control_image": picture, "control_mask": mask, "cond_image": picture}
        if "task_prompt" in self.takes:
            known["image"] = [[picture, picture], [picture, None]]
        frames = [picture] * self.family.frames
        return known | {"video": frames, "control_video": frames}


def controlnet_of(told: str, model: Any, pipeline: str) -> Any:
    """A tiny control network of an annotated class, for a transformer."""
    name = re.findall(r"\w*ControlNetModel", told)[0]
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in dict(model.config).items() if key in known}
    inpaint = int("Inpaint" in pipeline)
    config |= {
        "SD3ControlNetModel": {"extra_conditioning_channels": inpaint, "num_layers": 1},
        "QwenImageControlNetModel": {"extra_condition_channels": inpaint * 4, "num_layers": 1},
        "ZImageControlNetModel": {
            "control_layers_places": [0, 1],
            "control_refiner_layers_places": [0],
            "control_in_dim": 4 + inpaint * 5,
            "add_control_noise_refiner": "control_noise_refiner",
        },
    }.get(name, {})
    net = cls(**config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise(4)))
    return net
