"""GGUF files against independent readers: transformers for tensors, it and llama.cpp for tokenizers."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf as gguf_library
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distillax.checkpoints import gguf
from distillax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def golden(name: str) -> list[tuple[str, list[int]]]:
    """Texts that hurt, and llama.cpp's ids for them."""
    cases = json.loads((GOLDEN / f"tokenizer_{name}.json").read_text(encoding="utf-8"))["cases"]
    return [(case["text"], case["ids"]) for case in cases]


TEXTS = [text for text, _ in golden("smollm2")]


# --- A small writer of GGUF files -----------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def byte_level_keys(pre: str, extra: list[tuple[str, int]] = (), merges: list[str] = ()) -> dict:  # type: ignore[assignment]
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in merges] + [token for token, _ in extra]
    types = [NORMAL] * (len(tokens) - len(extra)) + [kind for _, kind in extra]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges) or ["t h"],
    }


def model_keys(arch: str, **changes) -> dict:
    keys = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 500000.0,
    }
    if arch == "gemma3":
        keys["attention.sliding_window"] = 16
    return {f"{arch}.{key}": value for key, value in (keys | changes).items() if value is not None}


def write_gguf(path: Path, arch: str, keys: dict, tensors: dict[str, np.ndarray], kind: str = "F32") -> Path:
    writer = gguf_library.GGUFWriter(path, arch)
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
    for key, value in keys.items():
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, values in tensors.items():
        if values.dtype == np.int8:
            writer.add_tensor(name, values)
            continue
        quantised = kind if values.ndim > 1 else "F32"
        stored_kind = gguf_library.GGMLQuantizationType[quantised]
        writer.add_tensor(name, gguf_library.quants.quantize(values, stored_kind), raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path) -> Callable[..., Path]:
    """Writes a GGUF that holds one embedding (256 rows unless told) and the keys it is given."""

    def write(arch: str = "llama", keys: dict | None = None, tensors: dict | None = None, **changes) -> Path:
        rows = len((keys or {}).get("tokenizer.ggml.tokens", [None] * 256))
        embedding = {"token_embd.weight": np.zeros((rows, 64), np.float32)}
        return write_gguf(
            tmp_path / "tiny.gguf",
            arch,
            model_keys(arch, **changes) | (keys or {}),
            embedding | (tensors or {}),
        )

    return write


# --- Tensors --------------------------------------------------------------------------------------


def reference_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors as transformers reads them from the same file, without accelerate, which it asks for."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**gguf.hf_config(path)))
    # It builds a table of all names for every child module, which takes longer than all the rest.
    flat = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=flat)["tensors"]
    return {name: tensor.numpy() for name, tensor in state.items()}


def assert_same_tensors(path: Path) -> None:
    source, expected = gguf.GGUFSource(path), reference_state(path)
    assert set(source.names()) == set(expected)
    for name, values in expected.items():
        found = source.read(name)
        assert found.dtype == source.dtype(name) == np.float32
        assert found.shape == source.shape(name) == values.shape
        np.testing.assert_array_equal(found, values, err_msg=name)


def test_tensors_of_smollm2_equal_those_of_transformers(smollm2_gguf):
    assert_same_tensors(smollm2_gguf)


def test_tensors_of_gemma3_equal_those_of_transformers(gemma3_gguf):
    assert_same_tensors(gemma3_gguf)


FAMILIES = {
    "llama": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma3": {},
}


def as_llama_cpp_writes(name: str, values: np.ndarray, arch: str) -> np.ndarray:
    """What llama.cpp's converter does to a Hugging Face tensor of a family."""
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = 4 if ".q_proj." in name else 2
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    if arch == "gemma3" and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_model_written_as_llama_cpp_writes_it_is_read_back(tmp_path, arch, kind):
    # The configuration comes from the file alone, so the keys of the model prove hf_config too.
    changes = {"rope.dimension_count": 32}
    header = write_gguf(
        tmp_path / "header.gguf",
        arch,
        model_keys(arch, **changes),
        {
            "token_embd.weight": np.zeros((96, 64), np.float32),
            "output.weight": np.zeros((96, 64), np.float32),
        },
    )
    config = gguf.hf_config(header) | FAMILIES[arch]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    names = gguf_library.get_tensor_name_map(
        gguf_library.MODEL_ARCH[arch.upper()], config["num_hidden_layers"]
    )
    state = {}
    for name, tensor in model.state_dict().items():
        # Multiples of 1/64 below 2 in bfloat16, and a scale that Q8_0 keeps: every type holds them exactly.
        values = torch.randint(-127, 128, tensor.shape).numpy().astype(np.float32) / 64
        values.reshape(-1)[::32] = 127 / 64
        state[name] = values
    stored = {
        f"{stem}.{name.rsplit('.', 1)[1]}": as_llama_cpp_writes(name, values, arch)
        for name, values in state.items()
        if (stem := names.get_name(name.rsplit(".", 1)[0]))
    }
    assert len(stored) == len(state)
    path = write_gguf(tmp_path / "model.gguf", arch, model_keys(arch, **changes), stored, kind)
    source = gguf.GGUFSource(path)
    assert set(source.names()) == set(state)
    for name, values in state.items():
        np.testing.assert_array_equal(source.read(name), values, err_msg=name)
        for rows in (slice(0, 48), slice(17, 50), slice(len(values) - 1, None)):
            np.testing.assert_array_equal(source.read(name, rows), values[rows], err_msg=f"{name} {rows}")
    assert gguf.hf_config(path) == config


