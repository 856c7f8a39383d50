#!/usr/bin/env bash
# Trains on a Cloud TPU VM, or on a slice of several:
#
#     export ZONE=us-east5-b TPU_VM_NAME=distil ACCELERATOR_TYPE=v6e-8
#     cloud/tpu_vm.sh create [--queued] [--spot]      # --queued waits until there is capacity
#     cloud/tpu_vm.sh install                         # this checkout, on every worker
#     cloud/tpu_vm.sh train recipes/sft.yml key=value ...
#     cloud/tpu_vm.sh stop                            # it saves a checkpoint, and ends
#     cloud/tpu_vm.sh ssh 'df -h'                     # any command, on every worker
#     cloud/tpu_vm.sh delete
#
# `--dry-run` before the command prints what would be run, and changes nothing. Ctrl-C ends the connection alone:
# the workers train on until `stop`. `train` again goes on where it stopped; on several workers
# base_output_directory must be a folder that all of them see. RUNTIME_VERSION is that of the kind of TPU unless
# set. If HF_TOKEN is set, `install` puts it into a file on the workers.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/cloud/common.sh"

on_all() { run gcloud compute tpus tpu-vm ssh "$TPU_VM_NAME" --zone="$ZONE" --worker=all --command="$1"; }

copy_to_all() { run gcloud compute tpus tpu-vm scp "$1" "$TPU_VM_NAME:$2" --zone="$ZONE" --worker=all; }

create() {
    need ACCELERATOR_TYPE
    local queued="" spot="" word version type=${ACCELERATOR_TYPE/#v5e-/v5litepod-}
    version=${RUNTIME_VERSION:-$(version_for "$type")}
    for word in "$@"; do
        case $word in
            --queued) queued=yes ;;
            --spot) spot=yes ;;
            *) fail "create does not know $word; it takes --queued and --spot" ;;
        esac
    done
    local common=(--zone="$ZONE" --accelerator-type="$type")
    [[ ! $spot ]] || common+=(--spot)
    if [[ $queued ]]; then
        run gcloud compute tpus queued-resources create "$TPU_VM_NAME" --node-id="$TPU_VM_NAME" \
            --runtime-version="$version" "${common[@]}"
        [[ $dry_run ]] || wait_until_active
    else
        run gcloud compute tpus tpu-vm create "$TPU_VM_NAME" --version="$version" "${common[@]}"
    fi
}

version_for() {
    case $1 in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) fail "ACCELERATOR_TYPE=$1 is of no kind that is known here; set RUNTIME_VERSION as well" ;;
    esac
}

wait_until_active() {
    local state
    while true; do
        state=$(gcloud compute tpus queued-resources describe "$TPU_VM_NAME" --zone="$ZONE" \
            --format='value(state.state)')
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED)
                fail "the request $TPU_VM_NAME is $state; \`$0 delete\` removes it, then create it anew" ;;
        esac
        echo "$TPU_VM_NAME: $state"
        sleep 30
    done
}

install() {
    local folder
    folder=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$folder'" EXIT
    tar -C "$repo" --exclude=__pycache__ --exclude='*.egg-info' -czf "$folder/distillax.tar.gz" \
        pyproject.toml README.md LICENSE requirements src recipes cloud
    copy_to_all "$folder/distillax.tar.gz" distillax.tar.gz
    local unpack="mkdir -p distillax .cache/huggingface && tar -xzf distillax.tar.gz -C distillax"
    on_all "$unpack && bash distillax/cloud/install.sh tpu"
    if [[ ${HF_TOKEN:-} ]]; then # as a file, because command lines are logged
        (umask 077 && printf '%s' "$HF_TOKEN" >"$folder/token")
        copy_to_all "$folder/token" .cache/huggingface/token
    fi
}

train() {
    [[ ${1:-} == recipes/* && -f $repo/$1 ]] ||
        fail "train needs a recipe first, in the folder recipes/, not '${1:-}'"
    local words
    words=$(printf ' %q' "$@")
    on_all "bash distillax/cloud/tpu_worker.sh$words"
}

# SIGTERM to the training, and not to the shell that sends it, whose words have its name in brackets.
stop() { on_all "pkill -TERM -f '[d]istillax train' || echo no training here"; }

# A TPU VM that a request made goes with its request.
delete() {
    local request
    request=$(gcloud compute tpus queued-resources list --zone="$ZONE" --format='value(name)' \
        --filter="name ~ /queuedResources/$TPU_VM_NAME\$")
    if [[ $request ]]; then
        run gcloud compute tpus queued-resources delete "$TPU_VM_NAME" --zone="$ZONE" --force
    else
        run gcloud compute tpus tpu-vm delete "$TPU_VM_NAME" --zone="$ZONE"
    fi
}

if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
command=${1:-}
shift || true
case $command in
    -h | --help) usage ;;
    create | install | train | stop | delete)
        need ZONE TPU_VM_NAME
        "$command" "$@"
        ;;
    ssh)
        need ZONE TPU_VM_NAME
        [[ ${1:-} ]] || fail "ssh needs a command, as in $0 ssh 'df -h'"
        on_all "$1"
        ;;
    *) fail "no command '$command'; there are create, install, train, stop, ssh and delete, see \`$0 --help\`" ;;
esac
