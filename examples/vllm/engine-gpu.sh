#!/usr/bin/env bash
# engine-gpu.sh prefill|decode MODEL [vllm serve's options...]: one side of a pair on GPUs, over RDMA.
# The engine of the transport does not check the secret: any process that reaches its ports or the RDMA fabric can read
# and write the KV pool. The script declares this network trusted (trusted_fabric): keep other processes out.
# Not tried: this project's tests of vLLM run on CPUs. Run it on each machine, with vLLM and kvroom[nixl] (or
# kvroom[mooncake]) in one environment, and with these variables:
#   HOST            address of this machine by which the others reach it (required)
#   SECRET_FILE     file with the secret that all engines share, readable only by its owner (required)
#   TRANSPORT       nixl (default) or mooncake; its options are a JSON object in TRANSPORT_OPTIONS
#   PORT            port of the HTTP API (default: 8000)
#   BOOTSTRAP_PORT  port of the directory that the prefill side serves (default: 8998)
#   BOOTSTRAP_ALLOW prefill machines that requests may name, like 10.0.0.1,10.0.0.5 or 10.0.0.0/24 (decode: required)
#   ROOMS_PORT      port of the status server of the first rank, on loopback; each further rank takes the next port
#                   (default: 9100)
set -euo pipefail

side=${1:?usage: engine-gpu.sh prefill|decode MODEL [options]}
model=${2:?usage: engine-gpu.sh prefill|decode MODEL [options]}
shift 2
case $side in
prefill) role=kv_producer ;;
decode) role=kv_consumer ;;
*) echo "engine-gpu.sh: $side is neither prefill nor decode" >&2; exit 2 ;;
esac

if [ "$side" = decode ]; then
    : "${BOOTSTRAP_ALLOW:?set BOOTSTRAP_ALLOW to the prefill machines that requests may name, like 10.0.0.0/24}"
fi

extra=$(printf '{"host": "%s", "bootstrap_allow": "%s", "secret_file": "%s", "transport": "%s", "transport_options": %s, "trusted_fabric": true, "bootstrap_port": %d, "rooms_port": %d}' \
    "${HOST:?set HOST to the address by which the others reach this machine}" "${BOOTSTRAP_ALLOW:-$HOST}" \
    "${SECRET_FILE:?set SECRET_FILE to the file with the secret that all engines share}" \
    "${TRANSPORT:-nixl}" "${TRANSPORT_OPTIONS:-"{}"}" "${BOOTSTRAP_PORT:-8998}" "${ROOMS_PORT:-9100}")

exec vllm serve "$model" --served-model-name model --host "$HOST" --port "${PORT:-8000}" "$@" \
    --kv-transfer-config "{\"kv_connector\": \"KVRoomConnector\", \"kv_connector_module_path\": \"kvroom.adapters.vllm\",
    \"kv_role\": \"$role\", \"kv_load_failure_policy\": \"recompute\", \"kv_connector_extra_config\": $extra}"
