"""Stands in for `gcloud`, and for what it reaches: disks, TPU VMs, and the tools on those machines.

`python fake_cloud.py NAME WORD ...` is the program NAME. What there is, and what it changes, is in the JSON
file $FAKE_CLOUD. `ssh` runs its command for real, in a folder for each worker. Flags that the real gcloud
does not know are refused.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

GB = 2**30
PLACE = {"--zone"}
KNOWN = {
    "compute disks list": {"--zones", "--filter", "--format"},
    "compute disks create": {"--size", "--type", "--zone"},
    "compute instances attach-disk": {"--disk", *PLACE},
    "compute ssh": {"--command", *PLACE},
    "compute scp": PLACE,
    "alpha compute tpus tpu-vm attach-disk": {"--disk", "--mode", *PLACE},
    "compute tpus tpu-vm create": {"--version", "--accelerator-type", "--spot", *PLACE},
    "compute tpus tpu-vm describe": {"--format", *PLACE},
    "compute tpus tpu-vm delete": PLACE,
    "compute tpus tpu-vm ssh": {"--worker", "--command", *PLACE},
    "compute tpus tpu-vm scp": {"--worker", *PLACE},
    "compute tpus queued-resources create": {
        "--node-id", "--runtime-version", "--accelerator-type", "--spot", *PLACE
    },
    "compute tpus queued-resources describe": {"--format", *PLACE},
    "compute tpus queued-resources list": {"--filter", "--format", *PLACE},
    "compute tpus queued-resources delete": {"--force", *PLACE},
}  # fmt: skip


def disk_url(name: str) -> str:
    return f"projects/p/zones/z/disks/{name}"


def instance_url(name: str) -> str:
    return f"https://compute/projects/p/zones/z/instances/{name}"


def gcloud(state: dict, words: list[str]) -> int:
    command = max((known for known in KNOWN if " ".join(words).startswith(f"{known} ")), key=len)
    rest = words[len(command.split()) :]
    flags = {word.partition("=")[0]: word.partition("=")[2] for word in rest if word.startswith("--")}
    names = [word for word in rest if not word.startswith("--")]
    assert set(flags) <= KNOWN[command], f"{command}: {set(flags) - KNOWN[command]}"
    assert flags.get("--zone", "z") == flags.get("--zones", "z") == "z", flags
    disks, tpus, requests = state["disks"], state["tpus"], state["requests"]
    match command.removeprefix("alpha ").removeprefix("compute ").removeprefix("tpus ").split():
        case ["disks", "list"]:
            assert flags["--format"] == "value(sizeGb,users.list())"
            disk = disks.get(flags["--filter"].removeprefix("name = "))
            print(f"{disk['size']}\t{','.join(disk['users'])}\n" if disk else "", end="")
        case ["disks", "create"]:
            disks[names[0]] = {
                "size": int(flags["--size"].removesuffix("GB")),
                "users": [],
                "content": "blank",
            }
        case [kind, "attach-disk"]:
            disk = disks[flags["--disk"]]
            assert not disk["users"], "RESOURCE_IN_USE_BY_ANOTHER_RESOURCE"
            # What runs a TPU VM belongs to Google, and has a name that says nothing.
            disk["users"] = [instance_url(names[0] if kind == "instances" else "t1v-n-0123-w-0")]
            if kind == "tpu-vm":
                tpus[names[0]]["disks"].append(flags["--disk"])
        case ["tpu-vm", "describe"]:
            assert flags["--format"] == "value(networkEndpoints.len(),dataDisks[].sourceDisk.list())"
            if names[0] not in tpus:
                print("NOT_FOUND", file=sys.stderr)
                return 1
            tpu = tpus[names[0]]
            print(f"{tpu['workers']}\t{','.join(map(disk_url, tpu['disks']))}")
        case ["tpu-vm", "create"]:
            tpus[names[0]] = {"workers": 1, "disks": []}
        case ["queued-resources", "create"]:
            requests[names[0]] = ["WAITING_FOR_RESOURCES", "PROVISIONING", state.get("outcome", "ACTIVE")]
            tpus[flags["--node-id"]] = {"workers": 1, "disks": []}
        case ["queued-resources", "describe"]:
            print(requests[names[0]].pop(0))
        case ["queued-resources", "list"]:
            found = [name for name in requests if f"/queuedResources/{name}$" in flags["--filter"]]
            print("\n".join(f"projects/p/locations/z/queuedResources/{name}" for name in found))
        case ["queued-resources", "delete"]:
            del requests[names[0]], tpus[names[0]]
        case ["tpu-vm", "delete"]:
            del tpus[names[0]]
        case [*_, "scp"]:
            source, target = names
            machine, _, path = target.partition(":")
            for home in homes(state, machine, flags):
                shutil.copy(source, home / path)
        case [*_, "ssh"]:
            save(state)  # what the command calls has a state too
            codes = []
            for number, home in enumerate(homes(state, names[0], flags)):
                env = {**os.environ, "HOME": str(home), "FAKE_WORKER": str(number)}
                env["FAKE_WORKERS"] = str(state["tpus"].get(names[0], {}).get("workers", 1))
                codes.append(subprocess.run(["bash", "-c", flags["--command"]], cwd=home, env=env).returncode)
            state.clear()
            state.update(json.loads(Path(os.environ["FAKE_CLOUD"]).read_text()))
            return max(codes)
    return 0


def homes(state: dict, machine: str, flags: dict[str, str]) -> list[Path]:
    workers = state["tpus"].get(machine, {"workers": 1})["workers"] if flags.get("--worker") == "all" else 1
    folders = [Path(os.environ["FAKE_CLOUD"]).parent / machine / str(number) for number in range(workers)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def devices(state: dict) -> dict[str, dict]:
    """The boot disk, the disks that are attached to any machine, and what a test has put beside them."""
    boot = {"/dev/sda": {"size": 100, "content": "partitions", "partitions": 1}}
    attached = [disk for disk in state["disks"].values() if disk["users"]]
    found = {f"/dev/nvme0n{2 + number}": disk for number, disk in enumerate(attached)}
    return boot | found | state.get("devices", {})


def lsblk(state: dict, words: list[str]) -> int:
    columns = words[words.index("--output") + 1]
    named = [word for word in words if word.startswith("/dev/")]
    for path, device in devices(state).items():
        if named and path not in named:
            continue
        match columns:
            case "NAME,TYPE,SIZE":
                print(f"{path} disk {device['size'] * GB}")
            case "SIZE":
                print(f" {device['size'] * GB}")
            case "NAME,MOUNTPOINT":  # the raw format ends a line with a space where there is no mount
                print(f"{path} {device.get('mounted', '')}")
                for number in range(device.get("partitions", 0)):
                    print(f"{path}p{number + 1} ")
    return 0


def findmnt(state: dict, words: list[str]) -> int:
    point = words[words.index("--mountpoint") + 1]
    sources = [path for path, device in devices(state).items() if device.get("mounted") == point]
    print("".join(f"{source}\n" for source in sources), end="")
    return 0 if sources else 1


def blkid(state: dict, words: list[str]) -> int:
    content = devices(state)[words[-1]]["content"]
    if "--match-tag" in words:
        print("ext4\n" if content == "ext4" else "", end="")
    return 0 if content in ("ext4", "partitions") else 2


def cmp(state: dict, words: list[str]) -> int:
    device, zeros = words[-2:]
    assert zeros == "/dev/zero"
    return 0 if devices(state)[device]["content"] == "blank" else 1


def mkfs_ext4(state: dict, words: list[str]) -> int:
    device = devices(state)[words[-1]]
    assert device["content"] == "blank", "something is lost"
    device["content"] = "ext4"
    return 0


def mount(state: dict, words: list[str]) -> int:
    device, point = words
    devices(state)[device]["mounted"] = point
    return 0


def curl(state: dict, words: list[str]) -> int:
    """The metadata server of a TPU VM."""
    workers = range(int(os.environ["FAKE_WORKERS"]))
    match words[-1].rpartition("/")[2]:
        case "worker-network-endpoints":
            form = state.get("endpoints", "10.0.0.{}")
            print(",".join(form.format(number) for number in workers), end="")
        case "agent-worker-number":
            print(os.environ["FAKE_WORKER"], end="")
    return 0


def uv(state: dict, words: list[str]) -> int:
    if words[0] == "venv":  # with a program that keeps its words
        folder = Path(words[-1]) / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "distillax").exists():
            (folder / "distillax").symlink_to(shutil.which("distillax") or "")
    return 0


def save(state: dict) -> None:
    Path(os.environ["FAKE_CLOUD"]).write_text(json.dumps(state))


def main(name: str, words: list[str]) -> int:
    state = json.loads(Path(os.environ["FAKE_CLOUD"]).read_text())
    code = globals()[name.replace(".", "_")](state, words)
    save(state)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