def test_rows_alone_are_read_where_rows_alone_are_asked_for(tiny, monkeypatch):
    """A quarter of the embedding; and of the queries, whose rows are permuted within a head, whole heads."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(128, 64)).astype(np.float32)
    source = gguf.GGUFSource(tiny(tensors={"blk.0.attn_q.weight": queries}))
    fromfile, counts = np.fromfile, []

    def counting(file, dtype, count, offset):
        counts.append(count)
        return fromfile(file, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counting)
    source.read("model.embed_tokens.weight", slice(64, 128))
    source.read("model.layers.0.self_attn.q_proj.weight", slice(40, 60))
    assert counts == [64 * 64 * 4, 32 * 64 * 4]


def test_reading_again_gives_fresh_arrays(tiny):
    source = gguf.GGUFSource(tiny(tensors={"output_norm.weight": np.ones(64, np.float32)}))
    source.read("model.norm.weight")[:] = 7
    assert (source.read("model.norm.weight") == 1).all()


# --- Configuration --------------------------------------------------------------------------------


def test_config_of_smollm2(smollm2_gguf):
    config = gguf.hf_config(smollm2_gguf)
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }
    assert {key: config.get(key) for key in expected} == expected
    assert "rope_scaling" not in config
    assert gguf.generation_config(smollm2_gguf) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_config_of_gemma3(gemma3_gguf):
    config = gguf.hf_config(gemma3_gguf)
    expected = {
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "head_dim": 256,
        "num_key_value_heads": 1,
        "vocab_size": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert gguf.generation_config(gemma3_gguf) == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def test_llama_with_a_sliding_window_is_mistral(tiny):
    config = gguf.hf_config(tiny(**{"attention.sliding_window": 4096}))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 4096)


def llama3_divisors(factor: float, dim: int = 32, theta: float = 500000.0) -> np.ndarray:
    """transformers' frequencies without scaling over those with it."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model(
        "llama", head_dim=dim, rope_parameters=scaling, max_position_embeddings=131072
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_of_llama3_become_configuration(tiny, factor):
    path = tiny(tensors={"rope_freqs.weight": llama3_divisors(factor)}, **{"context_length": 131072})
    assert gguf.hf_config(path)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert gguf.GGUFSource(path).names() == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("read", [gguf.hf_config, gguf.GGUFSource])
def test_unknown_rope_factors_are_refused(tiny, read):
    with pytest.raises(UserError, match="rope_freqs.weight is neither"):
        read(tiny(tensors={"rope_freqs.weight": llama3_divisors(16.0)}))


