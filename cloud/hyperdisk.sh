#!/usr/bin/env bash
# Puts a Hyperdisk on a TPU VM: creates it, attaches it, formats it if it is blank, and mounts it.
#
#     export ZONE=us-east5-b TPU_VM_NAME=distil DISK_NAME=my-hyperdisk DISK_SIZE=500GB BASE_NAME=distillation
#     cloud/hyperdisk.sh [--dry-run] [--instance]
#
# What is done already is left alone, so it can be run again, as after a restart of the VM. A disk that
# another machine uses is refused. `--dry-run` asks Google Cloud what is there, prints the rest, and changes
# nothing. `--instance` says that TPU_VM_NAME is a Compute Engine instance, such as a GPU host.
#
# Unless set, DISK_TYPE is hyperdisk-balanced (TPUs older than v6e take pd-balanced), and MOUNT_POINT is
# /mnt/hyperdisk.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/cloud/common.sh"

instance=""
for word in "$@"; do
    case $word in
        --dry-run) dry_run=yes ;;
        --instance) instance=yes ;;
        -h | --help)
            usage
            exit
            ;;
        *) fail "unknown word $word; see \`$0 --help\`" ;;
    esac
done
need ZONE TPU_VM_NAME DISK_NAME DISK_SIZE BASE_NAME
[[ $DISK_SIZE =~ ^[1-9][0-9]*GB$ ]] ||
    fail "DISK_SIZE is $DISK_SIZE, but must be a number of GB, such as 500GB"

# "SIZE_GB<tab>MACHINES", or nothing if there is no such disk.
look_up() {
    gcloud compute disks list --zones="$ZONE" --filter="name = $DISK_NAME" \
        --format='value(sizeGb,users.list())'
}

disk=$(look_up)
if [[ ! $disk ]]; then
    run gcloud compute disks create "$DISK_NAME" --size="$DISK_SIZE" --zone="$ZONE" \
        --type="${DISK_TYPE:-hyperdisk-balanced}"
    disk=${DISK_SIZE%GB}
    [[ $dry_run ]] || disk=$(look_up)
fi
read -r size_gb users <<<"$disk"

# The machine behind a TPU VM has a name of its own, so the VM is asked for its disks. It also has to be
# attached by its own command: `gcloud compute instances` does not see the machines of TPU VMs.
if [[ $instance ]]; then
    command=(gcloud compute)
    attach=(gcloud compute instances attach-disk)
    attached=$users
    ours=/zones/$ZONE/instances/$TPU_VM_NAME
else
    command=(gcloud compute tpus tpu-vm)
    attach=(gcloud alpha compute tpus tpu-vm attach-disk)
    node=$(gcloud compute tpus tpu-vm describe "$TPU_VM_NAME" --zone="$ZONE" \
        --format='value(networkEndpoints.len(),dataDisks[].sourceDisk.list())') ||
        fail "cannot look up the TPU VM $TPU_VM_NAME in $ZONE; create it, or pass --instance if it is none"
    read -r workers attached <<<"$node"
    ((workers == 1)) ||
        fail "$TPU_VM_NAME has $workers workers, but a disk is written by one machine; use a shared folder"
    ours=/zones/$ZONE/disks/$DISK_NAME
fi
if [[ ,$attached, != *"$ours",* ]]; then
    [[ ! $users ]] ||
        fail "the disk $DISK_NAME is in use by $users; detach it there, or give another DISK_NAME"
    run "${attach[@]}" "$TPU_VM_NAME" --disk="$DISK_NAME" --zone="$ZONE"
fi

words=$(printf ' %q' "$size_gb" "${MOUNT_POINT:-/mnt/hyperdisk}" "$BASE_NAME")
run "${command[@]}" scp "$repo/cloud/hyperdisk_mount.sh" "$TPU_VM_NAME:hyperdisk_mount.sh" --zone="$ZONE"
run "${command[@]}" ssh "$TPU_VM_NAME" --zone="$ZONE" --command="bash hyperdisk_mount.sh$words"
