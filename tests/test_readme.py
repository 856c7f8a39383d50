"""The commands of the README run as written, with local stand-ins for the hub ids. The one with
`--engine vllm` is left to test_offline.py, which gives a real model to a real vLLM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small
from fake_server import FakeServer, running

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
SMALLER = {
    "steps=1500": "steps=2",
    "max_target_length=2048": "max_target_length=96",
    "--max-new-tokens 1024": "--max-new-tokens 32",
}


def test_all_blocks_are_known() -> None:
    words = [block.split()[1] for block in BLOCKS]
    assert words == ["generate", "convert", "train", "train", "train", "generate", "generate", "generate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the hub ids are folders."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(REPO / "recipes")
    for name, seed in (("Qwen/Qwen3-1.7B", 0), ("Qwen/Qwen3-0.6B", 1)):
        small.chat_model("qwen3", folder / name, seed=seed)
    for split in ("train_sft", "test_sft"):
        small.questions(folder / "HuggingFaceH4" / "ultrachat_200k" / f"{split}.jsonl", 6)
    return folder


def bash(block: str, folder: Path) -> str:
    for old, new in SMALLER.items():
        block = block.replace(old, new)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_distil_your_own_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [bash(block, folder) for block in BLOCKS[:6]]
    assert "Top-1" in out[-1]
    assert (folder / "exported" / "model.safetensors").exists() and (folder / "report.html").exists()
    # From Python, the export standing for that of the demo.
    (folder / "runs" / "demo").mkdir()
    (folder / "runs" / "demo" / "export").symlink_to(folder / "exported")
    monkeypatch.chdir(folder)
    (python,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(python, {})
    assert capsys.readouterr().out.strip()


def test_a_fleet_of_servers(folder: Path) -> None:
    with running(FakeServer()) as one, running(FakeServer()) as two:
        block = (
            BLOCKS[7]
            .replace("http://localhost:8000/v1", one.url)
            .replace("http://localhost:8001/v1", two.url)
        )
        (folder / "Qwen" / "Qwen3-32B").symlink_to(folder / "Qwen" / "Qwen3-1.7B")
        bash(block, folder)
    assert (folder / "data" / "answers-fleet.parquet").exists()


def test_the_page_on_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (REPO / "docs/python.md").read_text(encoding="utf-8"), re.M | re.S
    )
    for name, seed in (("TEACHER", 0), ("STUDENT", 1)):
        small.chat_model("qwen3", tmp_path / name, seed=seed)
    small.questions(tmp_path / "questions.jsonl", 6)
    shorter = {"max_new_tokens=256": "max_new_tokens=6", "max_new_tokens=64": "max_new_tokens=6"}
    for old, new in {**shorter, '"steps": 200': '"steps": 2, "max_target_length": 96'}.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert float(capsys.readouterr().out.splitlines()[-2]) > 0
