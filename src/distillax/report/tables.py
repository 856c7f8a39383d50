"""Scores as tables: on a terminal, and in a model card. `results` is what the results.json of a run holds."""

from typing import Any

from distillax.report.charts import number


def _small(value: float) -> str:
    """0.005 of a teacher in 8 bits in more than one digit, and what rounding leaves of nothing as 0."""
    return f"{value:.2g}" if 1e-5 < value < 0.01 else f"{value:.3f}"


# key, heading, how it is written, explanation
METRICS = (
    ("nll", "NLL", "{:.3f}".format, "nats per token of the answers"),
    ("perplexity", "Perplexity", number, "exp(NLL)"),
    ("bits_per_byte", "Bits/byte", "{:.3f}".format, "NLL by UTF-8 byte, whatever the tokenizer"),
    ("kl_teacher_student", "KL", _small, "KL(teacher || student), nats per token"),
    ("top1_agreement", "Top-1", "{:.1%}".format, "tokens where both think the same one likeliest"),
)


def text(results: dict[str, Any]) -> list[str]:
    """The scores and the answers as lines of text."""
    lines = ["", "held-out prompts".ljust(18) + "".join(metric[1].rjust(13) for metric in METRICS)]
    for name, scores in results["scores"].items():
        lines.append(name.ljust(18) + "".join(cell.rjust(13) for cell in cells(scores)))
    lines += [f"Note: {note}" for note in [results.get("note")] if note]
    for answer in results["answers"]:
        lines += ["", f"> {answer['prompt']}"]
        lines += [
            f"  {name.ljust(18)} {_one_line(text)}" for name, text in answer.items() if name != "prompt"
        ]
    return [*lines, ""]


def figures(scores: dict[str, Any]) -> list[str]:
    """The scores of one model as lines of text, with what each is and of how many tokens."""
    every = (*METRICS, ("teacher_nll", "Its NLL", "{:.3f}".format, "the teacher's own, by the cache"))
    known = [(heading, write(scores[key]), what) for key, heading, write, what in every if key in scores]
    lines = [
        f"{heading:<11}{figure:>9}  {what}"
        for heading, figure, what in (*known, ("Tokens", f"{scores['tokens']:,}", "that were measured"))
    ]
    return lines + [f"Note: {note}" for note in [scores.get("note")] if note]


def markdown(results: dict[str, Any]) -> list[str]:
    """The scores as Markdown, with what they are of."""
    return [
        f"On the teacher's answers to {results['data']['held_out']:,} held-out prompts.",
        "",
        f"| | {' | '.join(metric[1] for metric in METRICS)} |",
        "| --- |" + " ---: |" * len(METRICS),
        *(f"| {name} | {' | '.join(cells(scores))} |" for name, scores in results["scores"].items()),
        "",
        *(f"- {heading}: {explanation}" for _, heading, _, explanation in METRICS),
        *(f"- {note}" for note in [results.get("note")] if note),
    ]


def cells(scores: dict[str, float]) -> list[str]:
    """A model's scores as METRICS writes them, a dash for one that it lacks."""
    return ["–" if scores.get(key) is None else write(scores[key]) for key, _, write, _ in METRICS]


def _one_line(text: str, width: int = 150) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
