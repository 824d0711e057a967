"""Train a LoRA adapter of the pipeline in `model/`: digits that lean to the right, some three minutes on one CPU core.

    python examples/digits/train_lora.py [--steps N] [--output DIR]

The factors are added by peft to the linear layers of all blocks and to the last layer, and saved as diffusers does; the
pipeline's own weights stay. The images are those that the pipeline was trained on, sheared. The seed is fixed.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from styles import slanted
from torch import nn
from torch.nn import functional as F
from train import (
    SEED,
    SIZE,
    TEXT_LENGTH,
    THREADS,
    Latents,
    Prompts,
    load_images,
    read_prompts,
    report,
    schedule,
)

HERE = Path(__file__).parent
RANK = 8
BATCH = 32
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_mlp", "proj_out", "add_q_proj"]
LAYERS += ["add_k_proj", "add_v_proj", "to_add_out"]


def train(steps: int, output: Path) -> None:
    """Trains the factors by rectified flow, as train.py does the transformer, and saves them."""
    torch.set_num_threads(THREADS)
    pipe = FluxPipeline.from_pretrained(HERE / "model", local_files_only=True)
    images, digits = load_images()
    prompts, latents = Prompts(pipe.tokenizer, pipe.tokenizer_2), Latents(pipe.vae.eval(), slanted(images))
    with torch.no_grad():
        read = read_prompts(pipe.text_encoder, pipe.text_encoder_2, prompts.clip_ids, prompts.t5_ids)
    torch.manual_seed(SEED)
    transformer = pipe.transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    factors = [weight for weight in transformer.parameters() if weight.requires_grad]
    image_ids = FluxPipeline._prepare_latent_image_ids(1, SIZE // 8, SIZE // 8, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(factors, lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    rate, started, smooth = schedule(optimizer, steps), time.monotonic(), 1.0
    for step in range(1, steps + 1):
        indices = torch.randint(len(digits), (BATCH,))
        chosen, clean = prompts.draw(digits[indices]), latents.draw(indices)
        noise, sigma = torch.randn_like(clean), torch.sigmoid(0.5 + 1.2 * torch.randn(BATCH))
        velocity = transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            pooled_projections=read[0][chosen],
            encoder_hidden_states=read[1][chosen],
            img_ids=image_ids,
            txt_ids=torch.zeros(TEXT_LENGTH, 3),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        rate.step()
        smooth += 0.02 * (loss.item() - smooth)
        report("slanted", step, steps, smooth, started)
    layers = get_peft_model_state_dict(transformer)
    FluxPipeline.save_lora_weights(output, transformer_lora_layers=layers, weight_name="slanted.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=HERE / "lora")
    options = parser.parse_args()
    train(options.steps, options.output)


if __name__ == "__main__":
    main()
