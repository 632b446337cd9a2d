#!/usr/bin/env bash
# pair-cpu.sh MODEL: a prefill and a decode server on two cores of this machine, and vllm-router in front of them.
# Run it in an environment that has vLLM for the CPU, vllm-router and kvroom: `make install-vllm` makes one.
# Ctrl-C, or TERM to this script, ends all of them. Logs, in the current folder: prefill.log, decode.log, router.log.
set -euo pipefail
set -m # each background command gets a process group of its own, so that `stop` can end all of its processes

model=${1:?usage: pair-cpu.sh MODEL}
prefill_port=${PREFILL_PORT:-8100} decode_port=${DECODE_PORT:-8200} router_port=${ROUTER_PORT:-8000}
bootstrap_port=${BOOTSTRAP_PORT:-8998}
# With these variables the router would send its requests to the proxy.
unset http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy ALL_PROXY

started=()
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

wait_for() { # wait_for URL NAME
    until curl --silent --fail --output /dev/null "$1"; do
        [ "$(jobs -r | wc -l)" = "${#started[@]}" ] || { echo "a process ended: see prefill.log, decode.log, router.log" >&2; exit 1; }
        sleep 1
    done
    echo "$2 answers"
}

transfer() { # transfer ROLE EXTRA
    echo '{"kv_connector": "KVRoomConnector", "kv_connector_module_path": "kvroom.adapters.vllm",' \
        "\"kv_role\": \"$1\", \"kv_load_failure_policy\": \"recompute\", \"kv_connector_extra_config\": {$2}}"
}

serve() { # serve CORE PORT LOG TRANSFER
    start "$3" env HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 "VLLM_CPU_OMP_THREADS_BIND=$1" taskset -c "$1" \
        vllm serve "$model" --served-model-name model --dtype float32 --max-model-len 2048 --enforce-eager \
        --max-num-seqs 8 --host 127.0.0.1 --port "$2" --kv-transfer-config "$4"
}

serve 0 "$prefill_port" prefill.log "$(transfer kv_producer "\"bootstrap_port\": $bootstrap_port")"
serve 1 "$decode_port" decode.log "$(transfer kv_consumer "")"
wait_for "http://127.0.0.1:$prefill_port/health" "prefill server http://127.0.0.1:$prefill_port"
wait_for "http://127.0.0.1:$decode_port/health" "decode server http://127.0.0.1:$decode_port"

start router.log vllm-router --vllm-pd-disaggregation --prefill "http://127.0.0.1:$prefill_port" \
    --decode "http://127.0.0.1:$decode_port" --host 127.0.0.1 --port "$router_port" --policy round_robin \
    --worker-startup-check-interval 1
wait_for "http://127.0.0.1:$router_port/readiness" "router http://127.0.0.1:$router_port"
grep --no-filename --only-matching 'kvroom rooms http://.*' prefill.log decode.log || true

wait -n || true
echo "a process ended: see prefill.log, decode.log, router.log" >&2
exit 1
