#!/usr/bin/env bash
# Both phases through Node on this machine, from the folder this file is in (npm run cuda:pack made it): parity with PyTorch, the quick
# start, and steps with the shapes of a 7B model. Needs no Node, no network.
#   bash run.sh [goldens] [quickstart] [step]      all three without arguments
# ALIGNGPT_DEVICE: cuda unless it is set; cpu to try the folder (the step is a tiny one then). OUT: where results go. STEP: arguments
# of the step, such as "--layers 8 --batch 4". Exit status 1 when something failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
export ALIGNGPT_DEVICE=${ALIGNGPT_DEVICE:-cuda}
out=${OUT:-$PWD/results}
mkdir -p "$out"
status=0

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

step() { # name, command...
  local name=$1 start=$SECONDS
  shift
  printf '\n=== %s\n' "$name"
  if "$@" 2>&1 | tee "$out/$name.log"; then printf '=== %s: passed, %d s\n' "$name" $((SECONDS - start)); else
    status=1
    printf '=== %s: FAILED, %d s\n' "$name" $((SECONDS - start))
  fi
}

small=''
[ "$ALIGNGPT_DEVICE" = cpu ] && small=--small
step info ./node ts/src/cli.js info
for part in "${@:-all}"; do
  case $part in goldens | quickstart | step | all) ;; *)
    echo "[run] expected goldens, quickstart or step, got $part"
    exit 1
    ;;
  esac
  case $part in goldens | all) step goldens ./node scripts/goldens.js --cases ts/test/golden ;; esac
  case $part in quickstart | all) step quickstart ./node scripts/quickstart.js --fast --out "$out/quickstart" ;; esac
  # shellcheck disable=SC2086 # words of their own
  case $part in step | all) step step ./node scripts/cuda-step.js $small ${STEP:-} ;; esac
done
printf '\nresults: %s\n' "$out"
exit $status
