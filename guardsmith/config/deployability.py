"""What is checked of a hardened model's everyday use (`verify.deployability`), and within which limits (`gate.deployability`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from guardsmith.core.redaction import Place

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"prior_weight": 0}),
    "lora_conv": ("lora", {"prior_weight": 0, "everywhere": True}),
    "loha": ("lora", {"prior_weight": 0, "kind": "loha"}),
    "textual_inversion": ("textual_inversion", {}),
    "custom_diffusion": ("custom_diffusion", {"prior_weight": 0}),
}
"""Kind of adapter -> the attack that makes it, and settings that belong to the kind."""

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

CheckName = Literal["precision", "controlnet", "adapters", "merges", "quantization", "samplers"]
AdapterKind = Literal["lora", "lora_conv", "loha", "textual_inversion", "custom_diffusion"]


class DeployabilityLimits(BaseModel):
    """What a hardened model may cost those who use it as they used the base."""

    model_config = _STRICT
    difference_ratio: float = Field(2.0, ge=1)
    """Pictures in half precision, or of a quantized model, against the model's own in float32: the largest mean difference, in
    units of the base's."""
    more_collapsed: float = Field(0.05, gt=0, lt=1)
    """Merges, samplers and accelerators: largest share of pictures that collapse beyond the base's own share."""
    control_followed: float = Field(0.95, gt=0, le=1)
    """ControlNet and T2I-Adapter: least share of their effect on the base that they must still have."""
    adapter_retention: float = Field(0.95, gt=0, le=1)
    """Adapters carried between base and hardened model: least share of the similarity that one made and used on the base has."""


class DeployabilitySpec(BaseModel):
    """Which checks of everyday use are run, and on what."""

    model_config = _STRICT
    checks: tuple[CheckName, ...] = ("precision", "controlnet", "adapters", "merges", "quantization", "samplers")
    """The checks."""
    trained: bool = True
    """Also what has to be trained first: adapters, and another fine-tune of the base to merge with. `--budget quick` leaves
    them out, and the report says so."""
    images: int = Field(16, ge=8)
    """Pictures of every setting, by base and hardened model, of the same prompts from the same noise; never more than there are
    benign prompts (`verify.benign_images`)."""
    adapter_images: int = Field(48, ge=8)
    """Pictures drawn with every adapter."""
    controlnet: Place | None = None
    """Folder or Hub id of a ControlNet for this base that takes white edges on black; the embedded base has its own."""
    t2i_adapter: Place | None = None
    """The same of a T2I-Adapter."""
    adapters: dict[AdapterKind, dict[str, Any]] = {
        "lora": {}, "lora_conv": {}, "loha": {}, "textual_inversion": {}, "custom_diffusion": {}
    }  # fmt: skip
    """Kind -> settings of its attack (`lora` for the first three), where they are not the defaults. `lora_conv` has the layers of
    LCM-LoRA, convolutions among them."""
    compile: Literal["eager", "aot_eager", "inductor"] = "aot_eager"
    """Backend of `torch.compile`; `inductor` generates code too, which needs a compiler and a minute."""
