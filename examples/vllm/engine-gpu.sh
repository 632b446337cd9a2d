#!/usr/bin/env bash
# engine-gpu.sh prefill|decode MODEL [vllm serve's options...]: one side of a pair on GPUs, over RDMA.
# The engine of the transport knows no secret: any process that reaches its ports or the RDMA fabric can read and write
# the KV pool, so the script says that this network is trusted (trusted_fabric). Let no stranger reach it.
# Run it on each machine, with vLLM and kvroom[nixl] (or kvroom[mooncake]) installed, and with the same settings:
#   HOST            the address of this machine by which the others reach it (needed)
#   SECRET_FILE     a file with the secret that all engines share, readable by its owner only (needed)
#   TRANSPORT       nixl (the default) or mooncake; what it can be told, as JSON, is TRANSPORT_OPTIONS
#   PORT            of the HTTP API, 8000 by default
#   BOOTSTRAP_PORT  of the directory that prefill serves, 8998 by default
#   ROOMS_PORT      of the window for `kvroom rooms` and /metrics, 9100 by default
#   BOOTSTRAP_ALLOW for decode: the prefill machines that requests may name, like 10.0.0.1,10.0.0.5 or 10.0.0.0/24 (needed)
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
