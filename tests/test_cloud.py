"""The launch files: checked as shell and as YAML, and run against stand-ins that record their calls."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillax.cli import commands, parsing
from distillax.config import GenerateConfig, TrainConfig
from distillax.run_dir import RunDir
from distillax.settings import dump, load_config

REPO = Path(__file__).resolve().parents[1]
CLOUD = REPO / "cloud"
SCRIPTS = sorted([*CLOUD.glob("*.sh"), *CLOUD.glob("*.sbatch")])
TASKS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CLOUD.glob("*.yaml"))}
README = (CLOUD / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
TPU = {"ZONE": "z", "TPU_VM_NAME": "distil", "ACCELERATOR_TYPE": "v6e-8"}
DISK = {**TPU, "DISK_NAME": "d", "DISK_SIZE": "500GB", "BASE_NAME": "base"}
TRAIN = ("recipes/sft.yml", "hf_path=a data set", "steps=7")


class Stage:
    """A folder with the launch files, programs that stand in for others, and their calls."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.log, self.cloud = root, root / "bin", root / "calls", root / "cloud.json"
        self.log.touch()
        self.bin.mkdir()
        self.repo = root / "repo"
        self.repo.mkdir()
        for name in ("cloud", "recipes", "src", "requirements", "pyproject.toml", "README.md", "LICENSE"):
            (self.repo / name).symlink_to(REPO / name)
        self.state = {"disks": {}, "tpus": {}, "requests": {}}
        for name in ("gcloud", "lsblk", "findmnt", "blkid", "cmp", "mkfs.ext4", "mount", "curl", "uv"):
            fake = shlex.join([sys.executable, "-S", str(REPO / "tests" / "fake_cloud.py"), name])
            self.program(name, f'exec {fake} "$@"')
        self.program("sudo", 'exec "$@"')
        self.program("sleep")
        self.program("distillax")

    def program(self, name: str, body: str = "") -> None:
        """A program that notes its words, and then does what `body` says."""
        path = self.bin / name
        # Built first, and written at once: two programs may note at the same time.
        note = f"printf '%s\\n' \"$(printf '%q ' {shlex.quote(name)} \"$@\")\" >>{shlex.quote(str(self.log))}"
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def run(self, *words: object, code: int = 0, **env: str) -> str:
        """What a command, or a text of bash, says; it must end with `code`. Only its calls are noted."""
        self.log.write_text("")
        self.cloud.write_text(json.dumps(self.state))
        done = subprocess.run(
            ["bash", "-c", str(words[0])] if len(words) == 1 else list(map(str, words)),
            cwd=self.repo,
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "HOME": str(self.root),
                "FAKE_CLOUD": str(self.cloud),
                "MOUNT_POINT": str(self.root / "mnt"),
                **env,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        self.state = json.loads(self.cloud.read_text())
        if code == 2:
            assert re.fullmatch(r"[\w.]+: error: .+\n", done.stderr.splitlines(keepends=True)[-1]), (
                done.stderr
            )
        return done.stdout + done.stderr

    def calls(self, *names: str) -> list[list[str]]:
        every = [shlex.split(line) for line in self.log.read_text().splitlines()]
        return [words for words in every if not names or words[0] in names]

    def changes(self) -> list[list[str]]:
        """The calls of gcloud but for those that only ask."""
        return [words for words in self.calls("gcloud") if not {"list", "describe"} & set(words)]

    def did(self) -> list[str]:
        """The verbs of `changes`."""
        verbs = {"create", "attach-disk", "scp", "ssh", "delete"}
        return [next(word for word in words if word in verbs) for words in self.changes()]

    def machine(self) -> list[str]:
        """What was changed on the machine."""
        return [words[0] for words in self.calls("mkfs.ext4", "mount")]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def training(words: list[str]) -> TrainConfig:
    """What the real program makes of `distillax train ...`. Raises UserError for an unknown key."""
    assert words[:2] == ["distillax", "train"]
    recipe, overrides = parsing.recipe_and_overrides(words[2:])
    return load_config(TrainConfig, str(REPO / recipe) if recipe else None, overrides)


def generating(words: list[str]) -> Any:
    """The same for `distillax generate ...`: its flags and their values."""
    assert words[:2] == ["distillax", "generate"]
    args, unknown = parsing.make_parser(commands.COMMANDS, words[1:]).parse_known_args(words[1:])
    assert unknown == []
    given = {name: getattr(args, name) for name in GenerateConfig.model_fields if hasattr(args, name)}
    load_config(
        GenerateConfig, None, [f"{n}={','.join(v) if isinstance(v, list) else v}" for n, v in given.items()]
    )
    return args


# As shell and as YAML


def shellcheck(*words: object) -> None:
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [program, "--shell=bash", "--external-sources", "--severity=style", *words],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scripts_pass_shellcheck() -> None:
    shellcheck(*SCRIPTS)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_shell_in_a_task_passes_shellcheck(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "part.sh").write_text(TASKS[name][part])
    shellcheck(tmp_path / "part.sh")


def test_shellcheck_finds_something(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("rm -r $1\n")
    with pytest.raises(AssertionError, match="SC2086"):
        shellcheck(tmp_path / "bad.sh")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_errors_and_start_alone(path: Path) -> None:
    if path.name != "common.sh":
        assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")
        assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


# The fields of SkyPilot 0.14.1 that are used here, with their types, as its own schemas have them.
TASK = {
    "name": str, "resources": dict, "num_nodes": int, "workdir": str, "envs": dict, "secrets": dict,
    "file_mounts": dict, "setup": str, "run": str,
}  # fmt: skip
RESOURCES = {"infra": str, "accelerators": str, "use_spot": bool, "disk_size": int, "job_recovery": dict}
RECOVERY = {"strategy": str, "recover_on_exit_codes": list}
STORAGE = {"source": str, "mode": str}


def check_fields(value: dict[str, Any], fields: dict[str, type]) -> None:
    for name, item in value.items():
        assert type(item) is fields[name], f"{name}: {item!r}"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_fields_of_skypilot_only(name: str) -> None:
    task = TASKS[name]
    check_fields(task, TASK)
    check_fields(task["resources"], RESOURCES)
    check_fields(task["resources"]["job_recovery"], RECOVERY)
    assert task["resources"]["job_recovery"]["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    assert re.fullmatch(r"[\w-]+:\d+", task["resources"]["accelerators"])
    for variables in (task["envs"], task["secrets"]):
        for key, value in variables.items():
            assert re.fullmatch(r"[A-Za-z_]\w*", key) and isinstance(value, str | None)
    for point, storage in task["file_mounts"].items():
        check_fields(storage, STORAGE)
        assert (
            storage["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED") and point == task["envs"]["BASE_DIRECTORY"]
        )
        assert set(re.findall(r"\$\{(\w+)\}", storage["source"])) <= set(task["envs"])


def test_the_teachers_have_the_vllm_that_is_tested() -> None:
    tested = re.search(r"^vllm=(.+)$", (REPO / "tools" / "vllm_cpu.sh").read_text(encoding="utf-8"), re.M)
    assert tested and TASKS["teacher_fleet_skypilot.yaml"]["envs"]["VLLM_VERSION"] == tested[1]


# TPU VMs


def tpu_vm(stage: Stage, *words: str, code: int = 0, **env: str) -> str:
    return stage.run("cloud/tpu_vm.sh", *words, code=code, **(TPU | env))


def test_a_tpu_vm_from_creation_to_deletion(stage: Stage) -> None:
    tpu_vm(stage, "create", "--spot")
    assert "--spot" in stage.changes()[0] and "--accelerator-type=v6e-8" in stage.changes()[0]
    tpu_vm(stage, "install", HF_TOKEN="secret-token")
    assert stage.did() == ["scp", "ssh", "scp"]
    home = stage.root / "distil" / "0"
    assert (home / "distillax" / "src" / "distillax" / "config.py").exists()
    token = home / ".cache" / "huggingface" / "token"
    assert token.read_text() == "secret-token" and token.stat().st_mode & 0o077 == 0
    assert "secret-token" not in stage.log.read_text()
    install = next(words for words in stage.calls("uv") if words[1] == "pip")
    assert install[-1] == ".[tpu]" and "requirements/runtime.txt" in install
    tpu_vm(stage, "train", *TRAIN)
    [words] = stage.calls("distillax")
    assert words == ["distillax", "train", *TRAIN]
    stage.program("pkill", "exit 1")
    assert "no training here" in tpu_vm(stage, "stop")
    assert stage.calls("pkill") == [["pkill", "-TERM", "-f", "[d]istillax train"]]
    tpu_vm(stage, "ssh", "echo hello >hello")
    assert (home / "hello").exists()
    tpu_vm(stage, "delete")
    assert stage.state["tpus"] == {}


@pytest.mark.parametrize(
    ("given", "kind", "version"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v5p-64", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_kind_of_tpu_has_its_system(stage: Stage, given: str, kind: str, version: str) -> None:
    tpu_vm(stage, "create", ACCELERATOR_TYPE=given)
    assert {f"--accelerator-type={kind}", f"--version={version}"} <= set(stage.changes()[0])


def test_a_queued_tpu_vm_is_waited_for_and_goes_with_its_request(stage: Stage) -> None:
    assert "WAITING_FOR_RESOURCES" in tpu_vm(stage, "create", "--queued")
    assert len(stage.calls("sleep")) == 2
    tpu_vm(stage, "delete")
    assert stage.state["requests"] == stage.state["tpus"] == {}


def test_a_request_that_fails(stage: Stage) -> None:
    stage.state["outcome"] = "FAILED"
    assert "is FAILED" in tpu_vm(stage, "create", "--queued", code=2)


@pytest.mark.parametrize("endpoints", ["10.0.0.{}", "worker:{0}:10.0.0.{0}"])
def test_workers_of_a_slice_find_each_other(stage: Stage, endpoints: str) -> None:
    stage.state |= {"tpus": {"distil": {"workers": 4, "disks": []}}, "endpoints": endpoints}
    tpu_vm(stage, "install")
    tpu_vm(stage, "train", *TRAIN)
    runs = [training(words) for words in stage.calls("distillax")]
    assert [run.process_index for run in runs] == [0, 1, 2, 3]
    assert {(run.coordinator_address, run.process_count) for run in runs} == {("10.0.0.0:8476", 4)}
    assert runs[0].hf_path == "a data set" and runs[0].steps == 7


@pytest.mark.parametrize(
    "words",
    [["create", "--queued", "--spot"], ["create"], ["install"], ["train", *TRAIN], ["stop"], ["delete"]],
)
def test_a_dry_run_prints_what_the_run_does(stage: Stage, words: list[str]) -> None:
    stage.state["tpus"]["distil"] = {"workers": 2, "disks": []}
    stage.program("pkill")
    if words[0] == "train":
        tpu_vm(stage, "install")
    before = json.dumps(stage.state)
    printed = [shlex.split(line) for line in tpu_vm(stage, "--dry-run", *words, HF_TOKEN="t").splitlines()]
    assert stage.changes() == [] and json.dumps(stage.state) == before
    tpu_vm(stage, *words, HF_TOKEN="t")

    def steady(calls: list[list[str]]) -> list[list[str]]:
        return [[re.sub(r".*/(?=distillax.tar.gz$|token$)", "", word) for word in words] for words in calls]

    assert printed and steady(printed) == steady(stage.changes())


def test_mistakes_with_a_tpu_vm(stage: Stage) -> None:
    assert "ZONE is not set" in stage.run("cloud/tpu_vm.sh", "create", code=2)
    assert "ACCELERATOR_TYPE is not set" in tpu_vm(stage, "create", code=2, ACCELERATOR_TYPE="")
    assert "set RUNTIME_VERSION" in tpu_vm(stage, "create", code=2, ACCELERATOR_TYPE="v9-8")
    assert "does not know --spt" in tpu_vm(stage, "create", "--spt", code=2)
    assert "recipes/none.yml" in tpu_vm(stage, "train", "recipes/none.yml", code=2)
    assert "no command 'go'" in tpu_vm(stage, "go", code=2)
    assert stage.calls("gcloud") == []


@pytest.mark.parametrize("name", ["tpu_vm.sh", "hyperdisk.sh"])
def test_help_is_the_top_of_the_script(stage: Stage, name: str) -> None:
    text = stage.run(f"cloud/{name}", "--help")
    assert (
        f"cloud/{name}" in text and "ZONE" in text and "set -euo" not in text and "#" not in text.split()[0]
    )


# Hyperdisk


def hyperdisk(stage: Stage, *words: str, code: int = 0, **env: str) -> str:
    return stage.run("cloud/hyperdisk.sh", *words, code=code, **(DISK | env))


@pytest.fixture
def with_tpu(stage: Stage) -> Stage:
    stage.state["tpus"]["distil"] = {"workers": 1, "disks": []}
    return stage


def test_a_new_disk_is_created_attached_formatted_and_mounted(with_tpu: Stage) -> None:
    stage, point = with_tpu, with_tpu.root / "mnt"
    out = hyperdisk(stage)
    assert stage.did() == ["create", "attach-disk", "scp", "ssh"]
    assert stage.machine() == ["mkfs.ext4", "mount"]
    create, attach = stage.changes()[:2]
    assert "--size=500GB" in create and "--type=hyperdisk-balanced" in create
    assert attach[1:6] == ["alpha", "compute", "tpus", "tpu-vm", "attach-disk"]
    assert stage.state["disks"]["d"]["mounted"] == str(point)
    assert out.endswith(f"export BASE_DIRECTORY={point}/base\n") and (point / "base").is_dir()


def test_again_it_does_nothing(with_tpu: Stage) -> None:
    hyperdisk(with_tpu)
    hyperdisk(with_tpu)
    assert with_tpu.did() == ["scp", "ssh"] and with_tpu.machine() == []


def test_after_a_restart_it_mounts_without_formatting(with_tpu: Stage) -> None:
    hyperdisk(with_tpu)
    del with_tpu.state["disks"]["d"]["mounted"]
    hyperdisk(with_tpu)
    assert with_tpu.did() == ["scp", "ssh"] and with_tpu.machine() == ["mount"]


def test_a_disk_with_files_is_attached_and_never_formatted(with_tpu: Stage) -> None:
    with_tpu.state["disks"]["d"] = {"size": 500, "users": [], "content": "ext4"}
    hyperdisk(with_tpu)
    assert with_tpu.did() == ["attach-disk", "scp", "ssh"] and with_tpu.machine() == ["mount"]


@pytest.mark.parametrize("content", ["partitions", "unknown"])
def test_a_disk_that_is_not_blank_is_not_formatted(with_tpu: Stage, content: str) -> None:
    with_tpu.state["disks"]["d"] = {"size": 500, "users": [], "content": content}
    assert "is not blank" in hyperdisk(with_tpu, code=2)
    assert with_tpu.machine() == []


@pytest.mark.parametrize("words", [[], ["--instance"], ["--dry-run"]])
def test_a_disk_in_use_is_refused(with_tpu: Stage, words: list[str]) -> None:
    with_tpu.state["disks"]["d"] = {"size": 500, "users": ["https://x/zones/z/instances/distil-2"]}
    assert "in use by https://x/zones/z/instances/distil-2" in hyperdisk(with_tpu, *words, code=2)
    assert with_tpu.did() == []


def test_which_disk_must_be_clear(with_tpu: Stage) -> None:
    other = {"size": 500, "content": "ext4"}
    with_tpu.state["devices"] = {"/dev/sdb": other}
    assert "of the unused disks, 2 have 500 GB" in hyperdisk(with_tpu, code=2)
    assert with_tpu.machine() == []
    with_tpu.state["devices"]["/dev/sdb"] = other | {"mounted": "/elsewhere"}
    hyperdisk(with_tpu)
    assert with_tpu.state["disks"]["d"]["mounted"] == str(with_tpu.root / "mnt")


def test_something_else_at_the_mount_point(with_tpu: Stage) -> None:
    with_tpu.state["devices"] = {"/dev/sdb": {"size": 9, "mounted": str(with_tpu.root / "mnt")}}
    assert "/dev/sdb at" in hyperdisk(with_tpu, code=2)
    assert with_tpu.machine() == []


def test_a_disk_on_an_instance(stage: Stage) -> None:
    hyperdisk(stage, "--instance")
    assert stage.changes()[1][1:4] == ["compute", "instances", "attach-disk"]
    assert stage.machine() == ["mkfs.ext4", "mount"]
    hyperdisk(stage, "--instance")
    assert stage.did() == ["scp", "ssh"]


def test_a_dry_run_changes_no_disk(with_tpu: Stage) -> None:
    before = json.dumps(with_tpu.state)
    printed = [shlex.split(line) for line in hyperdisk(with_tpu, "--dry-run").splitlines()]
    assert with_tpu.changes() == [] and with_tpu.machine() == [] and json.dumps(with_tpu.state) == before
    hyperdisk(with_tpu)
    assert printed == with_tpu.changes()


def test_mistakes_with_a_disk(stage: Stage) -> None:
    assert "DISK_NAME is not set" in hyperdisk(stage, code=2, DISK_NAME="")
    assert "DISK_SIZE is big" in hyperdisk(stage, code=2, DISK_SIZE="big")
    assert "unknown word --dryrun" in hyperdisk(stage, "--dryrun", code=2)
    assert "cannot look up the TPU VM distil" in hyperdisk(stage, "--dry-run", code=2)
    stage.state["tpus"]["distil"] = {"workers": 4, "disks": []}
    assert "distil has 4 workers" in hyperdisk(stage, "--dry-run", code=2)
    assert stage.state["disks"] == {}


# Training under Slurm and SkyPilot


def slurm(stage: Stage, script: str, *words: str, code: int = 0, **env: str) -> str:
    """A batch script as Slurm would start it, on two nodes with eight GPUs each."""
    stage.program("srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    stage.program("scontrol", "if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; fi")
    given = {"SLURM_JOB_NAME": "my-run", "SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "8"}
    given["SLURM_JOB_NODELIST"] = "node[1-2]"
    return stage.run("bash", f"cloud/{script}", *words, code=code, **(given | env))


def requeued(stage: Stage) -> bool:
    return ["scontrol", "requeue", "17"] in stage.calls("scontrol")


def write_run(folder: Path, reached: int) -> None:
    """What a run of seven steps leaves after its step `reached`."""
    config = dump(load_config(TrainConfig, str(REPO / TRAIN[0]), TRAIN[1:]))
    with RunDir(folder.parent, folder.name, config) as run:
        (run.checkpoints / str(reached)).mkdir(parents=True)


def test_slurm_starts_a_process_a_node(stage: Stage) -> None:
    write_run(stage.repo / "runs" / "my-run", 7)
    slurm(stage, "slurm.sbatch", *TRAIN)
    [words] = stage.calls("distillax")
    config = training(words)
    assert config.run_name == "my-run" and config.base_output_directory == f"{stage.repo}/runs"
    assert config.hf_path == "a data set" and not requeued(stage)
    lines = (CLOUD / "slurm.sbatch").read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    # Without `B:` the signal goes to the steps, and not to the shell that has to requeue the job.
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=TERM@300"} <= set(options)
    assert {"--exclusive", "--mem=0"} <= set(options)  # else one core, and its share of the memory


@pytest.mark.parametrize(
    ("reached", "code", "again"),
    [
        (7, 0, False),  # done
        (4, 0, True),  # SIGTERM, and a checkpoint
        (4, 143, True),  # SIGTERM before the first step of this start
        (4, 1, False),  # a fault of ours
        (4, 2, False),  # a mistake of the user's
    ],
)
def test_slurm_requeues_what_was_interrupted(stage: Stage, reached: int, code: int, again: bool) -> None:
    stage.program("distillax", f"exit {code}")
    write_run(stage.root / "base" / "runs" / "my-run", reached)
    env = {"BASE_DIRECTORY": str(stage.root / "base")}
    if code == 2:
        stage.program("distillax", "echo 'distillax: error: a sentence' >&2; exit 2")
    slurm(stage, "slurm.sbatch", *TRAIN, code=code, **env)
    assert requeued(stage) is again


def test_slurm_refuses_what_it_sets_itself(stage: Stage) -> None:
    assert "give a recipe first" in slurm(stage, "slurm.sbatch", code=2)
    assert "give a recipe first" in slurm(stage, "slurm.sbatch", "steps=7", code=2)
    for word in ("run_name=x", "base_output_directory=x"):
        assert "--job-name=NAME" in slurm(stage, "slurm.sbatch", *TRAIN, word, code=2)
    assert stage.calls("srun") == []


@pytest.mark.parametrize("name", ["slurm.sbatch", "teacher_fleet.sbatch"])
def test_a_job_submitted_from_elsewhere(stage: Stage, name: str) -> None:
    assert "submit this from the root" in stage.run(f"cd cloud && bash {name} {TRAIN[0]}", code=2)


def sky(stage: Stage, name: str, code: int = 0, **env: str) -> str:
    """The `run` of a task, on the node that `env` says."""
    given = {key: value or key.lower() for key, value in TASKS[name]["envs"].items()}
    given |= {"BASE_DIRECTORY": str(stage.root / "bucket"), "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6"}
    given |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    for folder, program in ((".venv", "distillax"), (".venv-vllm", "vllm")):
        target = stage.repo / folder / "bin" / program
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(stage.bin / program)
    return stage.run(TASKS[name]["run"], code=code, **(given | env))


def test_skypilot_trains_on_many_nodes_and_on_one(stage: Stage) -> None:
    write_run(stage.root / "bucket" / "runs" / "run_name", 7)
    sky(stage, "skypilot.yaml")
    config = training(stage.calls("distillax")[0])
    assert (config.coordinator_address, config.process_count, config.process_index) == ("10.0.0.5:8476", 2, 1)
    assert config.base_output_directory == f"{stage.root}/bucket/runs" and config.run_name == "run_name"
    sky(stage, "skypilot.yaml", SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_IPS="10.0.0.5", SKYPILOT_NODE_RANK="0")
    assert training(stage.calls("distillax")[0]).process_count == 1


@pytest.mark.parametrize(("reached", "code", "ends"), [(7, 0, 0), (4, 0, 75), (4, 143, 75), (4, 1, 1)])
def test_skypilot_is_told_what_was_interrupted(stage: Stage, reached: int, code: int, ends: int) -> None:
    stage.program("distillax", f"exit {code}")
    write_run(stage.root / "bucket" / "runs" / "run_name", reached)
    sky(stage, "skypilot.yaml", code=ends)
    assert TASKS["skypilot.yaml"]["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


# Teachers


FLEET = ("Qwen/Qwen3-32B", "--dataset-path", "my prompts.jsonl", "--output-file", "answers.parquet")
SERVES = f"exec {shutil.which('sleep')} 50"
ANSWERS = """tries=$(grep -c "^curl .*${@: -1}" {log}); ((tries > 2))"""  # the third time


def fleet(stage: Stage, vllm: str = SERVES, curl: str = "exit 0", code: int = 0, **env: str) -> str:
    stage.program("vllm", vllm)
    stage.program("curl", curl)
    return slurm(stage, "teacher_fleet.sbatch", *FLEET, code=code, **env)


def test_a_fleet_under_slurm_answers(stage: Stage) -> None:
    stage.program("distillax", 'echo "key $OPENAI_API_KEY"')
    out = fleet(
        stage, vllm=f'echo "key $VLLM_API_KEY"; {SERVES}', curl=ANSWERS.replace("{log}", str(stage.log))
    )
    [serve], [words] = stage.calls("vllm"), stage.calls("distillax")
    assert serve[1:3] == ["serve", "Qwen/Qwen3-32B"]
    assert "--tensor-parallel-size 8 --data-parallel-size 1" in " ".join(serve)
    args = generating(words)
    assert args.engine == "server" and args.teacher_model == "Qwen/Qwen3-32B"
    assert args.teacher_url == ["http://node1:8000/v1", "http://node2:8000/v1"]
    assert args.dataset_path == "my prompts.jsonl"
    asked = [words[-1] for words in stage.calls("curl")]
    assert asked == ["http://node1:8000/health"] * 3 + ["http://node2:8000/health"] * 3
    keys = re.findall(r"^key (\w{32})$", out, re.M)
    assert len(keys) == 2 and len(set(keys)) == 1 and keys[0] not in stage.log.read_text()
    assert not requeued(stage)


def test_a_fleet_divides_its_gpus(stage: Stage) -> None:
    fleet(stage, curl=f"until grep -q '^vllm ' {stage.log}; do :; done", TP_SIZE="2")
    assert "--tensor-parallel-size 2 --data-parallel-size 4" in " ".join(stage.calls("vllm")[0])


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize(("code", "again"), [(0, True), (143, True), (1, False)])
def test_a_fleet_whose_servers_end(stage: Stage, when: str, code: int, again: bool) -> None:
    """By SIGTERM: the job is queued again. By themselves: it fails."""
    stage.program("distillax", SERVES)
    awaited = "curl" if when == "before" else "distillax"
    out = fleet(
        stage,
        vllm=f"until grep -q '^{awaited} ' {stage.log}; do :; done; exit {code}",
        curl="exit 7" if when == "before" else "exit 0",
        code=0 if again else 2,
    )
    assert requeued(stage) is again and again != ("the servers ended with code 1" in out)


def test_a_fleet_whose_generate_fails(stage: Stage) -> None:
    stage.program("distillax", "exit 1")
    fleet(stage, code=1)
    assert not requeued(stage)


def test_a_fleet_of_skypilot(stage: Stage) -> None:
    stage.program("vllm", SERVES)
    stage.program("curl")
    name = "teacher_fleet_skypilot.yaml"
    sky(stage, name, SKYPILOT_NODE_RANK="0")
    args = generating(stage.calls("distillax")[0])
    assert args.teacher_url == ["http://10.0.0.5:8000/v1", "http://10.0.0.6:8000/v1"]
    assert args.output_file == f"{stage.root}/bucket/answers.parquet"
    assert "--tensor-parallel-size 2 --data-parallel-size 4" in " ".join(stage.calls("vllm")[0])
    # The others serve until the first is gone, and do not generate.
    stage.program("curl", f"(($(grep -c ^curl {stage.log}) < 6))")
    sky(stage, name)
    assert stage.calls("distillax") == [] and len(stage.calls("curl")) == 6


def test_a_fleet_of_skypilot_whose_server_fails(stage: Stage) -> None:
    stage.program("vllm", "exit 1")
    stage.program("curl", "exit 7")
    sky(stage, "teacher_fleet_skypilot.yaml", code=1)
    assert stage.calls("distillax") == []


# The commands of the README


def test_the_commands_of_the_readme(stage: Stage) -> None:
    assert len(BLOCKS) == 5
    stage.program("sbatch")
    stage.program("sky")
    here = "set -euo pipefail\n"
    stage.run(here + "".join(BLOCKS[:3]).replace("us-east5-b", "z"), MOUNT_POINT=f"{stage.root}/mnt")
    assert stage.did() == ["create", "scp", "ssh", "create", "attach-disk", "scp", "ssh", "ssh", "delete"]
    config = training(stage.calls("distillax")[0])
    assert config.base_output_directory == "/mnt/hyperdisk/distillation/runs"
    stage.run(here + "".join(BLOCKS[3:]))
    teachers, student = stage.calls("sbatch")
    for words, script in ((teachers, "teacher_fleet.sbatch"), (student, "slurm.sbatch")):
        assert f"cloud/{script}" in words
    words = teachers[teachers.index("cloud/teacher_fleet.sbatch") + 1 :]
    generating(["distillax", "generate", "--teacher-model", *words])
    training(["distillax", "train", *student[student.index("cloud/slurm.sbatch") + 1 :]])
    for words in stage.calls("sky"):
        assert words[1:3] == ["jobs", "launch"]
        task = TASKS[words[3].removeprefix("cloud/")]
        given = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--env"}
        assert given == {key for key, value in task["envs"].items() if value is None}
        assert {words[i + 1] for i, word in enumerate(words) if word == "--secret"} == set(task["secrets"])


def test_every_launch_file_is_in_the_readme() -> None:
    files = {path.name for path in CLOUD.iterdir()} - {"README.md"}
    helpers = {"common.sh", "install.sh", "tpu_worker.sh", "hyperdisk_mount.sh"}
    assert set(re.findall(r"`([\w.]+\.(?:sh|sbatch|yaml))`", README)) == files - helpers
