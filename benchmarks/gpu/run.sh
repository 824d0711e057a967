#!/usr/bin/env bash
# Everything that needs a GPU, in calls of at most ten minutes. Needs diffkiln[dev] and a torch with CUDA.
#
#   benchmarks/gpu/run.sh [PART...]
#   parts: tests ceilings eager compile build-bf16 bf16 graphs build-untuned untuned build-hoisted hoisted build-fp8 fp8
#          build-mask mask build-streamed streamed offload replay
#
# Without a part it runs as many as fit, in this order. Rows are kept in $ROWS as they are measured, so that parts may be
# run one by one, on several days; the table is made of all that are there. One that fails costs its own row. A bundle is
# compiled by a part of its own, build-NAME, so that neither takes the time of the other. Engines that are ready when the
# time runs out are kept, and the part goes on with them. Measuring compiles a bundle that is not there.
#
#   SECONDS_IN_ALL  for the whole call (540)      ROWS  of the tables (benchmarks/results/gpu-rows)
#   RUNS, WARM      counted runs, others (10, 3)  WORK  for bundles: 35 GB for bf16, 22 GB each for fp8 (/tmp/diffkiln-gpu)
#   TABLE           the table (benchmarks/results/gpu.md)         REHEARSE=1  the tiny FLUX, on any device
set -uo pipefail
self="$(realpath "$0")"
cd "$(dirname "$self")/../.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
rows="${ROWS:-benchmarks/results/gpu-rows}" work="${WORK:-/tmp/diffkiln-gpu}" out="${TABLE:-benchmarks/results/gpu.md}"
[[ ${REHEARSE:-} ]] && export MKL_CBWR=COMPATIBLE  # the tiny FLUX is that of the tests, which ask for it
runs="${RUNS:-10}" warm="${WARM:-3}" python="${PYTHON:-python3}"
end=$((SECONDS + ${SECONDS_IN_ALL:-540}))
all=(tests ceilings eager compile build-bf16 bf16 graphs build-untuned untuned build-hoisted hoisted build-fp8 fp8
    build-mask mask build-streamed streamed offload replay)
usage() { sed -n '2,17s/^# \{0,1\}//p' "$self"; }

left() { echo $((end - SECONDS)); }

# Ways that are timed in turn; the first is what the others are compared with.
rounds() {
    "$python" benchmarks/gpu/rounds.py "$@" --rows "$rows" --work "$work" --seconds "$(left)" ${REHEARSE:+--rehearse}
}

# Each file of tests in a process of its own: what breaks the GPU's context breaks it for one file. Their words are kept.
# The tests of tests/gpu may run with another torch than the tested one, whose warnings are told and are no failures.
tests() {
    local code=0
    for file in weights replay graphs attention engines tensorrt; do
        if (($(left) < 30)); then echo "tests/gpu/test_$file.py: no time left" >&2 && code=1 && continue; fi
        timeout "$(left)" "$python" -m pytest -v -rA --tb=short --durations=0 -W default -m gpu "tests/gpu/test_$file.py" 2>&1 |
            tee "$rows/tests-$file.log" || code=1
    done
    return $code
}

# Both architectures, whatever becomes of the first.
replays() {
    local code=0
    local how=(${REHEARSE:+--rehearse --runs "$runs"})
    timeout "$(left)" "$python" benchmarks/gpu/replay.py --architecture sd-1.5 "${how[@]}" >"$rows/replay-sd.txt" || code=1
    (($(left) >= 30)) && timeout "$(left)" "$python" benchmarks/gpu/replay.py --architecture sdxl-base-1.0 --steps 30 \
        "${how[@]}" >"$rows/replay-sdxl.txt" || code=1
    return $code
}

# Bundles of another kind make room: together they are more than the disk of a small machine.
only() { for bundle in "$work"/bundle-*; do [[ $bundle == "$work/bundle-$1" ]] || rm -rf "$bundle"; done; }

# Compile the bundle of a way, where it is not there yet.
built() {
    timeout "$(left)" "$python" benchmarks/gpu/ways.py "bundle-$1" --work "$work" --build ${REHEARSE:+--rehearse}
}

part() {
    case $1 in
    tests) tests ;;
    ceilings) timeout "$(left)" "$python" benchmarks/gpu/ceilings.py --rows "$rows" ${REHEARSE:+--rehearse} ;;
    eager) rounds eager eager-cudnn --runs "$runs" --warm "$warm" ;;
    compile) rounds eager compile-blocks compile-full --runs "$runs" --warm "$warm"; rounds pruna-like --runs "$runs" --warm "$warm" ;;
    build-bf16) only bf16 && built bf16 ;;
    bf16) only bf16 && rounds eager bundle-bf16 --runs "$runs" --warm "$warm" ;;
    graphs) only bf16 && rounds bundle-bf16-step-graphs bundle-bf16-program-graphs --runs "$runs" --warm "$warm" ;;
    build-untuned) only bf16-hidden && built bf16-untuned ;;
    untuned) only bf16-hidden && rounds eager bundle-bf16-untuned --runs "$runs" --warm "$warm" ;;
    build-hoisted) only bf16-hoisted && built bf16-hoisted ;;
    hoisted) only bf16-hoisted && rounds eager bundle-bf16-hoisted --runs "$runs" --warm "$warm" ;;
    build-fp8) only fp8 && built fp8 ;;
    fp8) only fp8 && rounds eager bundle-fp8 --runs "$runs" --warm "$warm" ;;
    build-mask) only fp8-mask && built fp8-mask ;;
    mask) only fp8-mask && rounds eager bundle-fp8-mask --runs "$runs" --warm "$warm" ;;
    build-streamed) only fp8-streamed && built fp8-streamed ;;
    streamed) only fp8-streamed && rounds bundle-fp8-streamed --runs "$runs" --warm "$warm" ;;
    offload) for way in group model sequential; do rounds "offload-$way" --runs 2 --warm 1; done ;;
    replay) replays ;;
    esac
}

[[ ${1:-} == -h || ${1:-} == --help ]] && usage && exit 0
for name in "$@"; do [[ " ${all[*]} " == *" $name "* ]] || { echo "no part $name" >&2; usage >&2; exit 2; }; done
mkdir -p "$rows" "$work"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total --format=csv || true
"$python" -c 'import platform, torch, diffusers, torchao; print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda, "diffusers", diffusers.__version__, "torchao", torchao.__version__)'
status=0
for name in "${@:-${all[@]}}"; do
    if (($(left) < 30)); then echo "$name: no time left" >&2 && status=1 && continue; fi
    echo "== $name, $(left) s left" >&2
    part "$name" || { echo "$name: failed" >&2 && status=1; }
done
{
    "$python" benchmarks/gpu/tables.py --rows "$rows" || status=1
    for file in "$rows"/replay-*.txt; do if [[ -s $file ]]; then echo && cat "$file"; fi; done
} >"$out.new"
[[ -s $out.new ]] && mv "$out.new" "$out" && cat "$out"
exit $status
