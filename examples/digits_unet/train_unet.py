"""Train the Stable Diffusion pipeline in `model/`, on scikit-learn's handwritten digits.

    python examples/digits_unet/train_unet.py [--output DIR] [--steps N]

The tokenizer, the text encoder and the autoencoder are those of `../digits/model`. The UNet is trained from nothing
with a fixed seed, about eight minutes on one CPU core: it predicts v = √ᾱ·noise − √(1 − ᾱ)·latents [1] for the noise
schedule of Stable Diffusion. One prompt in eight is empty, so that the pipeline can guide without a classifier [2].

[1] Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv:2202.00512.
[2] Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
DIGITS = HERE.parent / "digits"
sys.path.insert(0, str(DIGITS))

from train import LATENT_CHANNELS, TEXT_DIM, encode, load_images, report, schedule, tokenize, training_prompts  # noqa: E402

SEED = 7
THREADS = 1  # operations this small gain little from a second thread, and lose much on a busy machine
BATCH = 32
EMPTY = 1 / 8  # share of the prompts that are empty


def build_unet() -> UNet2DConditionModel:
    """Returns a UNet of two levels, with attention to the prompt in both, whose output starts at zero."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=2,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def build_scheduler() -> DDIMScheduler:
    """Returns Stable Diffusion's own noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class Prompts:
    """What the text encoder makes of the prompts of all digits, and of the empty one.

    Attributes:
        empty: float32 [16, TEXT_DIM].
    """

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        by_digit = training_prompts()
        with torch.no_grad():
            self._read = [encoder(tokenize(tokenizer, prompts))[0] for prompts in by_digit]
            self.empty = encoder(tokenize(tokenizer, [""]))[0][0]

    def draw(self, digits: Tensor) -> Tensor:
        """Returns float32 [len(digits), 16, TEXT_DIM] of random prompts that name the digits; some are empty."""
        chosen = [self._read[digit][torch.randint(len(self._read[digit]), ()).item()] for digit in digits.tolist()]
        empty = torch.rand(len(digits)) < EMPTY
        return torch.where(empty[:, None, None], self.empty, torch.stack(chosen))


def train_unet(
    unet: UNet2DConditionModel, vae: AutoencoderKL, prompts: Prompts, images: Tensor, digits: Tensor, steps: int
) -> UNet2DConditionModel:
    """Trains by the mean squared error of v; returns the exponential average of the weights."""
    mean, std = (part * vae.config.scaling_factor for part in encode(vae, images))
    scheduler = build_scheduler()
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    rate, started, smooth = schedule(optimizer, steps), time.monotonic(), 1.0
    for step in range(1, steps + 1):
        indices = torch.randint(len(digits), (BATCH,))
        clean = mean[indices] + std[indices] * torch.randn_like(mean[indices])
        noise, times = torch.randn_like(clean), torch.randint(1000, (BATCH,))
        noisy = scheduler.add_noise(clean, noise, times)
        found = unet(noisy, times, prompts.draw(digits[indices]), return_dict=False)[0]
        loss = F.mse_loss(found, scheduler.get_velocity(clean, noise, times))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(unet)
        smooth += 0.02 * (loss.item() - smooth)
        report("unet", step, steps, smooth, started)
    return average.module


def train(output: Path, steps: int) -> None:
    """Saves the pipeline to `output` as a diffusers folder, float32 safetensors."""
    torch.set_num_threads(THREADS)
    images, digits = load_images()
    tokenizer = CLIPTokenizer.from_pretrained(DIGITS / "model", subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(DIGITS / "model", subfolder="text_encoder").eval()
    vae = AutoencoderKL.from_pretrained(DIGITS / "model", subfolder="vae").eval()
    vae.register_to_config(shift_factor=None)  # StableDiffusionPipeline knows of none
    torch.manual_seed(SEED)
    unet = train_unet(build_unet(), vae, Prompts(tokenizer, encoder), images, digits, steps)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    train(options.output, options.steps)


if __name__ == "__main__":
    main()
