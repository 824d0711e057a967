"""A server as one writes it first: FastAPI around diffusers' own pipeline, one request after the other.

python benchmarks/peers/plain_server.py MODEL PORT
"""

from __future__ import annotations

import base64
import io
import sys
import threading

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
turn = threading.Lock()
app = FastAPI()


class Asked(BaseModel):
    """A request."""

    prompt: str
    seed: int


@app.post("/v1/images/generations")
def draw(asked: Asked) -> dict[str, object]:
    """Draws one image with the same settings as the bundle's."""
    with turn:
        image = pipe(
            asked.prompt,
            height=32,
            width=32,
            num_inference_steps=8,
            guidance_scale=1.0,
            max_sequence_length=16,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
        ).images[0]
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode(), "seed": asked.seed}]}


@app.get("/ready")
def ready() -> dict[str, str]:
    """Tells that the pipeline is loaded."""
    return {"status": "ok"}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
