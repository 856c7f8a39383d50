"""The tokenizer of a GGUF file, rebuilt from its metadata with the `tokenizers` library."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from distillax.checkpoints.gguf_file import GGUFFile
from distillax.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_NO_TOKEN = 0xFFFFFFFF
_SPACE = "\u2581"  # SentencePiece's visible space
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
# Tokens that end a chat turn, in the families that have one; stops only where the chat template writes them.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_FROM_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Splitter:
    """How a byte-level tokenizer cuts text into words, by llama.cpp's `tokenizer.ggml.pre` name."""

    pattern: str | None = None  # None: the GPT-2 pattern, built into ByteLevel
    digits: bool = False  # every digit is a word, before the pattern
    nfc: bool = False  # Unicode NFC first
    whole_words: bool = False  # a word in the vocabulary is not built up by merges
    adds_bos: bool = False  # where the file does not say


_LLAMA3 = _Splitter(
    f"{_CONTRACTION}|{_WORDS_FROM_LETTERS}|\\p{{N}}{{1,3}}|{_REST}", whole_words=True, adds_bos=True
)
_SPLITTERS = {
    "gpt-2": _Splitter(),
    "smollm": _Splitter(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Splitter(f"{_CONTRACTION}|{_WORDS_FROM_LETTERS}|\\p{{N}}|{_REST}", nfc=True),
}


def special_token_ids(file: GGUFFile) -> dict[str, int | None]:
    """Ids of bos, eos, unk and pad; None where the file names no such token."""
    # llama.cpp's own defaults for SentencePiece vocabularies.
    defaults = {"bos": 1, "eos": 2, "unk": 0} if file.get("tokenizer.ggml.model") == "llama" else {}
    ids = {}
    for name, key in _IDS.items():
        token_id = file.get(f"tokenizer.ggml.{key}", defaults.get(name))
        ids[name] = None if token_id == _NO_TOKEN else token_id
        if ids[name] is not None and not 0 <= ids[name] < len(file.require("tokenizer.ggml.tokens")):
            raise UserError(f"{file.path}: tokenizer.ggml.{key} is {token_id}, past the vocabulary's end.")
    return ids


def stop_token_ids(file: GGUFFile) -> list[int]:
    """Ids that end an answer: eos first, then the end of a chat turn where that is another token."""
    tokens = file.get("tokenizer.ggml.tokens", [])
    template = file.get("tokenizer.chat_template", "")
    turn_ends = [tokens.index(token) for token in _TURN_ENDS if token in template and token in tokens]
    candidates = [special_token_ids(file)["eos"], file.get("tokenizer.ggml.eot_token_id"), *turn_ends]
    return list(dict.fromkeys(token_id for token_id in candidates if token_id is not None))


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The fast tokenizer that a GGUF file describes: vocabulary, special tokens, chat template.

    Byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) vocabularies. Control tokens become special added
    tokens, user-defined ones plain added tokens; both are matched in the text before anything else. Raises
    UserError for another kind of vocabulary or an unknown pre-tokenizer.
    """
    kind = file.require("tokenizer.ggml.model")
    tokens = file.require("tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    # Rows that only pad the embedding (Qwen: 151,669 tokens in 151,936 rows) are no tokens.
    count = len(tokens)
    while count and types[count - 1] == _UNUSED:
        count -= 1
    tokens, types = tokens[:count], types[:count]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) < count:
        raise UserError(f"{file.path} lists a token twice in tokenizer.ggml.tokens; convert the model again.")
    if kind == "gpt2":
        splitter = _splitter(file)
        backend, adds_bos = _byte_level(file, vocabulary, splitter), splitter.adds_bos
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(file, vocabulary, types), True
    else:
        raise UserError(f"{file.path} has a {kind} tokenizer; supported are gpt2 and llama.")
    _add_tokens(backend, tokens, types)
    named = {f"{name}_token": None if i is None else tokens[i] for name, i in special_token_ids(file).items()}
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=file.get("tokenizer.ggml.add_bos_token", adds_bos),
        add_eos_token=file.get("tokenizer.ggml.add_eos_token", False),
        clean_up_tokenization_spaces=False,
        model_max_length=file.require("{arch}.context_length"),
        **named,
    )
    result.chat_template = file.get("tokenizer.chat_template")
    return result


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in user_defined])


def _splitter(file: GGUFFile) -> _Splitter:
    name = file.require("tokenizer.ggml.pre")
    if name not in _SPLITTERS:
        raise UserError(
            f"{file.path} needs the pre-tokenizer {name}, which is not supported; "
            f"supported are {', '.join(sorted(_SPLITTERS))}."
        )
    return _SPLITTERS[name]


def _byte_level(file: GGUFFile, vocabulary: dict[str, int], splitter: _Splitter) -> Tokenizer:
    parts = (merge.partition(" ") for merge in file.require("tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in parts]
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=splitter.whole_words))
    if splitter.nfc:
        backend.normalizer = normalizers.NFC()
    steps = []
    if splitter.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitter.pattern:
        steps.append(pre_tokenizers.Split(Regex(splitter.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, vocabulary: dict[str, int], types: Sequence[int]) -> Tokenizer:
    scores = file.require("tokenizer.ggml.scores")
    unknown = special_token_ids(file)["unk"]
    backend = Tokenizer(
        BPE(
            vocabulary,
            _merges_from_scores(vocabulary, scores, types),
            unk_token=None if unknown is None else file.require("tokenizer.ggml.tokens")[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(
    vocabulary: dict[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece makes: any two pieces whose union is a piece, best score first."""
    pieces = {token for token, token_id in vocabulary.items() if types[token_id] == _NORMAL}
    merges = []
    for piece in sorted(pieces, key=lambda piece: (-scores[vocabulary[piece]], vocabulary[piece])):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in pieces and right in pieces]
    return merges
