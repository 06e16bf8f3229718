"""Networks whose features the distances compare: our small classifier, DINOv2, Inception-v3.

A Frechet or kernel distance says nothing without the name of its features, so every network comes
with the name that `load_features` takes. Images are floats ``(B, C, H, W)`` in [0, 1] throughout
the evaluation, features are float32 ``(B, num_features)``.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ditdial.host.configs import read_config
from ditdial.plain.checks import require

REFERENCE = Path(__file__).parents[1] / "reference" / "mnist" / "classifier"
CLASSIFIER_SIDE = 32
LEGAL_NAMES = (
    "'reference', the folder of a saved SmallClassifier, 'dinov2:<hub id or folder>' or 'inception'"
)

# float32 pixels that were normalised and brought back miss the ends of the range by about 1e-7.
RANGE_SLACK = 1e-5


def check_images(images: Tensor, name: str = "images") -> None:
    """Refuse what is not a batch of float images in [0, 1].

    Raises:
        ValueError: wrong rank, channels or dtype, NaN, or values outside [0, 1]; most often
            images in [-1, 1] or uint8.
    """
    legal = "floats (B, C, H, W) with C = 1 or 3 and no empty axis"
    shaped = images.ndim == 4 and images.numel() > 0 and images.shape[1] in (1, 3)
    described = f"{images.dtype} {tuple(images.shape)}"
    require(shaped and images.is_floating_point(), name, described, legal)
    low, high = (end.item() for end in images.aminmax())
    # NaN fails both comparisons.
    inside = low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK
    require(inside, f"range of {name}", (low, high), "[0, 1], no NaN")


class SmallClassifier(ModelMixin, ConfigMixin):
    """A convolutional classifier of 32x32 images, whose last hidden layer serves as features.

    Three stages of two 3x3 convolutions with GroupNorm and SiLU; each stage halves the side,
    down to 4x4. With the default widths it has 0.30 M parameters and takes 9.5 M multiply-adds
    (19 MFLOPs) per image.

    Args:
        in_channels: 1 or 3.
        num_classes: number of logits.
        width: channels of the first stage, doubled by each further one; a multiple of 8.
        feature_dim: width of the features.

    Raises:
        ValueError: a number out of range.
    """

    @register_to_config
    def __init__(
        self, in_channels: int, num_classes: int, width: int = 32, feature_dim: int = 64
    ) -> None:
        super().__init__()
        require(in_channels in (1, 3), "in_channels", in_channels, "1 or 3")
        require(num_classes >= 2, "num_classes", num_classes, ">= 2")
        require(width >= 8 and width % 8 == 0, "width", width, "a multiple of 8, at least 8")
        require(feature_dim >= 1, "feature_dim", feature_dim, ">= 1")
        stages: list[nn.Module] = []
        channels = in_channels
        for stage_width in (width, 2 * width, 4 * width):
            stages += [_block(channels, stage_width, stride=2)]
            stages += [_block(stage_width, stage_width, stride=1)]
            channels = stage_width
        self.stages = nn.Sequential(*stages)
        self.to_features = nn.Linear(channels, feature_dim)
        self.to_logits = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features ``(B, feature_dim)``, before their activation.

        Args:
            images: ``(B, C, 32, 32)`` in [0, 1].
        """
        return self.to_features(self.stages(images).mean(dim=(-2, -1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, 32, 32)`` in [0, 1]."""
        return self.to_logits(F.silu(self.features(images)))


def _block(channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, out_channels),
        nn.SiLU(),
    )


class ClassifierFeatures(nn.Module):
    """`SmallClassifier.features` of images ``(B, C, 32, 32)`` in [0, 1].

    Args:
        folder: what `SmallClassifier.save_pretrained` wrote, in safetensors.

    Raises:
        FileNotFoundError: no ``config.json`` in the folder.
        ValueError: the folder holds another class of model; or, when called, images of another size
            or channel count.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        config = Path(folder) / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no classifier: config.json is missing")
        # diffusers tries any folder: another model fails with a TypeError, or warns only.
        stored = read_config(config).get("_class_name")
        require(
            stored == "SmallClassifier", f"model class in {config}", stored, "'SmallClassifier'"
        )
        classifier = SmallClassifier.from_pretrained(folder, use_safetensors=True)
        self.classifier = classifier.eval().requires_grad_(False)
        self.num_features: int = self.classifier.config["feature_dim"]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, num_features)``."""
        check_images(images)
        legal = (self.classifier.config["in_channels"], CLASSIFIER_SIDE, CLASSIFIER_SIDE)
        given = tuple(images.shape[1:])
        require(given == legal, "shape of each image", given, f"{legal} for this classifier")
        return self.classifier.features(images.to(self.classifier.dtype)).float()


class Dinov2Features(nn.Module):
    """Class token of a DINOv2 network, as Stein et al. propose for Frechet distances (2306.04675).

    Images of any size are resized to 224 pixels (bicubic, antialiased) and normalised with
    ImageNet's statistics; grey images are repeated to three channels.

    Args:
        source: a hub id such as ``facebook/dinov2-large`` (the network of the paper), or a folder.

    Raises:
        ImportError: transformers is missing.
        OSError: from transformers, when ``source`` cannot be found.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, source: str) -> None:
        super().__init__()
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise ImportError("DINOv2 features need: pip install 'ditdial[eval]'") from error
        network = Dinov2Model.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        self.network = network.eval().requires_grad_(False)
        self.num_features: int = self.network.config.hidden_size
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("image_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("image_std", torch.tensor(std)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, num_features)``."""
        check_images(images)
        resized = F.interpolate(_rgb(images).float(), (224, 224), mode="bicubic", antialias=True)
        # Bicubic interpolation overshoots at edges; the image files it was trained on cannot.
        pixels = (resized.clamp(0, 1) - self.image_mean) / self.image_std
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the 2015 Inception-v3, in torch-fidelity's port: those of FID.

    The network takes 8-bit images of any size and resizes them to 299 pixels inside, as the
    original TensorFlow graph did. Grey images are repeated to three channels.

    Raises:
        ImportError: torch-fidelity is missing.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyrefly: ignore[missing-import]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise ImportError("Inception features need: pip install 'ditdial[eval]'") from error
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, 2048)``."""
        check_images(images)
        # Rounded, so that pixels that were read from 8-bit files become the same bytes again.
        pixels = (_rgb(images).float().clamp(0, 1) * 255).round().to(torch.uint8)
        return self.network(pixels)[0]


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def load_features(
    name_or_path: str,
) -> tuple[ClassifierFeatures | Dinov2Features | InceptionFeatures, str]:
    """A frozen feature network and the name to print beside every number it leads to.

    Args:
        name_or_path: ``reference`` (the classifier that ships with the package), the folder of a
            saved `SmallClassifier`, ``dinov2:<hub id or folder>``, or ``inception``.

    Returns:
        A module that maps images ``(B, C, H, W)`` in [0, 1] to features ``(B, num_features)``, and
        its name, which is ``name_or_path`` again.

    Raises:
        ValueError: neither a known name nor a folder.
        ImportError: the extra that the network needs is not installed.
        FileNotFoundError: the folder holds no model, or the package was built without the
            reference classifier.
    """
    kind, separator, source = name_or_path.partition(":")
    if name_or_path == "reference":
        return ClassifierFeatures(REFERENCE), name_or_path
    if name_or_path == "inception":
        return InceptionFeatures(), name_or_path
    if kind == "dinov2" and separator and source:
        return Dinov2Features(source), name_or_path
    require(Path(name_or_path).is_dir(), "features", name_or_path, LEGAL_NAMES)
    return ClassifierFeatures(name_or_path), name_or_path
