#!/usr/bin/env bash
# Runs everything that needs a GPU, with a time limit for each stage:
#
#     tools/on_gpu.sh [STAGE ...]        smoke check speed suite sanitize; all, unless some are named
#     REHEARSE=1 tools/on_gpu.sh         tries the script without a GPU
#
# It needs PyTorch with CUDA, pytest and pytest-xdist, and the library. WHEEL names a wheel that
# `make gpu-wheel` built (default: build/gpu/*.whl), whose library is unpacked into the checkout.
# Without a wheel, the library in the checkout is used. Each stage has a budget in seconds, is killed
# when that is used up, leaves its log in $OUT (default: build/on_gpu), and does not stop the others.
# The last lines give the result and the duration of each stage.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-build/on_gpu}
mkdir -p "$out"
export python=${PYTHON:-python3} out PYTHONPATH=. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export device=cuda shapes='' processes=8 RELU_MLP_TEST_DEVICE=cuda
if [ -n "${REHEARSE:-}" ]; then
    device=cpu RELU_MLP_TEST_DEVICE=cpu processes=2
    shapes='--shape 64,8,8 --shape 16,64,64,64,64'
fi
export sanitizer=$(command -v compute-sanitizer)

smoke() { # loads the package, and compares one step of each method and dtype with float64
    "$python" -m relu_mlp info && "$python" tools/gpu_smoke.py --device "$device"
}
check() { # the kernels' own tests
    "$python" -m pytest -q -n "$processes" tests/kernels/test_cuda*.py
}
speed() { # with CUDA events, compared with eager, torch.compile and other installed libraries
    "$python" benchmarks/on_gpu.py --out "$out" --device "$device" --seconds 130 $shapes
}
suite() { # the tests that run the layer, the most informative first
    "$python" -m pytest -q -n "$processes" --maxfail 200 -k 'not reference' \
        tests/core/test_random_networks.py tests/core/test_gradcheck.py \
        tests/core/test_autograd_semantics.py tests/composition/test_transforms.py \
        tests/core/test_training.py tests/composition/test_autocast.py \
        tests/composition/test_batching.py tests/core/test_recompute.py \
        tests/core/test_loss_and_grads.py tests/core/test_jacobian.py \
        tests/core/test_linearization.py tests/core/test_module.py
}
sanitize() { # one case of each kernel
    local tool failed=0
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 ${sanitizer:+timeout 55 "$sanitizer" --tool "$tool" --error-exitcode 1} \
            "$python" tools/gpu_smoke.py --small --device "$device" || failed=1
    done
    [ -n "$sanitizer" ] || echo "no compute-sanitizer was found: nothing was watched"
    return "$failed"
}
declare -A budget=([smoke]=30 [check]=150 [speed]=150 [suite]=240 [sanitize]=120)

[ $# -gt 0 ] || set -- smoke check speed suite sanitize
for stage; do
    [ -n "${budget[$stage]:-}" ] || { echo "no stage '$stage': ${!budget[*]}" >&2; exit 2; }
done
for wheel in ${WHEEL:-build/gpu/*.whl}; do
    [ ! -f "$wheel" ] || "$python" -m zipfile -e "$wheel" "$out/wheel" &&
        cp "$out"/wheel/relu_mlp/_C*.so relu_mlp/
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null
status=0
: > "$out/report.txt"
for stage; do
    export -f "${stage?}"
    started=$SECONDS
    timeout --kill-after 5 "${budget[$stage]}" bash -c "$stage" 2>&1 | tee "$out/$stage.log"
    case ${PIPESTATUS[0]} in
        0) how=passed ;;
        124 | 137) how="KILLED at its budget of ${budget[$stage]} s" status=1 ;;
        *) how=FAILED status=1 ;;
    esac
    echo "$stage: $how, $((SECONDS - started)) s" >> "$out/report.txt"
done
cat "$out/report.txt"
exit "$status"
