#!/usr/bin/env bash
# Both phases through Node on this machine, from the folder this file is in (npm run cuda:pack made it): parity with PyTorch, the quick
# start, and steps with the shapes of a 7B model. Needs no Node, no network.
#   bash run.sh [goldens] [quickstart] [graphs] [own] [step]      all of them, in this order, without arguments
# graphs: goldens and the quick start again, recorded as CUDA graphs. own: the goldens by our own matrix products.
# ALIGNGPT_DEVICE: cuda unless it is set; cpu to try the folder (the steps are tiny ones then). OUT: where results go. STEP: arguments
# of the last step, such as "--keep-activations". LIMIT: seconds after which nothing more is begun, and what runs is ended (570).
# Exit status 1 when something failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
export ALIGNGPT_DEVICE=${ALIGNGPT_DEVICE:-cuda}
# cublasLt is looked for below this python too: PyTorch brings it along. `info` says what products run on.
export VIRTUAL_ENV=${VIRTUAL_ENV:-$(python3 -c 'import sys; print(sys.prefix)' 2>/dev/null)}
out=${OUT:-$PWD/results}
mkdir -p "$out"
exec > >(tee "$out/run.log") 2>&1
printer=$!
end=$((SECONDS + ${LIMIT:-570}))
status=0
table=''

unpack() { # to standard output
  if command -v xz >/dev/null; then xz -dc "$1"; else
    python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer)' "$1"
  fi
}
if [ ! -x node ]; then # the last thing that is unpacked
  if ! unpack files.tar.xz | tar -x || ! unpack node.xz >node.part; then
    echo '[run] expected tar, and xz or python3, to unpack this folder with'
    exit 1
  fi
  chmod +x node.part && mv node.part node
fi

step() { # name, seconds at most, command...
  local name=$1 most=$2 start=$SECONDS left=$((end - SECONDS)) rc=124 result
  shift 2
  printf '\n=== %s\n' "$name"
  if [ "$left" -gt 0 ]; then
    rc=0
    timeout -k 5 "$((most < left ? most : left))" "$@" || rc=$?
  fi
  case $rc in 0) result=passed ;; 124 | 137) result=time ;; *) result=FAILED ;; esac
  [ "$rc" -eq 0 ] || status=1
  printf '=== %s: %s (%d), %d s\n' "$name" "$result" "$rc" $((SECONDS - start))
  table+=$(printf '%-9s %5s s  %s' "$result" $((SECONDS - start)) "$name")$'\n'
}
goldens() { # name, command before it...: each case by itself, the others tell when one fails
  local name=$1 case
  shift
  for case in ts/test/golden/*/; do
    case=$(basename "$case")
    step "$name $case" 60 "$@" ./node scripts/parity/goldens.js --cases ts/test/golden --only "$case"
  done
}
quickstart() { # name, command before it...: of what it writes only the numbers are kept
  local name=$1 folder
  folder=$(mktemp -d)
  shift
  step "$name" 150 "$@" ./node scripts/quickstart/main.js --fast --out "$folder/quickstart"
  cp "$folder/quickstart/result.json" "$out/${name// /-}.json" 2>/dev/null
  rm -rf "$folder"
}

small=''
[ "$ALIGNGPT_DEVICE" = cpu ] && small=--small
step info 30 ./node ts/src/cli.js info
for part in "${@:-all}"; do
  case $part in goldens | quickstart | graphs | own | step | all) ;; *)
    echo "[run] expected goldens, quickstart, graphs, own or step, got $part"
    exit 1
    ;;
  esac
  case $part in goldens | all) goldens goldens env ;; esac
  case $part in quickstart | all) quickstart quickstart env ;; esac
  case $part in graphs | all)
    goldens 'goldens as graphs' env ALIGNGPT_CUDA_GRAPHS=1
    quickstart 'quickstart as graphs' env ALIGNGPT_CUDA_GRAPHS=1
    ;;
  esac
  case $part in own | all) goldens 'goldens, own products' env ALIGNGPT_GEMM=own ;; esac
  # shellcheck disable=SC2086 # words of their own
  case $part in step | all)
    step 'step of 4 layers' 90 ./node scripts/cuda/step.js $small --layers 4 --batch 4
    step step 240 ./node scripts/cuda/step.js $small ${STEP:-}
    ;;
  esac
done
printf '\n%s\nresults: %s\n' "$table" "$out"
exec >&- 2>&-
wait "$printer"
exit $status