def test_linear_rope_scaling(tiny):
    path = tiny("gemma3", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert gguf.hf_config(path)["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    with pytest.raises(UserError, match="by longrope"):
        gguf.hf_config(tiny(**{"rope.scaling.type": "longrope", "rope.scaling.factor": 8.0}))


def test_answers_end_where_a_chat_turn_ends(tiny):
    extra = [("<|endoftext|>", CONTROL), ("<|im_end|>", CONTROL)]
    keys = byte_level_keys("qwen2", extra) | {"tokenizer.ggml.eos_token_id": 256}
    assert gguf.generation_config(tiny("qwen2", keys)) == {"eos_token_id": 256}
    keys["tokenizer.chat_template"] = "{{ messages[0].content }}<|im_end|>"
    assert gguf.generation_config(tiny("qwen2", keys)) == {"eos_token_id": [256, 257]}
    keys["tokenizer.ggml.eos_token_id"] = 257
    assert gguf.generation_config(tiny("qwen2", keys)) == {"eos_token_id": 257}


# --- Bad files ------------------------------------------------------------------------------------


def test_bad_files_are_one_clear_sentence(tiny, tmp_path):
    def refused(path: Path, match: str, read=gguf.GGUFSource) -> None:
        with pytest.raises(UserError, match=match):
            read(path)

    refused(tmp_path / "absent.gguf", "absent.gguf does not exist")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 a zip file")
    refused(other, "not a GGUF file")
    other.write_bytes(b"")
    refused(other, "not a GGUF file")
    refused(
        tiny("falcon"),
        "architecture falcon, which is not supported; supported are gemma3, llama, qwen2, qwen3",
    )
    expert = {"blk.0.ffn_gate_inp.weight": np.zeros((2, 64), np.float32)}
    refused(tiny(tensors=expert), r"blk\.0\.ffn_gate_inp\.weight")
    refused(
        tiny(tensors={"blk.2.attn_norm.weight": np.zeros(64, np.float32)}), r"2 layers .* blk\.2\.attn_norm"
    )
    integers = gguf.GGUFSource(tiny(tensors={"output_norm.weight": np.zeros(64, np.int8)}))
    with pytest.raises(UserError, match="output_norm.weight is stored as I8"):
        integers.read("model.norm.weight")
    refused(tiny(block_count=None), "no metadata key llama.block_count", gguf.hf_config)
    refused(tiny(**{"attention.value_length": 16}), "keys and values of different sizes", gguf.hf_config)
    refused(tiny(**{"attention.head_count_kv": [1, 2]}), "layers of different sizes", gguf.hf_config)
    refused(tiny(keys={"split.count": 3}), "one of 3 parts")
    refused(
        tiny(keys={"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}), "bert", gguf.tokenizer
    )
    refused(tiny(keys=byte_level_keys("tekken")), "pre-tokenizer tekken", gguf.tokenizer)
    refused(tiny(keys=byte_level_keys("qwen2", [("a", CONTROL)])), "a token twice", gguf.tokenizer)
    beyond = byte_level_keys("qwen2") | {"tokenizer.ggml.eos_token_id": 256}
    refused(tiny(keys=beyond), "eos_token_id is 256, past", gguf.hf_config)


def test_a_file_cut_anywhere_is_refused(tiny, tmp_path):
    whole = tiny(keys=byte_level_keys("qwen2")).read_bytes()
    for length in range(4, len(whole), 997):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short"):
            gguf.GGUFSource(cut)


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return gguf.tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def gemma3(gemma3_gguf):
    return gguf.tokenizer(gemma3_gguf)


def test_smollm2_tokenizer_equals_llama_cpp(smollm2):
    for text, ids in golden("smollm2"):
        assert smollm2.encode(text) == ids, text
        assert smollm2.decode(ids) == text


def test_gemma3_tokenizer_equals_llama_cpp(gemma3):
    for text, ids in golden("gemma3"):
        assert gemma3.encode(text, add_special_tokens=False) == ids, text
        assert gemma3.encode(text) == [2, *ids]
        assert gemma3.decode(ids) == text


def test_smollm2_tokenizer_equals_transformers(smollm2, smollm2_gguf):
    reference = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # It forgets that SmolLM2 makes a word of every numeral, which shows on those that are no decimal digits.
    texts = [text for text in TEXTS if not any(char.isnumeric() and not char.isdecimal() for char in text)]
    assert len(texts) >= len(TEXTS) - 2
    for text in texts:
        assert smollm2.encode(text) == reference.encode(text), text


def test_every_numeral_of_smollm2_is_a_word(smollm2):
    assert smollm2.convert_ids_to_tokens(smollm2.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    assert smollm2.convert_ids_to_tokens(smollm2.encode("a ½")) == ["a", "Ġ", "Â½"]


def test_special_tokens_and_template(smollm2, gemma3):
    assert smollm2.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert len(smollm2) == 49152
    prompt = smollm2.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.decode([1, 33, 2], skip_special_tokens=True) == smollm2.decode([33])
    assert (gemma3.bos_token_id, gemma3.eos_token_id, gemma3.pad_token_id, gemma3.unk_token_id) == (
        2,
        1,
        0,
        3,
    )
    assert gemma3.chat_template is None
    # White space and markup are user-defined tokens: text, which is not skipped.
    text = "\t<td>\n\n  x"
    assert gemma3.decode(gemma3.encode(text), skip_special_tokens=True) == text


def assert_same_when_saved(tokenizer, folder: Path, config: dict) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids, text
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert len(loaded) == len(tokenizer)


def test_saved_tokenizers_load_the_same(smollm2, gemma3, smollm2_gguf, gemma3_gguf, tmp_path):
    # With the config.json beside it: transformers chooses the class of a tokenizer by the family.
    assert_same_when_saved(smollm2, tmp_path / "smollm2", gguf.hf_config(smollm2_gguf))
    assert_same_when_saved(gemma3, tmp_path / "gemma3", gguf.hf_config(gemma3_gguf))


MERGES = ["t h", "Ġ th", "i n", "1 2", "Ġ 1", "' s", "Ċ Ċ", "Ã ©"]
QWEN = [
    ("<|endoftext|>", CONTROL),
    ("<|im_start|>", CONTROL),
    ("<|im_end|>", CONTROL),
    ("<think>", USER_DEFINED),
]
PADDING = [(f"[PAD{row}]", UNUSED) for row in range(8)]


def test_qwen2_tokenizer_equals_its_class_in_transformers(tiny, tmp_path):
    keys = byte_level_keys("qwen2", QWEN + PADDING, MERGES) | {
        "tokenizer.ggml.eos_token_id": 266,
        "tokenizer.ggml.padding_token_id": 264,
    }
    path = tiny("qwen2", keys)
    found = gguf.tokenizer(path)
    vocabulary = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"][:264])}
    reference = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES])
    reference.add_special_tokens({"additional_special_tokens": [t for t, kind in QWEN if kind == CONTROL]})  # type: ignore[dict-item]
    reference.add_tokens(["<think>"])
    for text in [*TEXTS, "<think>the</think> 1212 's 'S e\u0301"]:
        assert found.encode(text) == reference.encode(text), text
    # Rows that pad the embedding are no tokens (pitfall 11).
    assert (len(found), gguf.hf_config(path)["vocab_size"]) == (268, 276)
    assert_same_when_saved(found, tmp_path / "saved", gguf.hf_config(path))


def test_llama3_tokenizer(tiny, tmp_path):
    extra = [("<|begin_of_text|>", CONTROL), ("<|eot_id|>", CONTROL), ("Ġwhole", NORMAL)]
    # transformers adds this one itself.
    extra.append(("<|endoftext|>", CONTROL))
    keys = byte_level_keys("llama-bpe", extra, MERGES) | {
        "tokenizer.ggml.bos_token_id": 264,
        "tokenizer.ggml.eos_token_id": 265,
    }
    path = tiny(keys=keys)
    found = gguf.tokenizer(path)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert found.encode(text, add_special_tokens=False) == reference.encode(
            text, add_special_tokens=False
        )
    # A bos comes first, a word of the vocabulary needs no merges, and numbers go by threes.
    assert found.encode(" whole") == [264, 266]
    assert found.convert_ids_to_tokens(found.encode("12212"))[1:] == ["12", "2", "12"]
    assert found.convert_ids_to_tokens(found.encode("11212"))[1:] == ["1", "12", "12"]
    assert_same_when_saved(found, tmp_path / "saved", gguf.hf_config(path))


# A SentencePiece vocabulary: pieces over a few letters, in which many unions are pieces.
LETTERS = "\u2581abé"
PIECES = [
    "ab",
    "ba",
    "aa",
    "\u2581a",
    "\u2581\u2581",
    "aba",
    "abab",
    "bé",
    "b\u2581",
    "\u2581ab",
    "aab",
    "ééé",
    "éé",
]


def sentencepiece_keys(**changes) -> dict:
    specials = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    tokens = specials + [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [(piece, NORMAL) for piece in PIECES] + [(letter, NORMAL) for letter in LETTERS]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) + len(LETTERS))]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return keys | changes


def sentencepiece_reference(text: str, vocabulary: dict[str, int]) -> list[int]:
    """SentencePiece BPE as defined: join the adjacent pair whose union scores best, leftmost first."""
    symbols = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        unions = [left + right for left, right in itertools.pairwise(symbols)]
        ranked = [(PIECES.index(union), at) for at, union in enumerate(unions) if union in PIECES]
        if not ranked:
            break
        _, at = min(ranked)
        symbols[at : at + 2] = [unions[at]]
    ids = []
    for symbol in symbols:
        known = symbol in vocabulary
        ids += [vocabulary[symbol]] if known else [vocabulary[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.gguf"
    write_gguf(path, "llama", model_keys("llama") | sentencepiece_keys(), {})
    return gguf.tokenizer(path)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=" abéx好", max_size=30))
def test_merges_from_scores_are_sentencepieces(sentencepiece, text):
    ids = sentencepiece.encode(text, add_special_tokens=False)
    assert ids == sentencepiece_reference(text, sentencepiece.get_vocab())
    assert sentencepiece.decode(ids) == text


def test_sentencepiece_bos_and_space_prefix(sentencepiece, tiny, tmp_path):
    vocabulary = sentencepiece.get_vocab()
    assert sentencepiece.encode("ab") == [1, vocabulary["\u2581ab"]]
    bare = gguf.tokenizer(
        tiny(
            keys=sentencepiece_keys(
                **{"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
            )
        )
    )
    assert bare.encode("ab") == [vocabulary["ab"]]
    assert bare.decode(bare.encode(" ab")) == " ab"
    assert_same_when_saved(sentencepiece, tmp_path / "saved", {"model_type": "llama"})
