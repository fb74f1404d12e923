#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the backend for the device that is here, compares every op with the CPU,
# runs compute-sanitizer on small shapes, and times the kernels beside PyTorch. Needs nvcc, cmake and a C++ compiler; no Node.
# compute-sanitizer and PyTorch are used where they are. Results go to docs/benchmarks/cuda-<date>.jsonl; exit status 1 when a check failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

build=build-native/device
out=${OUT:-docs/benchmarks}
jobs=$(nproc)
status=0

field() { nvidia-smi --query-gpu="$1" --format=csv,noheader --id=0 2>/dev/null | head -n 1; }
capability=$(field compute_cap | tr -d .)
if [ -z "$capability" ]; then
  echo '[cuda-device] device: expected one that nvidia-smi shows, found none'
  exit 1
fi
driver=$(field driver_version)
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
date=$(date -u +%Y-%m-%dT%H:%MZ)
context="\"date\":\"$date\",\"driver\":\"$driver\",\"commit\":\"$commit\""
mkdir -p "$out"
lines=$out/cuda-${date%T*}.jsonl

step() { # name, command...
  local name=$1 start=$SECONDS
  shift
  printf '\n=== %s\n' "$name"
  if "$@"; then printf '=== %s: passed, %d s\n' "$name" $((SECONDS - start)); else
    status=1
    printf '=== %s: FAILED, %d s\n' "$name" $((SECONDS - start))
  fi
}
record() { "$@" | tee -a "$lines"; }

configure() {
  cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DALIGNGPT_ADDON=OFF -DALIGNGPT_TESTS=ON -DALIGNGPT_BENCH=ON -DALIGNGPT_CUDA=ON \
    "-DALIGNGPT_CUDA_ARCHITECTURES=$capability-real" >"$build.log" 2>&1 &&
    cmake --build "$build" --parallel "$jobs" --target aligngpt_cuda test_cuda bench_cuda >>"$build.log" 2>&1
}

mkdir -p "$(dirname "$build")"
step 'build' configure
library=$build/native/cuda/libaligngpt_cuda.so
if [ ! -f "$library" ]; then
  tail -n 30 "$build.log"
  exit 1
fi

# cublasLt is looked for below this python too: PyTorch brings it along. The last line of the tests says what products ran on.
export VIRTUAL_ENV=${VIRTUAL_ENV:-$(python3 -c 'import sys; print(sys.prefix)' 2>/dev/null)}
step 'every op against the CPU' "$build/test_cuda" --library "$library"
attention=("$build/test_cuda" --library "$library" --filter attention_packed)
step 'attention, dQ with atomics' env ALIGNGPT_DETERMINISTIC=0 "${attention[@]}"
if [ "$capability" = 90 ]; then step 'attention with wgmma' env ALIGNGPT_ATTENTION=wgmma timeout 300 "${attention[@]}"; fi
step 'matrix products by our own kernels' env ALIGNGPT_GEMM=own "$build/test_cuda" --library "$library" --filter gemm
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck; do
    step "compute-sanitizer $tool" env ALIGNGPT_GEMM=own timeout 120 "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 "$build/test_cuda" --library "$library" --small
  done
else
  printf '\n=== compute-sanitizer: not run, it is not here\n'
fi
step 'benchmark' record "$build/bench_cuda" --library "$library" --context "$context"
bench=("$build/bench_cuda" --library "$library" --filter attention)
step 'benchmark, dQ with atomics' record env ALIGNGPT_DETERMINISTIC=0 "${bench[@]}" --context "$context,\"deterministic\":false"
if [ "$capability" = 90 ]; then
  step 'benchmark, wgmma' record env ALIGNGPT_ATTENTION=wgmma timeout 300 "${bench[@]}" --context "$context,\"attention\":\"wgmma\""
fi
step 'benchmark of our own matrix products' record env ALIGNGPT_GEMM=own "$build/bench_cuda" --library "$library" --filter gemm --context "$context"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  step 'PyTorch on the same device' record python3 scripts/bench/cuda_peer.py "$context"
else
  printf '\n=== PyTorch: not run, python3 has none that sees the device\n'
fi
printf '\nresults: %s\n' "$lines"
exit $status
