"""Models of diffusers that are bags of others: a list of models, and no configuration of their own.

Each model lies in a folder of its own beside the others: `controlnet`, `controlnet_1`, …. Pure text: nothing is loaded.
"""

from __future__ import annotations

from typing import NamedTuple


class Bag(NamedTuple):
    """A class that holds several models.

    Attributes:
        member: the class of each.
        attribute: the list of them.
        home: the module of the class.
    """

    member: str
    attribute: str
    home: str


BAGS = {
    "MultiControlNetModel": Bag("ControlNetModel", "nets", "diffusers.models.controlnets.multicontrolnet"),
    "MultiControlNetUnionModel": Bag(
        "ControlNetUnionModel", "nets", "diffusers.models.controlnets.multicontrolnet_union"
    ),
    "SD3MultiControlNetModel": Bag("SD3ControlNetModel", "nets", "diffusers.models.controlnets.controlnet_sd3"),
    "FluxMultiControlNetModel": Bag("FluxControlNetModel", "nets", "diffusers.models.controlnets.controlnet_flux"),
    "QwenImageMultiControlNetModel": Bag(
        "QwenImageControlNetModel", "nets", "diffusers.models.controlnets.controlnet_qwenimage"
    ),
    "HunyuanDiT2DMultiControlNetModel": Bag(
        "HunyuanDiT2DControlNetModel", "nets", "diffusers.models.controlnets.controlnet_hunyuan"
    ),
    "MultiAdapter": Bag("T2IAdapter", "adapters", "diffusers.models.adapter"),
}


def bag_of(member: str) -> str | None:
    """Returns the name of the class that holds several models of this class; `None` where there is none."""
    return next((name for name, bag in BAGS.items() if bag.member == member), None)


def member_folder(kind: str, component: str, index: int) -> str:
    """Returns the name of the folder of a bag's model, as diffusers saves them.

    Args:
        kind: the bag's class.
        component: its name in the pipeline.
        index: the place of the model.
    """
    if kind == "MultiAdapter":  # which adds each number to the name before
        return component + "".join(f"_{number}" for number in range(1, index + 1))
    return component if index == 0 else f"{component}_{index}"
