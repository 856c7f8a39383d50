"""What is done again by a `distillax run`, also of what another version of the program has left."""

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import BaseModel, create_model

from distillax.errors import UserError, changed_values
from distillax.stages import Stages

FIRST = {"temperature": 1.0, "layers": (1, 2)}


def section(keys: dict, **values: object) -> BaseModel:
    """A section of a version of the program that has these keys, with these defaults."""
    fields = {name: (type(default), default) for name, default in keys.items()}
    return create_model("Section", **fields)(**values)  # type: ignore[call-overload]


def done(
    folder: Path, keys: dict, fact: str = "a model", fails: bool = False, **values: object
) -> tuple[list[str], list[str]]:
    """(the stages that were done now, what was said) of two, the second of which reads the first."""
    now, said = [], []
    stages = Stages(folder, said.append)
    for name, inputs in (("generate", []), ("train", ["generate"])):

        def work(name: str = name) -> None:
            stages.begin(name, folder / name)
            (folder / name).mkdir(exist_ok=True)
            if fails and name == "train":
                raise UserError("the disk is full")
            now.append(name)
            (folder / f"{name}.json").touch()

        stages.do(name, section(keys, **values), [fact], inputs, folder / f"{name}.json", work, {"urls"})
    return now, said


def test_a_younger_key_makes_nothing_anew(tmp_path: Path) -> None:
    both = ["generate", "train"]
    assert done(tmp_path, FIRST)[0] == both
    younger = {**FIRST, "top_p": 1.0, "urls": ""}
    assert done(tmp_path, younger) == ([], ["generate: done before", "train: done before"])
    assert done(tmp_path, younger, urls="x")[0] == []
    assert done(tmp_path, younger, top_p=0.5)[0] == both
    assert done(tmp_path, younger, top_p=0.5)[0] == []
    assert done(tmp_path, {**younger, "top_p": 0.5})[0] == []  # another default, the same value
    assert done(tmp_path, younger)[0] == both


def test_a_key_that_is_no_more_and_another_default(tmp_path: Path) -> None:
    assert done(tmp_path, {**FIRST, "mode": "new"})[0] == ["generate", "train"]
    assert done(tmp_path, FIRST)[0] == []
    assert done(tmp_path, {**FIRST, "temperature": 0.5})[0] == ["generate", "train"]
    assert done(tmp_path, {**FIRST, "temperature": 0.5}, fact="another model")[0] == ["generate", "train"]


def test_an_empty_value_is_said_as_not_given() -> None:
    changes = [("format", "", "topk"), ("url", "x", ""), ("ids", [], [1]), ("on", None, True)]
    assert changed_values(changes) == (
        "format not given (now topk), url=x (now not given), ids not given (now [1]), on=null (now true)"
    )


def test_what_was_begun_goes_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        done(tmp_path, FIRST, fails=True)
    (tmp_path / "train" / "kept").touch()
    assert done(tmp_path, {**FIRST, "top_p": 1.0})[0] == ["train"]
    assert (tmp_path / "train" / "kept").exists()


def test_what_gave_way_to_something_else_is_not_done(tmp_path: Path) -> None:
    """Other values were tried, and that was interrupted: nothing is left of what the first ones gave."""
    done(tmp_path, FIRST)
    with pytest.raises(UserError, match="the disk is full"):
        done(tmp_path, FIRST, fact="another model", fails=True)
    now, said = done(tmp_path, FIRST)
    assert now == ["generate", "train"] and any("is now in" in line for line in said)


def test_the_ledger_keeps_its_form(tmp_path: Path) -> None:
    """Another would have a later version make all stages anew."""
    values = {"temperature": 1.0, "layers": [1, 2]}

    def fingerprint(*facts: object) -> str:
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    first = fingerprint("generate", [values, "a model"], [])
    second = fingerprint("train", [values, "a model"], [first])
    done(tmp_path, FIRST)
    assert json.loads((tmp_path / "stages.json").read_text()) == {
        **{"generate": first, "generate:begun": first, "generate:values": values},
        **{"train": second, "train:begun": second, "train:values": values},
    }


def test_a_stage_that_was_killed_is_not_done(tmp_path: Path) -> None:
    """Not even with the values of before, as what they had made may have been replaced."""
    done(tmp_path, FIRST)
    stages = Stages(tmp_path, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        stages.do(
            "generate", section(FIRST, layers=(3,)), ["a model"], [], tmp_path / "generate.json", killed
        )
    assert done(tmp_path, FIRST)[0] == ["generate"]


def killed() -> None:
    raise KeyboardInterrupt
