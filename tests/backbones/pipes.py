"""Tiny real diffusers pipelines with random components, one case per pipeline and way to guide it.

The transformers are those of `tests.backbones.tiny`; tokenizers are made of a dozen words.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tests.backbones.tiny import CASES, Grid
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from ditdial import FlexiDiT, elastify
from ditdial.handle import Handle
from ditdial.runtime.tensors import is_new

STEPS = 4
PROMPTS = ("red cat", "blue dog")
SEEDS = (11, 12)
WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "old", "cat", "dog", "house")


@dataclass(frozen=True, eq=False)
class PipeCase:
    """One pipeline.

    Args:
        build: the pipeline with its components.
        size: arguments that make the run small.
        grid, text: base grid of such a run, and text tokens of one picture.
        guided, unguided: arguments that turn guidance on and off.
        two_calls: whether a guided step calls the model once per branch.
        contexts: whether it then names the branch.
        embedded: whether ``size`` holds the prompt's embeddings, which no text encoder made.
        latent: the ``output_type`` that leaves out the autoencoder.
        alike: arguments without which the stock pipeline itself depends on the batch.
    """

    build: Callable[[], Any]
    size: dict[str, Any]
    grid: Grid
    text: int
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 4.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    two_calls: bool = False
    contexts: bool = True
    embedded: bool = False
    latent: str = "latent"
    alike: dict[str, Any] = field(default_factory=dict)

    def pipe(self) -> Any:
        """The same pipeline each time."""
        torch.manual_seed(0)
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def elastic(self, pipe: Any, component: str | None = None, **method: Any) -> Handle:
        """Make a pipeline elastic, with noise on the new tensors."""
        torch.manual_seed(2)
        handle = elastify(pipe, FlexiDiT(**{"rank": 3, **method}), component=component)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in handle.model.named_parameters():
                if is_new(name):
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return handle

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str] = PROMPTS[:1],
        seeds: Sequence[int] = SEEDS,
        *,
        guided: bool = True,
        **changes: Any,
    ) -> Tensor:
        """Run a pipeline: latents of all prompts, or pictures if ``output_type`` says so."""
        arguments = {
            "num_inference_steps": STEPS,
            "output_type": self.latent,
            "generator": [torch.Generator().manual_seed(s) for s in seeds[: len(prompts)]],
            **self.size,
            **(self.guided if guided else self.unguided),
            **changes,
        }
        if self.embedded:
            result = pipe(**arguments)
        elif isinstance(pipe, diffusers.DiTPipeline):
            result = pipe([WORDS.index(p.split()[-1]) for p in prompts], **arguments)
        else:
            result = pipe(list(prompts), **arguments)
        pictures = next(iter(result.values()))
        return torch.from_numpy(pictures) if isinstance(pictures, np.ndarray) else pictures


def tokenizer() -> Any:
    """Words to numbers, an end mark last."""
    words = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
        model_input_names=["input_ids", "attention_mask"],
    )


T5 = {"vocab_size": len(WORDS), "d_model": 24, "d_kv": 8, "d_ff": 16, "num_heads": 2}


def t5() -> Any:
    """A text encoder of width 24."""
    return transformers.T5EncoderModel(transformers.T5Config(**T5, num_layers=1)).eval()


def umt5() -> Any:
    """Wan's kind of text encoder."""
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**T5, num_layers=1)).eval()


def clip(model_class: Any, width: int, pooled: int) -> Any:
    """A CLIP text encoder."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=pooled,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return model_class(config).eval()


def gemma() -> Any:
    """A language model of width 24; Lumina 2 reads its last layer but one."""
    config = transformers.Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.Gemma2Model(config).eval()


def vae() -> Any:
    """An autoencoder that keeps the size: 4 latent channels per pixel."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        shift_factor=0.1,
    ).eval()


def video_vae() -> Any:
    """Wan's autoencoder: 8x8 pixels and 4 frames to one latent."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.1, 1.2, 1.3],
    ).eval()


def flux2_vae() -> Any:
    """FLUX.2's autoencoder, which keeps the size; the pipelines read its running statistics."""
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    ).eval()


