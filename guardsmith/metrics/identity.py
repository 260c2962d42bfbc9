"""Identity similarity in the embedded world: a small face-recognition-style encoder over 64 px avatars.

It plays the part that ArcFace plays for photographs (ISM, Van Le et al. 2023): cosine similarity of normalised
embeddings. It judges only; hardening never sees it. Trained by `recipes/avatar-base/train_judges.py` on identities
that no other part of the project uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from guardsmith.metrics.embedded import JUDGES

SIZE = 64


def convolutional_trunk() -> nn.Sequential:
    """(n, 3, 64, 64) in [-1, 1] -> (n, 192 * 16) features."""
    widths = ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 192, 2))
    layers: list[nn.Module] = []
    for wide_in, wide_out, stride in widths:
        layers += [
            nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Flatten())


class IdentityEncoder(nn.Module):
    """Avatar picture -> unit vector; pictures of one identity lie close, of two far apart."""

    def __init__(self, dimensions: int = 128) -> None:
        super().__init__()
        self.trunk = convolutional_trunk()
        self.head = nn.Linear(192 * 16, dimensions)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, 64, 64) float in [-1, 1] -> (n, dimensions) float, norm 1."""
        return F.normalize(self.head(self.trunk(images)), dim=-1)


@cache
def load_encoder() -> IdentityEncoder:
    """The embedded encoder, in eval mode, float32."""
    encoder = IdentityEncoder()
    encoder.load_state_dict({k: v.float() for k, v in load_file(JUDGES / "identity.safetensors").items()})
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def embed(images: Tensor) -> Tensor:
    """Embeddings of pictures (n, 3, h, w) float in [-1, 1]; other sizes are resized to 64 px. Returns (n, 128)."""
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    return torch.cat([load_encoder()(chunk.float()) for chunk in images.split(256)])


def similarity(images: Tensor, references: Tensor) -> list[float | None]:
    """Mean cosine similarity of each picture to the reference pictures, in [-1, 1].

    Args:
        images: (n, 3, h, w) float in [-1, 1].
        references: (m, 3, h, w), real pictures of the subject.

    Returns:
        One value per picture; `None` for a picture that cannot be scored (not finite).
    """
    return mean_cosine(embed, images, references)


def mean_cosine(embed: Callable[[Tensor], Tensor], images: Tensor, references: Tensor) -> list[float | None]:
    """`similarity` by any encoder: `embed` gives rows of norm 1."""
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    scores = (embed(torch.nan_to_num(images)) @ embed(references).T).mean(dim=1)
    return [float(s) if ok else None for s, ok in zip(scores, finite, strict=True)]
