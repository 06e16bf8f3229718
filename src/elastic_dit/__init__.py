"""Let a pretrained Diffusion Transformer change how much work it does at every denoising step."""
