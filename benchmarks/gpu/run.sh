#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests marked gpu, then the tables. Needs diffkiln[dev] and a CUDA torch.
#   benchmarks/gpu/run.sh [OUT]      writes its tables to OUT (default: benchmarks/results/gpu.md)
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-benchmarks/results/gpu.md}"
export HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv
python -m pytest -q -m gpu tests/gpu
{
    echo "# On a GPU"
    echo
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader
    echo
    python benchmarks/gpu/replay.py --architecture sd-1.5
    echo
    python benchmarks/gpu/replay.py --architecture sdxl-base-1.0 --steps 30
} | tee "$out"
