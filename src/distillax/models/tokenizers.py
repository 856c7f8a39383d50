"""Which tokenizers are the same, whatever files they came from, and which chat template one has."""

import hashlib
import json
from typing import Any

# Texts on which tokenizers that look alike come apart.
_PROBES = (
    "Hello, world! It's 2024; they've won.",
    "   leading, trailing   and  runs   of spaces    ",
    "tabs\tand\r\nlines\n\n\n    def f(x):\n        return x**2 != 10_000\n",
    "1234567890 3.14159 -1e-10 12,345",
    "snake_case camelCase <tag attr='v'/> {\"k\": [1, 2]} // é ñ ß Å",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "今日は良い天気ですね。汉字测试，한국어 시험",
    "السلام عليكم, שלום, हिन्दी, ไทย, Ελληνικά, Русский",
    "e\u0301 \u00a0 \u200b \ufeff \u2028 \ufffd",
)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of what the tokenizer does: its vocabulary and its encoding of nasty texts.

    Equal for tokenizers that turn the same text into the same ids, whatever file they came from
    and whatever their chat template.
    """
    vocab = sorted(tokenizer.get_vocab().items())
    encodings = [tokenizer.encode(probe, add_special_tokens=False, verbose=False) for probe in _PROBES]
    return hashlib.sha256(json.dumps([vocab, encodings]).encode()).hexdigest()


def same(a: Any, b: Any) -> bool:
    """Whether ids mean the same in both, so that logits over them can be compared."""
    return fingerprint(a) == fingerprint(b)


def extends(given: Any, base: Any) -> bool:
    """Whether ids of `base` mean the same in `given`, but for added tokens, such as reserved ones, which a
    chat model may have renamed, and for those that fill a vocabulary up, which may be in one file alone."""
    known, added = given.get_vocab(), base.get_added_vocab()
    words, free = {i: token for token, i in known.items()}, set(given.get_added_vocab().values())
    return all(
        words.get(i) == token or token in added or i in free or (i not in words and token not in known)
        for token, i in base.get_vocab().items()
    )


def template_of(tokenizer: Any) -> str:
    """The chat template that renders conversations: of several, the one called default. Empty without one."""
    template = getattr(tokenizer, "chat_template", None)
    return (template.get("default") if isinstance(template, dict) else template) or ""
