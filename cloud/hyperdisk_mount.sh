#!/usr/bin/env bash
# Runs on the machine that has the disk, started by hyperdisk.sh: hyperdisk_mount.sh SIZE_GB MOUNT_POINT
# BASE_NAME. Finds the disk by its size, formats it only if nothing at all is on it, and mounts it.
set -euo pipefail

size=$(($1 << 30)) point=$2 base=$2/$3

fail() {
    printf 'hyperdisk: error: %s\n' "$1" >&2
    exit 2
}

# The disks of that size with nothing on top of them: no partition, no volume, no mount.
unused() {
    local device
    for device in $(lsblk --bytes --nodeps --noheadings --paths --output NAME,TYPE,SIZE |
        awk -v size="$size" '$2 == "disk" && $3 == size { print $1 }'); do
        # One line with one word: the disk itself, mounted nowhere.
        lsblk --noheadings --paths --raw --output NAME,MOUNTPOINT "$device" |
            awk -v device="$device" 'END { if (NR == 1 && NF == 1) print device }'
    done
}

# Nothing that blkid knows, and, as it does not know everything, zeros at the start.
is_blank() {
    local code=0
    sudo blkid --probe "$1" >/dev/null || code=$?
    ((code == 2)) && sudo cmp --silent --bytes=16M "$1" /dev/zero
}

mounted=$(findmnt --noheadings --output SOURCE --mountpoint "$point" || true)
if [[ $mounted ]]; then
    [[ $(lsblk --bytes --nodeps --noheadings --output SIZE "$mounted" | tr -d ' ') == "$size" ]] ||
        fail "$mounted at $point is not the disk of $1 GB; unmount it, or give another MOUNT_POINT"
else
    mapfile -t devices < <(unused)
    ((${#devices[@]} == 1)) ||
        fail "of the unused disks, ${#devices[@]} have $1 GB, not one; look with lsblk, and mount it by hand"
    device=${devices[0]}
    type=$(sudo blkid --probe --match-tag TYPE --output value "$device" || true)
    if [[ ! $type ]]; then
        is_blank "$device" ||
            fail "$device has no file system, but is not blank; if it can be lost, run sudo mkfs.ext4 $device"
        sudo mkfs.ext4 -q "$device"
    fi
    sudo mkdir -p "$point"
    sudo mount "$device" "$point"
fi
# The root of a new file system belongs to root.
[[ -d $base ]] || sudo install --directory --owner="$(id -u)" --group="$(id -g)" "$base"
echo "export BASE_DIRECTORY=$base"
