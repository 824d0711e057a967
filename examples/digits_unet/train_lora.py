"""Train a LoRA adapter of the pipeline in `model/`: digits that lean to the right, some three minutes on one CPU core.

    python examples/digits_unet/train_lora.py [--steps N] [--output DIR]

The factors are added to the attention and feed-forward layers by peft, and saved as diffusers does; the pipeline's own
weights stay. The images are those that the pipeline was trained on, sheared. The seed is fixed.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from train_unet import BATCH, HERE, SEED, THREADS, Prompts, build_scheduler

from styles import slanted  # isort: skip  # train_unet has put ../digits on the path
from train import encode, load_images, report, schedule  # isort: skip

RANK = 8
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out"]


def train(steps: int, output: Path) -> None:
    """Trains the factors by the error of v, as train_unet.py does the UNet, and saves them."""
    torch.set_num_threads(THREADS)
    pipe = StableDiffusionPipeline.from_pretrained(HERE / "model", local_files_only=True, safety_checker=None)
    images, digits = load_images()
    prompts, scheduler = Prompts(pipe.tokenizer, pipe.text_encoder), build_scheduler()
    mean, std = (part * pipe.vae.config.scaling_factor for part in encode(pipe.vae.eval(), slanted(images)))
    torch.manual_seed(SEED)
    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    factors = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    rate, started, smooth = schedule(optimizer, steps), time.monotonic(), 1.0
    for step in range(1, steps + 1):
        indices, times = torch.randint(len(digits), (BATCH,)), torch.randint(1000, (BATCH,))
        clean = mean[indices] + std[indices] * torch.randn_like(mean[indices])
        noise = torch.randn_like(clean)
        found = unet(scheduler.add_noise(clean, noise, times), times, prompts.draw(digits[indices]), return_dict=False)
        loss = F.mse_loss(found[0], scheduler.get_velocity(clean, noise, times))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        rate.step()
        smooth += 0.02 * (loss.item() - smooth)
        report("slanted", step, steps, smooth, started)
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(output, unet_lora_layers=layers, weight_name="slanted.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--output", type=Path, default=HERE / "lora")
    options = parser.parse_args()
    train(options.steps, options.output)


if __name__ == "__main__":
    main()
