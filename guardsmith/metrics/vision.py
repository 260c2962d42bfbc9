"""DINO, CLIP-I and CLIP-T: similarity of pictures, and of pictures and prompts, by transformers of the Hub.

These are the subject metrics of the DreamBooth paper (Ruiz et al. 2023; hf.co/papers/2208.12242): cosine similarity of
normalised embeddings, of the class token of a self-supervised ViT (DINO), which tells subjects of one class apart, or of CLIP's
projected image embedding, which sees the class more than the subject. Neither recognises faces well. CLIP-T is the cosine
similarity of CLIP's embeddings of a picture and of its prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.sources import check_source
from guardsmith.metrics.identity import mean_cosine

DEFAULTS = {"dino": "facebook/dinov2-small", "clip": "openai/clip-vit-large-patch14"}
BATCH = 32


@contextmanager
def loading_errors(source: str) -> Iterator[None]:
    """Inside, errors of transformers about weights that it cannot load become one sentence.

    Raises:
        UserError: there are no such weights as safetensors.
        RunFailed: they are not in the local cache and the Hub cannot be reached.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    check_source(source, "judge")
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # a shape that does not fit is a RuntimeError
        reason = str(error).splitlines()[0].rstrip(".")
        offline = (LocalEntryNotFoundError, OfflineModeIsEnabled)
        if any(isinstance(each, offline) for each in (error, error.__cause__ or error.__context__)):
            raise RunFailed(
                f"the judge {source}: there is no folder of this name, it is not in the local Hub cache, and the Hub cannot be "
                "reached; go online, or name a folder"
            ) from error
        raise UserError(f"the judge {source} cannot be loaded ({reason}); it has to be safetensors.") from error


def pretrained(kind: Any, source: str) -> Any:
    """A model of transformers in eval mode, float32, frozen.

    Raises:
        ValueError: weights are missing, which transformers would make up.
    """
    model, report = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"it has no {sorted(report['missing_keys'])[0]}")
    return model.eval().requires_grad_(False)


class VisionEncoder:
    """A vision transformer in eval mode, float32, with the resizing and scaling that it was trained with."""

    def __init__(self, kind: str, source: str) -> None:
        """Load it: `kind` is a key of `DEFAULTS`, `source` a folder or a Hub id, safetensors only.

        Raises:
            UserError: there are no such weights as safetensors.
            RunFailed: they are not in the local cache and the Hub cannot be reached.
        """
        from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection
        from transformers.utils import cached_file
        from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        self.kind, self.source = kind, source
        with loading_errors(source):
            self.model = pretrained(CLIPVisionModelWithProjection if kind == "clip" else AutoModel, source)
            config = AutoConfig.from_pretrained(source)
            scaling = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        preprocessing = {} if scaling is None else json.loads(Path(scaling).read_text(encoding="utf-8"))
        vision = getattr(config, "vision_config", config)
        self.size = int(vision.image_size)
        self.mean = torch.tensor(preprocessing.get("image_mean", IMAGENET_DEFAULT_MEAN)).view(3, 1, 1)
        self.std = torch.tensor(preprocessing.get("image_std", IMAGENET_DEFAULT_STD)).view(3, 1, 1)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) float in [-1, 1] -> (n, width) float, norm 1."""
        embeddings = []
        for chunk in images.float().split(BATCH):
            if chunk.shape[-2:] != (self.size, self.size):
                chunk = F.interpolate(chunk, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
            out = self.model(pixel_values=(chunk / 2 + 0.5 - self.mean) / self.std)
            embeddings.append(out.image_embeds if self.kind == "clip" else out.last_hidden_state[:, 0])
        return F.normalize(torch.cat(embeddings), dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Features for KID, (n, width), each of length sqrt(width) as those of the embedded world."""
        embeddings = self.embed(images)
        return embeddings * math.sqrt(embeddings.shape[1])

    def similarity(self, images: Tensor, references: Tensor) -> list[float | None]:
        """See `identity.similarity`."""
        return mean_cosine(self.embed, images, references)


@cache
def load_vision(kind: str, source: str) -> VisionEncoder:
    """See `VisionEncoder`; loaded once in a process."""
    return VisionEncoder(kind, source)


@cache
def load_prompt_fit(source: str) -> Callable[[Tensor, Sequence[str]], list[float | None]]:
    """CLIP-T: (pictures (n, 3, h, w) in [-1, 1], n prompts) -> cosine similarity of each pair; `None` where it is not finite.

    Args:
        source: folder or Hub id of a CLIP with both encoders, safetensors only.

    Raises:
        UserError: see `VisionEncoder`.
        RunFailed: likewise.
    """
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    pictures = load_vision("clip", source)
    with loading_errors(source):
        text = pretrained(CLIPTextModelWithProjection, source)
        tokenizer = AutoTokenizer.from_pretrained(source)

    @torch.no_grad()
    def prompt_fit(images: Tensor, prompts: Sequence[str]) -> list[float | None]:
        """See `load_prompt_fit`."""
        length = text.config.max_position_embeddings
        tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        prompt_embeddings = F.normalize(text(**tokens).text_embeds, dim=-1)
        finite = torch.isfinite(images).flatten(1).all(dim=1)
        scores = (pictures.embed(torch.nan_to_num(images)) * prompt_embeddings).sum(dim=1)
        return [float(score) if ok else None for score, ok in zip(scores, finite, strict=True)]

    return prompt_fit
