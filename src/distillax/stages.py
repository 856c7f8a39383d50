"""Which stages of a `distillax run` are done: a ledger in the run's folder.

A stage is done when its fingerprint is: a hash of its part of the configuration and of the fingerprints of
what it reads. Beside it lie the values that it was made with. A key that these lack is younger than they are:
it had its default, and is no reason to make the stage anew; one that is no more is none, either.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distillax.errors import changed_values
from distillax.run_dir import read_json, write_json

RESULTS = "results.json"


class Stages:
    """The stages of one run folder, in order: `do` each, which says on the way what becomes of it."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self._ledger = folder / "stages.json"
        self._done: dict[str, Any] = read_json(self._ledger) if self._ledger.is_file() else {}
        self._now: dict[str, str] = {}  # fingerprints of the stages so far
        self._values: dict[str, dict[str, Any]] = {}  # and the keys that they are made with

    def __contains__(self, name: str) -> bool:
        """Whether the stage is one of this configuration."""
        return name in self._now

    def do(
        self,
        name: str,
        section: BaseModel | None,
        own: list[Any],
        inputs: list[str],
        output: Path,
        work: Callable[[], None],
        leave_out: Collection[str] = (),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Does `work` unless it was done with the same `section` (but for the keys to leave out), the same
        `own` facts and the same `inputs`, and its `output` is there. Before that, `check` may raise."""
        values = {k: v for k, v in plain(section).items() if k not in leave_out}
        before = self._done.get(f"{name}:values", {})
        defaults = plain(type(section)()) if section else {}
        same = {k: values.get(k, v) for k, v in before.items()}
        same |= {k: v for k, v in values.items() if k not in before and v != defaults[k]}

        def fingerprint(values: dict[str, Any]) -> str:
            facts = [name, [*([values] if section else []), *own], [self._now[i] for i in inputs]]
            return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

        known = fingerprint(same) in (self._done.get(name), self._done.get(f"{name}:begun"))
        self._values[name] = same if known else values
        self._now[name] = fingerprint(self._values[name])
        if self._done.get(name) == self._now[name] and output.exists():
            self.say(f"{name}: done before")
            return
        check()
        start = time.monotonic()
        (self.folder / RESULTS).unlink(missing_ok=True)  # they are of what was there before
        self._forget(name)
        work()
        self._record(name)
        self.say(f"{name}: {time.monotonic() - start:.0f} s")

    def source(self, name: str, folder: Path) -> Path:
        """Where lies what was done for the stage as it is now, which `begin` puts into `folder`."""
        same = self._done.get(f"{name}:begun") == self._now[name]
        return folder if same else folder.with_name(f"{folder.name}.{self._now[name]}")

    def begin(self, name: str, folder: Path) -> None:
        """What was begun with another configuration, or from other inputs, is no use any more."""
        begun = self._done.get(f"{name}:begun")
        kept = self.source(name, folder)
        if kept == folder:
            return
        if folder.exists():
            before, values = self._done.get(f"{name}:values", {}), self._values[name]
            changed = [(k, before[k], v) for k, v in values.items() if before.get(k, v) != v]
            how = f"with {changed_values(changed)}" if changed else "from other inputs"
            fate = "gives way to what these gave before" if kept.exists() else "is made anew"
            self.say(f"{name}: {folder} was made {how}, and {fate}")
            if begun and name == "generate":  # a teacher's hours
                self._move(folder, folder.with_name(f"{folder.name}.{begun}"))
        shutil.rmtree(folder, ignore_errors=True)
        if kept.exists():
            self._move(kept, folder)
        self._record(f"{name}:begun")

    def _move(self, folder: Path, to: Path) -> None:
        shutil.rmtree(to, ignore_errors=True)
        folder.rename(to)
        self.say(f"generate: what was in {folder} is now in {to}")

    def _forget(self, name: str) -> None:
        """What is there will not be whole for a while, or never."""
        if self._done.pop(name, None):
            write_json(self._ledger, self._done)

    def _record(self, entry: str) -> None:
        name = entry.partition(":")[0]
        self._done[entry] = self._now[name]
        self._done[f"{name}:values"] = self._values[name]
        write_json(self._ledger, self._done)


def plain(section: BaseModel | None) -> dict[str, Any]:
    """A section of the configuration as plain values, secrets left out."""
    return section.model_dump(mode="json", exclude={"hf_access_token"}) if section else {}
