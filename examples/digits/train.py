"""Train the FLUX-architecture pipeline in `model/` from nothing, on scikit-learn's handwritten digits.

    python examples/digits/train.py [--output DIR] [--text-steps N] [--vae-steps N] [--flow-steps N]

Four stages, each with a fixed seed, about ten minutes on one CPU core:

1. tokenizers – a CLIP and a T5 tokenizer whose vocabularies cover the prompts below, and any other ASCII text;
2. text – both text encoders learn to tell the digit that a prompt names, and stay as they are from there on;
3. autoencoder – a KL VAE that turns 32 × 32 RGB images into 2 × 8 × 8 latents;
4. flow – the transformer, by rectified flow [1]: on the straight way x(σ) = (1 − σ)·latents + σ·noise it
   predicts noise − latents. σ is what diffusers' FlowMatchEulerDiscreteScheduler calls sigma and what
   FluxPipeline passes as timestep / 1000.

[1] Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv:2403.03206.
"""

import argparse
import json
import math
import string
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from classifier import INK, WORDS
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

SEED = 7
THREADS = 1  # operations this small gain little from a second thread, and lose much on a busy machine
SIZE = 32  # pixels: load_digits' 8 × 8, four times enlarged
LATENT_CHANNELS = 2
TEXT_DIM = 64
TEXT_LENGTH = 16  # tokens of either tokenizer
TEXT_BATCH = 64
VAE_BATCH = 32
FLOW_BATCH = 64

PHRASINGS = (
    "{}",
    "digit {}",
    "the digit {}",
    "number {}",
    "the number {}",
    "a {}",
    "handwritten {}",
    "a handwritten {}",
    "a handwritten digit {}",
    "a {} written by hand",
    "a picture of a {}",
    "a picture of the number {}",
    "an image of the digit {}",
    "a drawing of a handwritten {}",
    "a scan of the handwritten number {}",
    "please draw the number {}",
    "write a {}",
)


def training_prompts() -> list[list[str]]:
    """All prompts of each digit: every phrasing, with the word and the numeral, in four spellings."""
    spellings = (str, str.capitalize, str.title, str.upper)

    def prompts_of(digit: int, word: str) -> Iterator[str]:
        for phrasing, name, spelling, end in product(PHRASINGS, (word, str(digit)), spellings, ("", ".")):
            yield spelling(phrasing.format(name)) + end

    return [sorted(set(prompts_of(digit, word))) for digit, word in enumerate(WORDS)]


# Tokenizers


def build_clip_tokenizer(corpus: list[str]) -> CLIPTokenizer:
    """Byte-level BPE as CLIP's: 256 bytes, the same ending a word, then merges learnt from the corpus."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=200, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(corpus, trainer)

    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_t5_tokenizer(corpus: list[str]) -> T5Tokenizer:
    """A unigram model as T5's: whole words by frequency, and single characters as a last resort."""
    words = Counter("▁" + word.rstrip(".") for prompt in corpus for word in prompt.split())
    total = sum(words.values())
    rare = math.log(1 / total) - 1
    letters = "▁" + string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, math.log(count / total)) for word, count in sorted(words.items())]
    pieces += [(letter, rare) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, prompts: list[str]) -> Tensor:
    """Token ids of shape (len(prompts), TEXT_LENGTH), int64, as FluxPipeline makes them.

    Raises:
        ValueError: a prompt that would be truncated.
    """
    longest = max(len(tokenizer(prompt).input_ids) for prompt in prompts)
    if longest > TEXT_LENGTH:
        raise ValueError(f"a training prompt takes {longest} tokens, more than {TEXT_LENGTH}")
    return tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids


# Models


def build_vae() -> AutoencoderKL:
    """A KL autoencoder, four times smaller in height and width, without quantization convolutions as in FLUX."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text_encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Two layers each: CLIP for the pooled prompt, T5 for the prompt's tokens."""
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=TEXT_DIM,
        d_kv=TEXT_DIM // 2,
        d_ff=2 * TEXT_DIM,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return CLIPTextModel(clip_config), T5EncoderModel(t5_config)