def ltx_vae() -> Any:
    """LTX's autoencoder: 4x4 pixels and 4 frames to one latent."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    ).eval()


def transformer(name: str, seed: int = 1, **changes: Any) -> Any:
    """A tiny transformer with noise on every parameter."""
    case = CASES[name]
    model = getattr(diffusers, case.model_class)(**{**case.config, **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def dit() -> Any:
    # DiTPipeline's null class is 1000.
    model = transformer("dit", num_embeds_ada_norm=1000)
    return diffusers.DiTPipeline(model, vae(), diffusers.DDIMScheduler())


def pixart_alpha() -> Any:
    model = transformer("pixart", sample_size=128)  # only these are told the picture's size
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(tokenizer(), t5(), vae(), model, scheduler)


def pixart_sigma() -> Any:
    model = transformer("pixart", use_additional_conditions=False)
    return diffusers.PixArtSigmaPipeline(tokenizer(), t5(), vae(), model, diffusers.DDIMScheduler())


def sd3(**facts: Any) -> Any:
    encoder = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer("sd3"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **facts}),
        vae=vae(),
        text_encoder=clip(encoder, 12, 10),
        tokenizer=tokenizer(),
        text_encoder_2=clip(encoder, 12, 10),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
    )


def flux(**facts: Any) -> Any:
    facts = {"shift": 3.0, "use_dynamic_shifting": True, **facts}
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**facts),
        vae=vae(),
        text_encoder=clip(transformers.CLIPTextModel, 20, 20),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=transformer("flux"),
    )


def wan(**parts: Any) -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=umt5(),
        vae=video_vae(),
        scheduler=scheduler,
        transformer=transformer("wan"),
        **parts,
    )


def wan_of_two(boundary: float = 0.8) -> Any:
    """Wan 2.2: one transformer for noise levels from the boundary up, one below."""
    return wan(transformer_2=transformer("wan", seed=5), boundary_ratio=boundary)


def latte() -> Any:
    return diffusers.LattePipeline(
        tokenizer(), t5(), vae(), transformer("latte"), diffusers.DDIMScheduler()
    )


def chroma() -> Any:
    facts = {"shift": 3.0, "use_dynamic_shifting": True}
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**facts),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=transformer("chroma"),
    )


def lumina2(**facts: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **facts})
    return diffusers.Lumina2Pipeline(transformer("lumina2"), scheduler, vae(), gemma(), tokenizer())


def auraflow() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(
        tokenizer(), umt5(), vae(), transformer("auraflow"), scheduler
    )


def z_image() -> Any:
    chatting = tokenizer()
    chatting.chat_template = "{{ messages[0]['content'] }}"
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=gemma(),
        tokenizer=chatting,
        transformer=transformer("z-image"),
    )


def given(
    pipeline: Any, name: str, scheduler: Any = None, **parts: Callable[[], Any] | None
) -> Any:
    """What builds a pipeline that is given its prompt's embeddings.

    Args:
        name: of the transformer.
        scheduler: a plain flow-matching one by default.
        parts: what builds its other components; no text encoder, tokenizer and autoencoder by
            default.
    """
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, **parts}
    parts = {"transformer": functools.partial(transformer, name), **parts}

    def build() -> Any:
        own = copy.deepcopy(scheduler) or diffusers.FlowMatchEulerDiscreteScheduler()
        return pipeline(scheduler=own, **{key: part and part() for key, part in parts.items()})

    return build


def shifting(**facts: Any) -> Any:
    """A flow-matching scheduler that wants to know the number of tokens."""
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **facts)


def embeddings(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


SQUARE = {"height": 16, "width": 16}
TEXT = {"max_sequence_length": 6}
PIXART = {**SQUARE, **TEXT, "use_resolution_binning": False, "clean_caption": False}
VIDEO = {"height": 64, "width": 96, "num_frames": 5, **TEXT}
LATTE = {**SQUARE, "video_length": 3, "clean_caption": False}
TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "old house"}

PIPES = {
    "dit": PipeCase(dit, {}, (1, 8, 8), 0, latent="pt"),
    "pixart-alpha": PipeCase(pixart_alpha, PIXART, (1, 8, 8), 6),
    "pixart-sigma": PipeCase(pixart_sigma, PIXART | {"width": 24}, (1, 8, 12), 6),
    "sd3": PipeCase(sd3, SQUARE | TEXT, (1, 8, 8), 14),
    "flux": PipeCase(
        flux,
        SQUARE | TEXT,
        (1, 8, 8),
        6,
        guided=TRUE_CFG | {"negative_prompt": ["old house"]},
        unguided={"guidance_scale": 3.5},
        two_calls=True,
    ),
    "wan": PipeCase(wan, VIDEO, (2, 4, 6), 6, two_calls=True),
    "wan-5b": PipeCase(lambda: wan(expand_timesteps=True), VIDEO, (2, 4, 6), 6, two_calls=True),
    # Latte crops the text of a single prompt and masks that of several.
    "latte": PipeCase(latte, LATTE, (3, 8, 8), 3, alike={"mask_feature": False}),
    "chroma": PipeCase(chroma, SQUARE | TEXT, (1, 8, 8), 6, two_calls=True, contexts=False),
    # The negative prompt is as long as the other: Lumina 2 counts words, not their padding.
    "lumina2": PipeCase(
        lumina2,
        {"height": 128, "width": 112, "max_sequence_length": 8, "system_prompt": "a"},
        (1, 8, 7),
        8,
        guided={"guidance_scale": 4.0, "negative_prompt": "old house old cat a dog house"},
        two_calls=True,
        contexts=False,
    ),
    "auraflow": PipeCase(auraflow, SQUARE | TEXT, (1, 8, 8), 6),
    # Guidance is on above 0.
    "z-image": PipeCase(
        z_image,
        {"height": 16, "width": 14, "max_sequence_length": 8},
        (1, 8, 7),
        3,
        unguided={"guidance_scale": 0.0},
    ),
}

PROMPT = {"prompt_embeds": embeddings(6, 24)}
TWO_PROMPTS = PROMPT | {"negative_prompt_embeds": embeddings(6, 24, seed=6)}
MASKS = {
    "prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
    "negative_prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
}
COGVIDEOX = {
    "prompt_embeds": embeddings(5, 24),
    "negative_prompt_embeds": embeddings(5, 24, seed=6),
    "height": 128,
    "num_frames": 9,
}
LTX = TWO_PROMPTS | MASKS | {"height": 32, "width": 64, "num_frames": 9}
TALL = {"height": 128, "width": 112}
QWEN_SHIFT = {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
COGVIEW4_SHIFT = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}

EMBEDDED = {
    "flux2": PipeCase(
        given(diffusers.Flux2Pipeline, "flux2", shifting(shift=3.0), vae=flux2_vae),
        PROMPT | SQUARE,
        (1, 8, 8),
        6,
        guided={},  # guidance is one more input of the model
        unguided={"guidance_scale": 4.0},
        embedded=True,
    ),
    "flux2-klein": PipeCase(
        given(
            diffusers.Flux2KleinPipeline,
            "flux2",
            shifting(shift=3.0),
            vae=flux2_vae,
            transformer=lambda: transformer("flux2", guidance_embeds=False),
        ),
        TWO_PROMPTS | SQUARE,
        (1, 8, 8),
        6,
        two_calls=True,
        embedded=True,
    ),
    "qwenimage": PipeCase(
        given(diffusers.QwenImagePipeline, "qwenimage", shifting(**QWEN_SHIFT)),
        TWO_PROMPTS | TALL,
        (1, 8, 7),
        6,
        guided={"true_cfg_scale": 3.0},
        unguided={"true_cfg_scale": 1.0},
        two_calls=True,
        embedded=True,
    ),
    "sana": PipeCase(
        given(diffusers.SanaPipeline, "sana"),
        TWO_PROMPTS
        | MASKS
        | {
            "negative_prompt": None,
            "height": 256,
            "width": 224,
            "use_resolution_binning": False,
        },
        (1, 8, 7),
        6,
        embedded=True,
    ),
    "cogvideox-2b": PipeCase(
        given(diffusers.CogVideoXPipeline, "cogvideox-2b", diffusers.CogVideoXDDIMScheduler()),
        COGVIDEOX | {"width": 128},
        (3, 8, 8),
        5,
        embedded=True,
    ),
    "cogvideox-5b": PipeCase(
        given(diffusers.CogVideoXPipeline, "cogvideox-5b", diffusers.CogVideoXDPMScheduler()),
        COGVIDEOX | {"width": 112},
        (3, 8, 7),
        5,
        embedded=True,
    ),
    "ltx": PipeCase(
        given(diffusers.LTXPipeline, "ltx", shifting(), vae=ltx_vae),
        LTX,
        (3, 8, 16),
        6,
        embedded=True,
    ),
    "ltx-condition": PipeCase(
        given(diffusers.LTXConditionPipeline, "ltx", vae=ltx_vae), LTX, (3, 8, 16), 6, embedded=True
    ),
    "cogview4": PipeCase(
        given(diffusers.CogView4Pipeline, "cogview4", shifting(**COGVIEW4_SHIFT)),
        TWO_PROMPTS | TALL,
        (1, 8, 7),
        6,
        two_calls=True,
        embedded=True,
    ),
    "hunyuan-video": PipeCase(
        given(
            diffusers.HunyuanVideoPipeline,
            "hunyuan-video",
            diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
        ),
        TWO_PROMPTS
        | MASKS
        | TALL
        | {
            "pooled_prompt_embeds": embeddings(20),
            "negative_pooled_prompt_embeds": embeddings(20, seed=6),
            "num_frames": 9,
        },
        (3, 8, 7),
        6,
        guided={"true_cfg_scale": 3.0},
        unguided={"true_cfg_scale": 1.0},
        two_calls=True,
        embedded=True,
    ),
}
