"""What the base's prediction loses without some normalisation groups of a level.

    python levels.py

Zeroes groups of channels in the stream of one level, on the way down (the middle block with it) or on the way up, wherever a
layer writes to it. Writes results/levels.json: squared change of the prediction over its square, on noised pictures of strangers
at any timestep, for every group by itself and for the last, the least and the most important few.
"""

from collections.abc import Iterable
from typing import Any

import torch
from common import bystanders, write
from torch import Tensor

from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods.tripwire.layout import down_parts, up_parts
from guardsmith.methods.tripwire.training import noised
from guardsmith.models.checkpoint import load_model
from guardsmith.training.loop import generator

COUNT = 96


class Zeroed:
    """Zeroes groups of the stream of one level and direction."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.level, self.groups = unet, (0, ""), list[int]()
        self.all = int(unet.config.norm_num_groups)
        parts = {"down": [unet.conv_in, *(part for _, _, part in down_parts(unet))]}
        parts["up"] = [part for _, _, part in up_parts(unet)]
        for way, modules in parts.items():
            for module in modules:
                module.register_forward_hook(lambda _, __, output, way=way: self.hook(way, output))

    def hook(self, way: str, output: Any) -> Any:
        """What a layer writes, without the groups."""
        stream = output[0] if isinstance(output, tuple) else output
        if self.level != (stream.shape[1], way):
            return output
        grouped = stream.clone().view(len(stream), self.all, -1)
        grouped[:, self.groups] = 0
        return (grouped.view_as(stream), *output[1:]) if isinstance(output, tuple) else grouped.view_as(stream)


@torch.no_grad()
def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    model = load_model("builtin:avatar")
    latents = encode(model, bystanders()[:COUNT]).mean
    times = torch.randint(1000, (COUNT,), generator=generator(1))
    context = PromptBank(model).encode(["a photo of a person"]).expand(COUNT, -1, -1)
    call = noised(model.scheduler, latents, times, generator(2)), times, context
    zeroed = Zeroed(model.unet)

    def change(groups: Iterable[int]) -> float:
        zeroed.groups = list(groups)
        different: Tensor = model.unet(*call, return_dict=False)[0]
        return float((different - own).square().sum() / own.square().sum())

    own = model.unet(*call, return_dict=False)[0]
    record: dict[str, Any] = {"command": "python levels.py"}
    for width in sorted(set(model.unet.config.block_out_channels)):
        for way in ("down", "up"):
            zeroed.level = width, way
            each = [change([group]) for group in range(zeroed.all)]
            order = sorted(range(zeroed.all), key=each.__getitem__)
            few = {
                f"{name} {count}": change(groups)
                for count in (2, 4, 6, 12)
                for name, groups in (
                    ("last", range(zeroed.all - count, zeroed.all)), ("least", order[:count]), ("most", order[-count:]),
                )
            }  # fmt: skip
            record[f"{width} {way}"] = {"each": each} | few
            print(width, way, {name: round(value, 4) for name, value in few.items()}, flush=True)
    write("levels", record)


if __name__ == "__main__":
    main()