def build_transformer() -> FluxTransformer2DModel:
    """Two double and two single blocks, whose modulations and output start at zero (as in DiT, arXiv:2212.09748)."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=3,
        attention_head_dim=32,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
    )
    modulations = [m for name, m in transformer.named_modules() if "norm" in name and name.endswith("linear")]
    for linear in [*modulations, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


# Training


def load_images() -> tuple[Tensor, Tensor]:
    """Images of shape (1797, 3, SIZE, SIZE), float32 in −1…1, ink bright; and digits of shape (1797,), int64."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / INK
    large = F.interpolate(small, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return (2 * large - 1).repeat(1, 3, 1, 1), torch.tensor(digits.target)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The peak learning rate after a twentieth of the steps, then a cosine down to zero."""
    warmup = steps // 20 + 1
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
    )


def report(stage: str, step: int, steps: int, loss: float, started: float) -> None:
    if step % 200 == 0 or step == steps:
        print(f"{stage} {step:5d}/{steps}  loss {loss:.4f}  {time.monotonic() - started:4.0f} s", flush=True)


class Prompts:
    """The prompts of all digits as token ids, and the digits that they name."""

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
        by_digit = training_prompts()
        prompts = [prompt for of_digit in by_digit for prompt in of_digit]
        self.clip_ids = tokenize(clip, prompts)
        self.t5_ids = tokenize(t5, prompts)
        self.digits = torch.tensor([digit for digit, of_digit in enumerate(by_digit) for _ in of_digit])
        self.starts = torch.searchsorted(self.digits, torch.arange(11))

    def draw(self, digits: Tensor) -> Tensor:
        """Indices of random prompts that name the given digits."""
        first, end = self.starts[digits], self.starts[digits + 1]
        return first + (torch.rand(len(digits)) * (end - first)).long()


def train_text(clip: CLIPTextModel, t5: T5EncoderModel, prompts: Prompts, steps: int) -> None:
    """Cross-entropy of two linear read-outs, thrown away after: CLIP's pooled output and the mean of T5's tokens."""
    modules = nn.ModuleList([clip, t5, nn.Linear(TEXT_DIM, 10), nn.Linear(TEXT_DIM, 10)])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    rate, started = schedule(optimizer, steps), time.monotonic()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(prompts.digits), (TEXT_BATCH,))
        pooled, tokens = read_prompts(clip, t5, prompts.clip_ids[chosen], prompts.t5_ids[chosen])
        digits = prompts.digits[chosen]
        loss = F.cross_entropy(modules[2](pooled), digits) + F.cross_entropy(modules[3](tokens.mean(1)), digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        report("text", step, steps, loss.item(), started)


def read_prompts(clip: CLIPTextModel, t5: T5EncoderModel, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What FluxPipeline hands to the transformer: (n, TEXT_DIM) from CLIP and (n, TEXT_LENGTH, TEXT_DIM) from T5."""
    return clip(clip_ids).pooler_output, t5(t5_ids)[0]


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int) -> None:
    """Squared error plus a small KL term; then the latents' mean and deviation go into the configuration."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    rate, started = schedule(optimizer, steps), time.monotonic()
    for step in range(1, steps + 1):
        batch = images[torch.randint(len(images), (VAE_BATCH,))]
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + 5e-4 * divergence
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rate.step()
        report("autoencoder", step, steps, error.item(), started)

    mean, std = encode(vae, images)
    variance = mean.var() + std.square().mean()
    vae.register_to_config(shift_factor=mean.mean().item(), scaling_factor=variance.rsqrt().item())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each image's latents, of shape (n, LATENT_CHANNELS, SIZE/4, SIZE/4)."""
    posteriors = [vae.encode(part).latent_dist for part in images.split(256)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


class Latents:
    """Draws packed, scaled latents of given images."""

    def __init__(self, vae: AutoencoderKL, images: Tensor) -> None:
        mean, std = encode(vae, images)
        self.mean = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        self.std = std * vae.config.scaling_factor

    def draw(self, indices: Tensor) -> Tensor:
        """Float32 of shape (len(indices), SIZE²/64, 4·LATENT_CHANNELS): 2 × 2 patches in a row, as FLUX has them."""
        mean = self.mean[indices]
        latents = mean + self.std[indices] * torch.randn_like(mean)
        return FluxPipeline._pack_latents(latents, *latents.shape)


def train_flow(
    transformer: FluxTransformer2DModel,
    latents: Latents,
    prompts: Prompts,
    read: tuple[Tensor, Tensor],
    digits: Tensor,
    steps: int,
) -> FluxTransformer2DModel:
    """Rectified flow with σ drawn logit-normally; returns the exponential average of the weights.

    `read` is what the text encoders make of all prompts; `digits` says what each latent shows.
    """
    side = SIZE // 8
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)
    text_ids = torch.zeros(TEXT_LENGTH, 3)
    average = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    rate, started, smooth = schedule(optimizer, steps), time.monotonic(), 1.0
    for step in range(1, steps + 1):
        indices = torch.randint(len(digits), (FLOW_BATCH,))
        chosen = prompts.draw(digits[indices])
        clean = latents.draw(indices)
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(0.5 + 1.2 * torch.randn(FLOW_BATCH))
        velocity = transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            pooled_projections=read[0][chosen],
            encoder_hidden_states=read[1][chosen],
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(transformer)
        smooth += 0.02 * (loss.item() - smooth)
        report("flow", step, steps, smooth, started)
    return average.module


def train(output: Path, text_steps: int, vae_steps: int, flow_steps: int) -> None:
    """All stages; the pipeline is saved to `output` as a diffusers folder, float32 safetensors."""
    torch.set_num_threads(THREADS)
    images, digits = load_images()
    corpus = [prompt for prompts in training_prompts() for prompt in prompts]
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(corpus), build_t5_tokenizer(corpus)
    prompts = Prompts(clip_tokenizer, t5_tokenizer)

    torch.manual_seed(SEED)
    clip, t5 = build_text_encoders(clip_tokenizer, t5_tokenizer)
    train_text(clip, t5, prompts, text_steps)
    with torch.no_grad():
        read = read_prompts(clip.eval(), t5.eval(), prompts.clip_ids, prompts.t5_ids)

    torch.manual_seed(SEED)
    vae = build_vae()
    train_vae(vae, images, vae_steps)

    torch.manual_seed(SEED)
    transformer = train_flow(build_transformer(), Latents(vae, images), prompts, read, digits, flow_steps)

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )
    pipeline.save_pretrained(output, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--text-steps", type=int, default=300)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--flow-steps", type=int, default=1600)
    options = parser.parse_args()
    train(options.output, options.text_steps, options.vae_steps, options.flow_steps)


if __name__ == "__main__":
    main()
