#!/usr/bin/env bash
# Runs on each worker of a TPU slice, started by tpu_vm.sh: `distillax train` with the words given, and with
# the keys by which the workers find each other. Outside GKE the environment does not name them; the metadata
# server does.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

metadata() {
    curl --fail --silent --show-error --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Separated by commas, in the order of their numbers; each is an address, or name:id:address.
endpoints=$(metadata worker-network-endpoints)
IFS=, read -ra workers <<<"$endpoints"
together=()
if ((${#workers[@]} > 1)); then
    index=$(metadata agent-worker-number)
    together=(coordinator_address="${workers[0]##*:}:8476" process_count="${#workers[@]}"
        process_index="$index")
fi
exec .venv/bin/distillax train "$@" "${together[@]}"
