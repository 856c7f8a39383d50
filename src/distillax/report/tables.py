"""The scores of a run as tables: on a terminal, and in a model card. `results` is what results.json holds."""

from typing import Any

_COLUMNS = [
    ("nll", "NLL", "{:.3f}"),
    ("perplexity", "perplexity", "{:.4g}"),
    ("bits_per_byte", "bits/byte", "{:.3f}"),
    ("kl_teacher_student", "KL", "{:.3f}"),
    ("top1_agreement", "top-1", "{:.1%}"),
]


def text(results: dict[str, Any]) -> list[str]:
    """The scores and the answers as lines of text."""
    lines = ["", "held-out prompts".ljust(18) + "".join(title.rjust(13) for _, title, _ in _COLUMNS)]
    for name, cells in _cells(results):
        lines.append(name.ljust(18) + "".join(cell.rjust(13) for cell in cells))
    for answer in results["answers"]:
        lines += ["", f"> {answer['prompt']}"]
        lines += [f"  {name.ljust(18)} {_one_line(answer[name])}" for name in results["scores"]]
    return [*lines, ""]


def markdown(results: dict[str, Any]) -> list[str]:
    """The scores as Markdown, with what they are of."""
    titles = [title for _, title, _ in _COLUMNS]
    return [
        f"On the teacher's answers to {results['data']['held_out']:,} held-out prompts. NLL and KL (of the "
        "teacher from the model) are in nats a token; top-1 is the share of tokens on which both agree.",
        "",
        f"| | {' | '.join(titles)} |",
        "| --- |" + " ---: |" * len(titles),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in _cells(results)),
    ]


def _cells(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (name, [form.format(scores[key]) if key in scores else "-" for key, _, form in _COLUMNS])
        for name, scores in results["scores"].items()
    ]


def _one_line(text: str, width: int = 150) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
