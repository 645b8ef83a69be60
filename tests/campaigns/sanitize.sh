#!/usr/bin/env bash
# The native module with AddressSanitizer and UndefinedBehaviorSanitizer, built apart from the one in
# use, under tests/kernels, tests/optim and lists of the ops' campaign. A report of either stops it.
# What needs another compiler or process (Triton, torch.compile, ranks) is left out.
#
#   bash tests/campaigns/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc fastkernels python tests setup.py pyproject.toml conftest.py "$copy"
cd "$copy"
rm -f fastkernels/_C*.so

flags="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=undefined"
flags+=" -fno-omit-frame-pointer -g"
cat > "$copy/c++" <<WRAPPER
#!/bin/sh
exec ${CXX:-g++} "\$@" -O1 $flags
WRAPPER
chmod +x "$copy/c++"
CXX="$copy/c++" FAST_REQUIRE_NATIVE=1 FAST_CUDA=0 python setup.py -q build_ext --inplace

libraries=()
for name in libasan libubsan libstdc++; do
  libraries+=("$(${CXX:-g++} -print-file-name=$name.so)")
done
export LD_PRELOAD="${libraries[*]}" PYTHONMALLOC=malloc OMP_NUM_THREADS=2
# Python and torch leak on exit, and instructions of sets below the best are compiled, not run.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$copy/python:$copy:$copy/tests" FASTKERNELS_BACKEND=native
python -c "import fastkernels, sys; sys.exit(not fastkernels.__file__.startswith('$copy'))"
for set in avx512 avx2 baseline; do
  echo "== campaign, $set"
  FASTKERNELS_CPU=$set python tests/campaigns/fuzz_ops.py "${FAST_CAMPAIGN_SEED:-0}" 0 60 > lists
  ! grep -v '"wrong": \[\]' lists | grep '"list"'
done
echo "== tests"
unset FASTKERNELS_BACKEND
python -m pytest -q -p no:cacheprovider tests/kernels tests/optim \
  --ignore=tests/kernels/test_triton.py --ignore=tests/kernels/test_triton_interpreted.py \
  --ignore=tests/kernels/test_cuda.py --ignore=tests/kernels/test_gpu.py \
  --ignore=tests/kernels/test_cuda_on_cpu.py --ignore=tests/kernels/test_instructions.py \
  --ignore=tests/optim/test_interplay_compile.py -k "not instruction_sets and not openmp" "$@"
echo "clean"
