#!/usr/bin/env bash
# Wheels to carry to a GPU machine that has torch, transformers and accelerate, and no package registry. The headers of
# CUDA's C++ library are among them, which torch's wheels do not bring.
#   benchmarks/gpu/wheels.sh DIR [PYTHON]      PYTHON is that machine's version (3.12)
# There:  python3 -m pip install --no-index --no-deps --target SITE DIR/*.whl && export PYTHONPATH=SITE
set -euo pipefail
dir="${1:?where to put them}" version="${2:-3.12}"
platforms=()
for glibc in 2_34 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
version_of() { sed -n "s/^$1==/==/p" "$(dirname "$0")/../../constraints.txt"; }
fetch() {
    python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
        "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$dir" "$@"
}
fetch "diffusers$(version_of diffusers)" "torchao$(version_of torchao)" "pydantic$(version_of pydantic)" \
    annotated-types typing-inspection rfc8785 ftfy wcwidth importlib-metadata requests charset-normalizer \
    "nvidia-cuda-cccl$(version_of nvidia-cuda-cccl)"
# pydantic is of one version of its core.
fetch "$(unzip -p "$dir"/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: \(pydantic-core==[^ ;]*\).*/\1/p')"
du -sh "$dir"
