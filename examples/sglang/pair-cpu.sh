#!/usr/bin/env bash
# pair-cpu.sh MODEL: a prefill and a decode server of SGLang on this machine, without a GPU, and smg in front of them.
# Run it in an environment that has SGLang's CPU engine, smg and kvroom: `make install-sglang` makes one.
# Ctrl-C, or TERM to this script, ends all of them. Logs, in the current folder: prefill.log, decode.log, router.log.
set -euo pipefail
set -m # each background command gets a process group of its own, so that `stop` can end all of its processes

model=${1:?usage: pair-cpu.sh MODEL}
prefill_port=${PREFILL_PORT:-8100} decode_port=${DECODE_PORT:-8200} router_port=${ROUTER_PORT:-8000}
bootstrap_port=${BOOTSTRAP_PORT:-8998} metrics_port=${METRICS_PORT:-29000}
started=()
# With these variables the router would send its requests to the proxy.
unset http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy ALL_PROXY

stop() {
    trap '' INT TERM
    trap - EXIT
    for pid in "${started[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do
        for _ in {1..100}; do kill -0 "$pid" 2>/dev/null && sleep 0.1 || break; done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # start LOG COMMAND...
    local log=$1
    shift
    "$@" >"$log" 2>&1 &
    started+=($!)
}

serve() { # serve ROLE PORT OPTIONS...
    local role=$1 port=$2
    shift 2
    # The last variable is for prefill: without it SGLang would wait for a CUDA event.
    start "$role.log" env HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 SGLANG_USE_CPU_ENGINE=1 \
        SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX=0 \
        python -m sglang.launch_server --model-path "$model" --served-model-name model --dtype float32 \
        --device cpu --attention-backend torch_native --disable-cuda-graph --skip-server-warmup --sleep-on-idle \
        --max-total-tokens 8192 --max-running-requests 8 --host 127.0.0.1 --port "$port" \
        --disaggregation-mode "$role" --disaggregation-transfer-backend kvroom "$@"
}

wait_for() { # wait_for URL LOG
    until curl --silent --fail --output /dev/null "$1"; do
        [ "$(jobs -r | wc -l)" = "${#started[@]}" ] || { echo "a process ended: see prefill.log, decode.log, router.log" >&2; exit 1; }
        sleep 1
    done
    echo "$2 answers"
}

serve prefill "$prefill_port" --disaggregation-bootstrap-port "$bootstrap_port"
# The default would keep retracted requests in memory that CUDA pins.
serve decode "$decode_port" --disaggregation-decode-retraction-backup cpu_tensor
wait_for "http://127.0.0.1:$prefill_port/health" "prefill server http://127.0.0.1:$prefill_port"
wait_for "http://127.0.0.1:$decode_port/health" "decode server http://127.0.0.1:$decode_port"

start router.log python -m smg.launch_router --pd-disaggregation --policy round_robin \
    --prefill "http://127.0.0.1:$prefill_port" "$bootstrap_port" --decode "http://127.0.0.1:$decode_port" \
    --host 127.0.0.1 --port "$router_port" --prometheus-host 127.0.0.1 --prometheus-port "$metrics_port" \
    --disable-tokenizer-autoload --worker-startup-check-interval 1
wait_for "http://127.0.0.1:$router_port/readiness" "router http://127.0.0.1:$router_port"
grep --no-filename --only-matching 'kvroom rooms http://.*' prefill.log decode.log || true

wait -n || true
echo "a process ended: see prefill.log, decode.log, router.log" >&2
exit 1
