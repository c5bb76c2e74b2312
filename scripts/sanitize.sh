#!/usr/bin/env bash
# Run every kernel on small shapes under NVIDIA's compute-sanitizer, on this machine's GPU.
#   scripts/sanitize.sh                  # memcheck (accesses out of bounds) and racecheck (races in shared memory)
#   scripts/sanitize.sh memcheck --few   # one tool, one shape of each kind
# All that the tools print is shown. Exits with 1 on any finding, warnings too, or when a kernel's result is wrong; with 2 where
# the tools are missing. PYTHON names another interpreter than that of .venv.
#
# What racecheck reports of two places in the warp-specialised GEMM is shown and not counted, since it reports the like in kernels
# without a race (tests/warp_specialized.py; a GPU test holds it to that): how warps are told their work, and a tile's number. Other
# races there count.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'sanitize.sh: %s\n' "$2" >&2
    exit "$1"
}

tools=()
few=()
for argument in "$@"; do
    case $argument in
        memcheck | racecheck) tools+=("$argument") ;;
        --few) few=(--few) ;;
        *) fail 2 "unknown argument $argument: memcheck, racecheck, --few" ;;
    esac
done
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck)

# The CUDA toolkit does not always put itself on PATH.
PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null ||
    fail 2 "found no compute-sanitizer; install the CUDA toolkit (Debian and Ubuntu: cuda-sanitizer-13-0) or put it on PATH"
if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh
    PYTHON=.venv/bin/python
fi

found=9  # what compute-sanitizer exits with
warp_specialized=_gemm_hopper_kernel
source=blockfp8_titan/kernels/gemm_hopper.py
# Numbers of the lines with those places; what a kernel does before its first statement stands at its name, and what is added where
# warps part at the condition around it.
misjudged=$(awk '/^    if WARPGROUPS == 2:$/ { inside = 1 }
    /^$/ { inside = 0 }
    inside || /^def _gemm_hopper_kernel|tile_buf\.load|tile_bufs\..*\.store/ { printf "%d ", NR }' $source)

# How many reports in a log are of those places alone.
count_misjudged() {
    awk -v kernel=$warp_specialized -v file=${source##*/} -v numbers="$misjudged" '
        function end_report() { count += inside && known; inside = 0 }
        BEGIN { split(numbers, lines, " "); for (i in lines) place[file ":" lines[i]] = 1 }
        /Race reported between/ { end_report(); inside = known = 1 }
        !/access at / { end_report() }
        inside {
            if (!match($0, "access at " kernel "[+]0x[0-9a-f]+ in [^ ]+")) { known = 0; next }
            split(substr($0, RSTART, RLENGTH), parts, " in ")
            if (!(parts[2] in place)) known = 0
        }
        END { end_report(); print count + 0 }' "$1"
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
findings=()
for tool in "${tools[@]}"; do
    case $tool in
        memcheck) clean='ERROR SUMMARY: 0 errors' ;;
        racecheck) clean='RACECHECK SUMMARY: ' ;;
    esac
    echo "sanitize.sh: $tool"
    status=0
    # Without PyTorch's cache every tensor is an allocation with bounds. The compiler's processes are none of this. API errors
    # that matter raise in Python; PyTorch provokes and handles others. Importing PyTorch takes a busy machine its time.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes application-only \
        --launch-timeout 120 --report-api-errors no --error-exitcode $found --print-limit 1000 \
        "$PYTHON" -m tests.sanitized "${few[@]+"${few[@]}"}" 2>&1 | tee "$log" || status=$?
    if [ "$tool" = racecheck ]; then
        races=$(grep -c 'Race reported between' "$log" || true)
        uncounted=$(count_misjudged "$log")
        clean+="$uncounted hazard"
        if [ "$uncounted" -gt 0 ]; then
            echo "sanitize.sh: $uncounted of $races reports are of $warp_specialized and do not count"
            [ $status -ne $found ] || status=0
        fi
    fi
    # Its own summary decides: the exit code tells neither warnings nor a tool that did not start.
    if [ $status -ne 0 ] || ! grep -qF "$clean" "$log" || ! grep -qx 'every kernel has run' "$log"; then
        findings+=("$tool")
    fi
done
[ ${#findings[@]} -eq 0 ] || fail 1 "not clean: ${findings[*]}"
echo "sanitize.sh: clean: ${tools[*]}"
