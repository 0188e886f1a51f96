#!/usr/bin/env bash
# Prefill and decode apart, on one host: a daemon, two vLLM engines and a proxy.
#
#   deploy/pd/one-host.sh MODEL [what both engines are given besides]
#
# Requests go to http://127.0.0.1:8000/v1/... ; Ctrl-C ends all of it. With GPUs, give the
# engines one each: PREFILL_ENV="CUDA_VISIBLE_DEVICES=0" DECODE_ENV="CUDA_VISIBLE_DEVICES=1".
set -euo pipefail

model=${1:?usage: one-host.sh MODEL [options of vllm]}
shift
folder=$(mktemp -d)
socket=$folder/kvstore.sock
python=${PYTHON:-python}
capacity=${HOST_CAPACITY:-4GiB}
chunk=${CHUNK_TOKENS:-128}
port=${PORT:-8000}
prefill=$((port + 100)) decode=$((port + 200))

trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

engine() {  # role, port, environment
    local config
    config=$(printf '{"kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm", "kv_role": "%s",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"socket": "%s", "chunk_tokens": %d}}' "$1" "$socket" "$chunk")
    shift
    local at=$1 environment=$2
    shift 2
    # shellcheck disable=SC2086  # several variables, several words
    env $environment "$python" -m vllm.entrypoints.openai.api_server --model "$model" \
        --host 127.0.0.1 --port "$at" --kv-transfer-config "$config" "$@" &
}

answers() {  # address
    "$python" - "$1" <<'PYTHON'
import sys, urllib.request
try:
    urllib.request.urlopen(f"{sys.argv[1]}/health", timeout=2)
except OSError:
    sys.exit(1)
PYTHON
}

"$python" -m kvstore serve --set server.socket="$socket" --set tiers.host.capacity="$capacity" &
engine kv_producer "$prefill" "${PREFILL_ENV:-KV_ROLE=prefill}" "$@"
engine kv_consumer "$decode" "${DECODE_ENV:-KV_ROLE=decode}" "$@"
for at in "$prefill" "$decode"; do
    until answers "http://127.0.0.1:$at"; do
        [ "$(jobs -pr | wc -l)" = 3 ] || { echo "one of them has ended; see above" >&2; exit 1; }
        sleep 1
    done
done
"$python" -m kvstore.connectors.pd_proxy --listen "127.0.0.1:$port" \
    --prefill "http://127.0.0.1:$prefill" --decode "http://127.0.0.1:$decode" &
until answers "http://127.0.0.1:$port"; do sleep 0.2; done
echo "ready: http://127.0.0.1:$port"
wait -n
