"""Writes the tables of docs/scale.md anew: the plan of every recipe that names its slice.

    .venv/bin/python tools/scale_tables.py [RECIPE ...]

Takes minutes a recipe. With recipes named, only their tables are made, and the others stay.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "scale.md"
_SLICE = re.compile(r"-(v\d\w?-\d+)$")


def main(names: list[str]) -> None:
    recipes = {path.stem: path for path in sorted(REPO.glob("recipes/*.yml")) if _SLICE.search(path.stem)}
    if unknown := set(names) - set(recipes):
        raise SystemExit(f"no recipe {min(unknown)} of a slice; there are {', '.join(recipes)}")
    for name in names or recipes:
        table = "\n".join(rows(make_plan(recipes[name])))
        text, start, end = PAGE.read_text(encoding="utf-8"), f"<!-- {name} -->\n", "<!-- end -->"
        if start not in text:
            raise SystemExit(f"{PAGE} has no place for {name}: {start}{end}")
        before, after = text.split(start)
        PAGE.write_text(before + start + table + "\n\n" + end + after.split(end, 1)[1], encoding="utf-8")
        print(name, flush=True)


def make_plan(recipe: Path) -> dict[str, Any]:
    match = _SLICE.search(recipe.stem)
    assert match
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "distillax", "plan", recipe, f"topology={match[1]}", "--json", file]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, cwd=REPO)
        return json.loads(file.read_text(encoding="utf-8"))


def rows(plan: dict[str, Any]) -> list[str]:
    """A plan as a Markdown table: bytes a chip, and a step."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
    found = [
        (f"{plan['topology']}, {mesh}", "a chip"),
        ("---", "---:"),
        *((name, f"{plan[name + '_bytes']:,} B") for name in ("parameter", "optimizer", "teacher")),
        ("temporaries", f"{plan['temporary_bytes']:,} B"),
        (
            f"peak: {'fits' if plan['fits'] else 'does not fit'}",
            f"{plan['peak_bytes']:,} of {plan['hbm_bytes']:,} B",
        ),
        ("FLOPs a step, all chips", f"{plan['flops_per_step']:.3e}"),
        ("tokens a step, all chips", f"{plan['tokens_per_step']:,}"),
    ]
    if plan["fits"]:
        shares = plan["collective_shares"]
        found += [
            (kind, f"{size / 1e9:.2f} GB sent, {shares[kind]:.0%}")
            for kind, size in plan["collective_bytes"].items()
        ]
        found += [("interconnect, of the time of the products", f"{plan['interconnect_share']:.0%}")]
        if plan["network_share"]:
            found += [("network between slices, likewise", f"{plan['network_share']:.0%}")]
        found += [("MFU at most", f"{plan['mfu_bound']:.0%}")]
    return [f"| {name} | {value} |" for name, value in found]


if __name__ == "__main__":
    main(sys.argv[1:])
