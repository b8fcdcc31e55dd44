#!/usr/bin/env bash
# Tests and figures of one GPU, in at most 8 minutes, without a network.
#
#   bash tests/benchmarks/device.sh              on a GPU
#   bash tests/benchmarks/device.sh --rehearse   on the CPU, tiny: does the script itself work?
#
# It needs Python 3.12 with jax, flax, optax, orbax-checkpoint, transformers, jaxtyping, safetensors,
# tqdm, pillow, matplotlib, hypothesis, equinox, pytest and pytest-xdist. Without beartype the tests
# run with types unchecked. jaxrel itself need not be installed: it is read from this checkout.
#
#   PYTHON           the interpreter; by default the first that has jax: python3, .venv/bin/python
#   OUT              where the results go; out/device by default
#   SUITE_SECONDS    most time for the tests (170)
#   SECONDS_IN_ALL   most time for everything (460)
#
# In $OUT: suites.xml and suites.log of the tests, device.json, device.md and device.log of the
# figures. It fails if a test failed, if the tests did not end in time, or if a figure failed; the
# figures are measured all the same. To put them on tests/benchmarks/README.md:
#
#   python -m tests.benchmarks.device --record FOLDER
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
began=$(date +%s)
say() { printf '%4d s  %s\n' $(($(date +%s) - began)) "$*"; }

rehearse=
case "${1-}" in
  "") ;;
  --rehearse) rehearse=--rehearse ;;
  *) echo "usage: device.sh [--rehearse]; got $*" >&2; exit 2 ;;
esac

python=
for candidate in ${PYTHON:-python3 .venv/bin/python}; do
  if "$candidate" -c 'import jax' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || { echo "no interpreter with jax: ${PYTHON:-python3, .venv/bin/python}" >&2; exit 2; }

out=${OUT:-out/device}
mkdir -p "$out" && rm -f "$out"/suites.* "$out"/device.* || exit
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Where jaxrel is not installed, a folder of links stands for what an installation would make.
if ! "$python" -c 'import jaxrel.models, jaxrel.train' 2>/dev/null; then
  mkdir -p "$scratch/site/jaxrel"
  ln -s "$PWD"/jaxrel/* "$PWD/models" "$PWD/train" "$scratch/site/jaxrel/"
  export PYTHONPATH="$scratch/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
  # The checkout's own jaxrel/ has no models and must not come first.
  export PYTHONSAFEPATH=1
fi
export TQDM_DISABLE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# Many processes share the device in the tests, and one has it in the measurements.
suites=(tests/{tracing,attention} tests/propagation/test_[!z]*.py tests/test_gradients.py
  tests/models/test_{clip,clip_relevance}.py tests/explanations/test_explain.py)
if [ -n "$rehearse" ]; then
  export JAX_PLATFORMS=cpu
  suites=(tests/tracing) workers=2 choice=(-k "tag or sharded")
else
  export JAX_PLATFORMS=cuda,cpu
  workers=14 choice=()
fi
# Thousands of small programs: each is compiled once, and no time goes into trying algorithms out.
settings=(
  XLA_FLAGS="--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
  XLA_PYTHON_CLIENT_PREALLOCATE=false
  JAX_COMPILATION_CACHE_DIR="$scratch/cache"
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES=none
)

# float32 products are TF32 on a GPU unless asked otherwise, and the tests' tolerances are not.
# Warnings are not errors here: another JAX and another device warn of other things.
# What else pytest would load on a strange machine stays out.
say "tests: ${suites[*]}, $workers workers"
env "${settings[@]}" JAX_DEFAULT_MATMUL_PRECISION=highest PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
  timeout --signal=INT --kill-after=20 "${SUITE_SECONDS:-170}" \
  "$python" -m pytest -p xdist.plugin -n "$workers" --dist worksteal --import-mode=append \
  -p no:cacheprovider -o filterwarnings=default --tb=short --durations=15 \
  --junitxml="$out/suites.xml" ${choice[@]+"${choice[@]}"} "${suites[@]}" >"$out/suites.log" 2>&1
status=$?
case $status in
  0) outcome="passed" ;;
  124 | 137) outcome="did not end in time" ;;
  *) outcome="failed (pytest's status is $status)" ;;
esac
say "tests: $outcome: $(grep -E '^=* ?[0-9]+ (passed|failed|skipped|error)|passed|no tests' "$out/suites.log" | tail -n 1)"
[ "$status" = 0 ] || grep -E '^(FAILED|ERROR)' "$out/suites.log" | cut -c 1-160 | head -n 25

left=$((${SECONDS_IN_ALL:-460} - ($(date +%s) - began)))
say "figures: $left s are left"
# Triton's matrix products take minutes to tune; the vendor's library stands for them.
env XLA_FLAGS="--xla_gpu_enable_triton_gemm=false" XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \
  timeout --kill-after=10 $((left + 10)) \
  "$python" -m tests.benchmarks.device --out "$out" --seconds $((left - 20)) $rehearse \
  2>"$out/device.log" | while read -r line; do say "  $line"; done
figures=${PIPESTATUS[0]}
[ "$figures" = 0 ] || { say "figures: failed (status $figures)"; tail -n 15 "$out/device.log"; }

say "results are in $out"
[ "$status" = 0 ] && [ "$figures" = 0 ]
