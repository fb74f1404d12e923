#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the backend for the device that is here, compares every op with the CPU, times the
# kernels beside PyTorch, and runs compute-sanitizer on small shapes. Needs nvcc, cmake and a C++ compiler; no Node.
#   bash scripts/cuda/device.sh [test] [bench] [torch] [options] [sanitizer] [wgmma]     all of them, in this order, without arguments
# compute-sanitizer and PyTorch are used where they are. The numbers go to docs/benchmarks/cuda-<date>.jsonl, what is printed to
# build-native/cuda-device.log as well; with OUT=DIR all of it goes there. LIMIT: seconds after which nothing more is begun, and what
# runs is ended (540). COMMIT: of the sources, where there is no git. Exit status 1 when a check failed.
#
# Each case of the tests and each part of the benchmark is a process of its own: after an illegal access a process gets nothing more
# from its GPU, and the others still tell.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

build=build-native/cuda-device
logs=${OUT:-build-native}
out=${OUT:-docs/benchmarks}
mkdir -p "$logs" "$out"
exec > >(tee "$logs/cuda-device.log") 2>&1
printer=$!
end=$((SECONDS + ${LIMIT:-540}))
parts=" ${*:-test bench torch options sanitizer wgmma} "
for part in $parts; do
  case $part in test | bench | torch | options | sanitizer | wgmma) ;; *)
    echo "[cuda-device] expected test, bench, torch, options, sanitizer or wgmma, got $part"
    exit 1
    ;;
  esac
done

if [ "$(uname -m)" != x86_64 ]; then # the tests have the emulation in them, whose threads change places in x86 assembly
  echo "[cuda-device] expected x86_64, got $(uname -m)"
  exit 1
fi
field() { nvidia-smi --query-gpu="$1" --format=csv,noheader --id=0 2>/dev/null | head -n 1; }
capability=$(field compute_cap | tr -d .)
if [ -z "$capability" ]; then
  echo '[cuda-device] device: expected one that nvidia-smi shows, found none'
  exit 1
fi
driver=$(field driver_version)
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
date=$(date -u +%Y-%m-%dT%H:%MZ)
context="\"date\":\"$date\",\"driver\":\"$driver\",\"commit\":\"$commit\""
lines=$out/cuda-${date%T*}.jsonl
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
# cublasLt is looked for below this python too: PyTorch brings it along. The last line of the tests says what products ran on.
export VIRTUAL_ENV=${VIRTUAL_ENV:-$(python3 -c 'import sys; print(sys.prefix)' 2>/dev/null)}

status=0
table=''
note() { table+=$(printf '%-9s %5s s  %s' "$2" "$3" "$1")$'\n'; }
wanted() { [[ $parts == *" $1 "* ]]; }
# Runs a command for at most so many seconds; 124 when they were not enough.
limited() { # seconds, command...
  local most=$1 left=$((end - SECONDS))
  shift
  [ "$left" -gt 0 ] || return 124
  timeout -k 5 "$((most < left ? most : left))" "$@"
}
step() { # name, command...
  local name=$1 start=$SECONDS rc=0 result
  shift
  printf '\n=== %s\n' "$name"
  "$@" || rc=$?
  case $rc in 0) result=passed ;; 124 | 137) result=time ;; *) result=FAILED ;; esac
  [ "$rc" -eq 0 ] || status=1
  printf '=== %s: %s (%d), %d s\n' "$name" "$result" "$rc" $((SECONDS - start))
  note "$name" "$result" $((SECONDS - start))
}
each() { # seconds, list of words, command...: the command with each of the words at its end; the worst exit status
  local most=$1 worst=0 rc word
  local -a words
  mapfile -t words <<<"$2"
  shift 2
  for word in "${words[@]}"; do
    rc=0
    limited "$most" "$@" "$word" || rc=$?
    [ "$rc" -eq 0 ] || printf '%s: exit status %d\n' "$word" "$rc" >&2
    [ "$rc" -gt "$worst" ] && worst=$rc
  done
  return "$worst"
}
record() { "$@" | tee -a "$lines"; }

library=$build/native/cuda/libaligngpt_cuda.so
tests=("$build/test_cuda" --library "$library")
bench=("$build/bench_cuda" --library "$library")
build_all() {
  local keep=-k # all errors at once
  if command -v ninja >/dev/null; then
    export CMAKE_GENERATOR=Ninja
    keep=-k0
  fi
  rm -f "$library" "$build/test_cuda" "$build/bench_cuda" # nothing old is tested when the build fails
  cmake --preset cuda-device "-DALIGNGPT_CUDA_ARCHITECTURES=$capability-real" &&
    cmake --build --preset cuda-device --parallel "$(nproc)" -- "$keep"
}
build_quietly() { build_all >"$logs/cuda-build.log" 2>&1 || { grep -nE 'error|FAILED|Error' "$logs/cuda-build.log" | head -n 40 && false; }; }

test_all() { each 60 "$("${tests[@]}" --list)" "${tests[@]}" --only; }
bench_all() { record each 60 $'copy\nrmsNorm\nadamw\nlmHead\ngemm\nattention causal\nattentionCached\nembedding\nalignMix\n4 layers' "${bench[@]}" --context "$context" --filter; }
sanitized() { # tool
  ALIGNGPT_GEMM=own limited 100 "$sanitizer" --tool "$1" --report-api-errors no --error-exitcode 9 "${tests[@]}" --small
}

step 'build' build_quietly
[ -x "$build/test_cuda" ] && wanted test && step 'every op against the CPU' test_all
if [ -x "$build/bench_cuda" ] && wanted bench; then step 'benchmark' bench_all; fi
if wanted torch; then
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    step 'PyTorch on the same device' record limited 120 python3 scripts/bench/cuda_peer.py "$context"
  else
    note 'PyTorch: python3 has none that sees the device' 'not run' 0
  fi
fi
if wanted options; then
  export ALIGNGPT_DETERMINISTIC=0
  step 'attention, dQ with atomics' limited 60 "${tests[@]}" --filter attention_packed
  step 'benchmark, dQ with atomics' record limited 60 "${bench[@]}" --filter attention --context "$context,\"deterministic\":false"
  unset ALIGNGPT_DETERMINISTIC
  export ALIGNGPT_GEMM=own
  step 'matrix products by our own kernels' limited 60 "${tests[@]}" --filter gemm
  step 'benchmark of our own matrix products' record limited 60 "${bench[@]}" --filter gemm --context "$context"
  unset ALIGNGPT_GEMM
fi
if wanted sanitizer; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck initcheck; do step "compute-sanitizer $tool" sanitized "$tool"; done
  else
    note 'compute-sanitizer: it is not here' 'not run' 0
  fi
fi
if wanted wgmma; then
  if [ "$capability" = 90 ]; then # last: a mistake in a barrier would hang
    export ALIGNGPT_ATTENTION=wgmma
    step 'attention with wgmma' limited 45 "${tests[@]}" --filter attention_packed
    step 'benchmark, wgmma' record limited 45 "${bench[@]}" --filter attention --context "$context,\"attention\":\"wgmma\""
  else
    note "attention with wgmma: expected sm_90, this is sm_$capability" 'not run' 0
  fi
fi

printf '\n%s\nnumbers: %s\n' "$table" "$lines"
exec >&- 2>&-
wait "$printer"
exit $status
