#!/usr/bin/env bash
# engine-gpu.sh prefill|decode MODEL [SGLang's options...]: one side of a pair on GPUs, over RDMA.
# The engine of the transport does not check the secret: any process that reaches its ports or the RDMA fabric can read
# and write the KV pool. The script declares this network trusted (KVROOM_TRUSTED_FABRIC): keep other processes out.
# Not tried: this project's tests of SGLang run on CPUs. Run it on each machine, with SGLang and kvroom[nixl] (or
# kvroom[mooncake]) in one environment, and with these variables:
#   HOST            address of this machine by which the others reach it (required)
#   SECRET_FILE     file with the secret that all servers share, readable only by its owner (required)
#   TRANSPORT       nixl (default) or mooncake; its options are a JSON object in TRANSPORT_OPTIONS
#   PORT            port of the HTTP API (default: 30000)
#   BOOTSTRAP_PORT  port of the directory that the prefill server runs (default: 8998)
#   BOOTSTRAP_ALLOW prefill machines that requests may name, like 10.0.0.1,10.0.0.5 or 10.0.0.0/24 (decode: required)
#   ROOMS_PORT      port of the status server for `kvroom rooms` and /metrics (default: 9100); it listens on loopback
#                   unless KVROOM_ROOMS_HOST and KVROOM_ADMIN_TOKEN_FILE are set
set -euo pipefail

side=${1:?usage: engine-gpu.sh prefill|decode MODEL [options]}
model=${2:?usage: engine-gpu.sh prefill|decode MODEL [options]}
shift 2
case $side in
prefill) role=(--disaggregation-mode prefill --disaggregation-bootstrap-port "${BOOTSTRAP_PORT:-8998}") ;;
decode) role=(--disaggregation-mode decode) ;;
*)
    echo "engine-gpu.sh: $side is neither prefill nor decode" >&2
    exit 2
    ;;
esac

: "${HOST:?set HOST to the address by which the others reach this machine}"
export KVROOM_SECRET_FILE=${SECRET_FILE:?set SECRET_FILE to the file with the secret that all servers share}
export KVROOM_TRANSPORT=${TRANSPORT:-nixl} KVROOM_TRUSTED_FABRIC=1 KVROOM_ROOMS_PORT=${ROOMS_PORT:-9100}
if [ "$side" = decode ]; then
    export KVROOM_BOOTSTRAP_ALLOW=${BOOTSTRAP_ALLOW:?set BOOTSTRAP_ALLOW to the prefill machines that requests may name}
fi
if [ -n "${TRANSPORT_OPTIONS:-}" ]; then export KVROOM_TRANSPORT_OPTIONS=$TRANSPORT_OPTIONS; fi

exec python -m sglang.launch_server --model-path "$model" --served-model-name model \
    --host "$HOST" --port "${PORT:-30000}" --disaggregation-transfer-backend kvroom "${role[@]}" "$@"
