"""Every pipeline class that the installed diffusers exports, and those that cannot be built here."""

from __future__ import annotations

import sys

import diffusers

#: What is exported beside the classes of pipelines.
_BASES = ("DiffusionPipeline", "ModularPipeline", "PipelineQuantizationConfig")
_OTHERS = ("Output", "Blocks")

_GUARDED = "its call refuses to run without NVIDIA's guardrail, whose weights are not public"
_ONNX = "it is made of ONNX models, which are compiled already"
_BROKEN = "diffusers' own call fails with the installed diffusers and transformers"
_TEXT = "it writes text, and gives no numbers"
_UNWRITTEN = "no tiny one is written yet"
_INVERSION = "its call needs what its `invert` left in the pipeline"
#: Class → why there is no tiny pipeline of it.
NOT_BUILT = {
    "AllegroPipeline": "its autoencoder decodes in tiles alone, which is set on the loaded pipeline and in no folder",
    "AudioDiffusionPipeline": "needs librosa",
    "BlipDiffusionControlNetPipeline": _UNWRITTEN,
    "BlipDiffusionPipeline": _UNWRITTEN,
    "ChromaInpaintPipeline": "its call reads `guidance_embeds`, which no configuration of its transformer has",
    "ConsisIDPipeline": "needs OpenCV",
    "DiffusionGemmaPipeline": _TEXT,
    "EasyAnimateControlPipeline": _BROKEN,
    "EasyAnimateInpaintPipeline": _BROKEN,
    "GlmImagePipeline": _UNWRITTEN,
    "LLaDA2Pipeline": _TEXT,
    "LTX2DFRTemporalRefinePipeline": "its call continues what another pipeline's call gave",
    "MusicLDMPipeline": _BROKEN,
    "OmniGenPipeline": "needs torchvision",
    "RFD4ProteinaPipeline": "its call takes a table of a protein's features, and no tiny one is written",
    "SpectrogramDiffusionPipeline": "needs note_seq",
    "UniDiffuserPipeline": _UNWRITTEN,
    "VersatileDiffusionDualGuidedPipeline": _BROKEN,
    "ZImageOmniPipeline": "its call encodes images in bfloat16, which fails in float32",
    "VersatileDiffusionPipeline": "has no call of its own: its methods load three others",
    "LEditsPPPipelineStableDiffusion": _INVERSION,
    "LEditsPPPipelineStableDiffusionXL": _INVERSION,
    **dict.fromkeys(
        (
            "AnimaModularPipeline",
            "EchoModularPipeline",
            "Flux3DistilledModularPipeline",
            "Flux3ModularPipeline",
            "HeliosPyramidDistilledModularPipeline",
            "LTX25ModularPipeline",
            "MiniMaxH3ModularPipeline",
            "MiniMaxMusic3ModularPipeline",
            "WanAnimate2DistilledModularPipeline",
            "WanAnimate2ModularPipeline",
        ),
        _UNWRITTEN,
    ),
    **dict.fromkeys(
        (
            "AltDiffusionImg2ImgPipeline",
            "AltDiffusionPipeline",
            "KarrasVePipeline",
            "PaintByExamplePipeline",
            "StableCascadeCombinedPipeline",
            "StableCascadeDecoderPipeline",
            "UnCLIPImageVariationPipeline",
            "UnCLIPPipeline",
            "VQDiffusionPipeline",
            "VersatileDiffusionImageVariationPipeline",
            "VersatileDiffusionTextToImagePipeline",
            "WuerstchenCombinedPipeline",
            "WuerstchenDecoderPipeline",
            "WuerstchenPriorPipeline",
        ),
        "diffusers does not load the folder that it saves of it",
    ),
    **dict.fromkeys(
        (
            "OnnxStableDiffusionImg2ImgPipeline",
            "OnnxStableDiffusionInpaintPipeline",
            "OnnxStableDiffusionInpaintPipelineLegacy",
            "OnnxStableDiffusionPipeline",
            "OnnxStableDiffusionUpscalePipeline",
            "StableDiffusionOnnxPipeline",
        ),
        _ONNX,
    ),
    **dict.fromkeys(
        (
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
        ),
        _GUARDED,
    ),
}


def exported() -> set[str]:
    """Each class of a pipeline, modular ones too; by their names, since importing all would take a minute."""
    names = sys.modules[diffusers.__name__]._class_to_module  # type: ignore[attr-defined]
    found = {name for name in names if "Pipeline" in name and name not in _BASES}
    return {name for name in found if not name.startswith("AutoPipeline") and not name.endswith(_OTHERS)}
