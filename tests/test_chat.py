"""Chat templates and loss masks, on tokenizers and templates of several families.

`marked` writes an example as text with its loss-bearing runs in «»: the expected strings are by hand.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import parts
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillax.checkpoints import gguf
from distillax.data.chat import (
    encode,
    encode_conversation,
    encode_plain,
    end_of_turn_id,
    render_prompt,
    stop_tokens,
)
from distillax.data.examples import load_examples
from distillax.errors import UserError
from distillax.models.tokenizers import fingerprint as fingerprint_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% set rest = messages %}"
    "{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ first if loop.first }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set answer = m.content -%}{%- set thought = '' -%}"
    "{%- if m.role == 'assistant' and '</think>' in answer -%}"
    "{%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set answer = answer.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- answer + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"
)
# The thought is opened by the prompt and dropped from every answer: no prompt is a prefix of the whole.
R1 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# EOS ends the conversation, not the turn: the first turn is none the longer for it.
ONE_EOS = PLAIN.replace("m.content + '\n'", "m.content + (eos_token if loop.last else '\n')")
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>",
)  # fmt: skip
WORDS = "hello world the answer is four what is two plus two and the user and the assistant"
TEXT = [WORDS, *WORDS.split()] * 3


def byte_level(template, eos="</s>", bos="<s>", trim_offsets=True):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "chatml": byte_level(CHATML, eos="<|im_end|>"),
    "llama3": byte_level(LLAMA3, eos="<|eot_id|>"),
    "gemma": byte_level(GEMMA, eos="</s>"),  # the turn ends in another token than EOS
    "qwen3": byte_level(QWEN3, eos="<|im_end|>", trim_offsets=False),
    "inst": byte_level(INST),
    "r1": byte_level(R1),
    "plain": byte_level(PLAIN),
    "one_eos": byte_level(ONE_EOS),
    # it takes only conversations that an assistant has answered
    "picky": byte_level(
        "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
    ),
    "smollm2": gguf.tokenizer(parts.smollm2_gguf()),
}


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def pieces(tokenizer, ids):
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def marked(tokenizer, example):
    edges = np.flatnonzero(np.diff(example.loss_mask, prepend=False, append=False))
    bounds = [0, *edges.tolist(), len(example.tokens)]
    runs = [pieces(tokenizer, example.tokens[a:b]) for a, b in itertools.pairwise(bounds)]
    return "".join(f"«{run}»" if k % 2 else run for k, run in enumerate(runs))


SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
HAND_MADE = [
    ("chatml", chat("hello", "four"), f"{USER}hello<|im_end|>\n{ASSISTANT}«four<|im_end|>»"),
    (
        "chatml",
        chat("a", "b", "c", "d", "never answered", system="be kind"),
        f"<|im_start|>system\nbe kind<|im_end|>\n{USER}a<|im_end|>\n{ASSISTANT}«b<|im_end|>»\n"
        f"{USER}c<|im_end|>\n{ASSISTANT}«d<|im_end|>»",
    ),
    # nobody is to learn to say nothing
    ("chatml", chat("hi", ""), f"{USER}hi<|im_end|>\n{ASSISTANT}<|im_end|>"),
    (
        "plain",
        chat("a", "b", "c", " "),
        "### user:\na\n### assistant:\n«b»\n### user:\nc\n### assistant:\n </s>",
    ),
    (
        "chatml",
        chat("a", "\n", "b", "two"),
        f"{USER}a<|im_end|>\n{ASSISTANT}\n<|im_end|>\n{USER}b<|im_end|>\n{ASSISTANT}«two<|im_end|>»",
    ),
    # an answer that begins and ends in spaces keeps them
    ("chatml", chat("hi", "  two  "), f"{USER}hi<|im_end|>\n{ASSISTANT}«  two  <|im_end|>»"),
    # an answer that is also the name of a role, of a token, of the user's message
    (
        "chatml",
        chat("assistant", "assistant", "im_end", "im_end"),
        f"{USER}assistant<|im_end|>\n{ASSISTANT}«assistant<|im_end|>»\n"
        f"{USER}im_end<|im_end|>\n{ASSISTANT}«im_end<|im_end|>»",
    ),
    (
        "smollm2",
        chat("hello", "four", "x", "👍🏽 今日"),
        f"{SYSTEM}{USER}hello<|im_end|>\n{ASSISTANT}«four<|im_end|>»\n"
        f"{USER}x<|im_end|>\n{ASSISTANT}«👍🏽 今日<|im_end|>»",
    ),
    (
        "llama3",
        chat(" hello ", "  four\n", "what", "two", system="be kind"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«four<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«two<|eot_id|>»",
    ),
    (
        "gemma",
        chat("hello", "four ", "model", "model", system="be kind"),
        "<s><start_of_turn>user\nbe kind\n\nhello<end_of_turn>\n<start_of_turn>model\n«four<end_of_turn>»\n"
        "<start_of_turn>user\nmodel<end_of_turn>\n<start_of_turn>model\n«model<end_of_turn>»",
    ),
    # thoughts of earlier turns are dropped by the template, the last one is kept and learned
    (
        "qwen3",
        chat("a", "<think>\nb\n</think>\n\nc", "d", "<think>\ne\n</think>\n\nf"),
        f"{USER}a<|im_end|>\n{ASSISTANT}«c<|im_end|>»\n"
        f"{USER}d<|im_end|>\n{ASSISTANT}«<think>\ne\n</think>\n\nf<|im_end|>»",
    ),
    # ... also if the template writes it in another form than the row; an empty one is learned too
    (
        "qwen3",
        chat("a", "<think>b</think>c"),
        f"{USER}a<|im_end|>\n{ASSISTANT}«<think>\nb\n</think>\n\nc<|im_end|>»",
    ),
    (
        "qwen3",
        chat("a", "think"),
        f"{USER}a<|im_end|>\n{ASSISTANT}«<think>\n\n</think>\n\nthink<|im_end|>»",
    ),
    (
        "r1",
        chat("a", "hm</think>b", "b", "a"),
        "<s><|User|>a<|Assistant|>«b</s>»<|User|>b<|Assistant|>«a</s>»",
    ),
    # an answer that repeats the question, where only its text can tell where it begins
    ("r1", chat("b", "b"), "<s><|User|>b<|Assistant|>«b</s>»"),
    ("inst", chat("a", "b", "c", "d"), "<s>[INST] a [/INST]« b</s>»[INST] c [/INST]« d</s>»"),
    # no end-of-turn in the template: EOS ends the last answer, and what follows it is left out
    (
        "plain",
        chat("a", "b", "user", "assistant"),
        "### user:\na\n### assistant:\n«b»\n### user:\nuser\n### assistant:\n«assistant</s>»",
    ),
    (
        "one_eos",
        chat("a", "b", "user", "assistant"),
        "### user:\na\n### assistant:\n«b»\n### user:\nuser\n### assistant:\n«assistant</s>»",
    ),
    ("picky", chat("four", "four"), f"{USER}four<|im_end|>\n{ASSISTANT}«four<|im_end|>»"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "messages", "expected"), HAND_MADE)
def test_masks_by_hand(name, messages, expected):
    tokenizer = TOKENIZERS[name]
    example = encode_conversation(tokenizer, messages)
    assert marked(tokenizer, example) == expected
    assert (example.tokens.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)
    # Pitfall 19: one rendering of the whole, so one BOS and one system header.
    assert expected.count("<s>") <= 1


def test_mask_token_by_token():
    tokenizer = TOKENIZERS["chatml"]
    example = encode_conversation(tokenizer, chat("two", "four"))
    tokens = ["<|im_start|>", "user", "Ċ", "two", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ", "four"]
    assert tokenizer.convert_ids_to_tokens(example.tokens.tolist()) == [*tokens, "<|im_end|>"]
    assert example.loss_mask.tolist() == [False] * 9 + [True, True]


def test_real_dialogues():
    tokenizer = TOKENIZERS["smollm2"]
    dialogues = yaml.safe_load(parts.chatterbot_yaml()[0].read_text())["conversations"]
    assert len(dialogues) > 10
    for dialogue in dialogues:
        turns = [str(line) for line in dialogue[: len(dialogue) // 2 * 2]]
        example = encode_conversation(tokenizer, chat(*turns))
        expected = "".join(answer + "<|im_end|>" for answer in turns[1::2])
        assert pieces(tokenizer, example.tokens[example.loss_mask]) == expected


def test_learns_to_stop_where_pad_is_eos():
    """Pitfall 7, on the tokenizer that has it."""
    tokenizer = TOKENIZERS["smollm2"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == end_of_turn_id(tokenizer)
    example = encode_conversation(tokenizer, chat("hello", "four", "x", "y"))
    at = example.tokens == tokenizer.eos_token_id
    assert example.loss_mask[at].tolist() == [False, False, True, False, True]  # system, user, ...


TRIMMED = {"llama3", "gemma"}
END = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "inst": "</s>"}
# Any text but what a template reads as markup, and lone surrogates, which no tokenizer encodes.
contents = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["", " ", "\n", "assistant", "user\n", "model", "im_end", "<|", "a\n\nb", " 👍🏽", "[INST]", "think>"]
)


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3", "gemma", "inst"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_loss_is_on_the_answers_and_nothing_else(name, data):
    turns = data.draw(st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
    system = data.draw(st.none() | contents) if name != "inst" else None
    if name == "smollm2":  # its tokens may straddle a line break: see test_tokens_across_the_boundaries
        turns = [(user, answer.lstrip()) for user, answer in turns]
    messages = chat(*[c for turn in turns for c in turn], system=system)
    tokenizer = TOKENIZERS[name]
    example = encode_conversation(tokenizer, messages)
    answers = [c.strip() if name in TRIMMED else " " + c if name == "inst" else c for _, c in turns]
    expected = "".join(
        pieces(tokenizer, encode(tokenizer, answer)) + END.get(name, "<|im_end|>")
        for answer in answers
        if answer.strip()
    )
    assert pieces(tokenizer, example.tokens[example.loss_mask]) == expected
    whole = encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
    assert example.tokens.tolist() == whole[: len(example.tokens)]


def explicit_bpe(template, merges):
    vocab = {token: i for i, token in enumerate(["</s>", "A", ":", "y", "e", "s", ".", ":y", "s."])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def test_tokens_across_the_boundaries():
    """At the start they are prompt, at the end answer."""
    template = (
        "{% for m in messages %}{{ ('A:' if m.role == 'assistant' else '') + m.content }}"
        "{{ '.' + eos_token if m.role == 'assistant' }}{% endfor %}{{ 'A:' if add_generation_prompt }}"
    )
    tokenizer = explicit_bpe(template, [(":", "y"), ("s", ".")])
    example = encode_conversation(tokenizer, chat("e", "yes"))
    assert tokenizer.convert_ids_to_tokens(example.tokens.tolist()) == ["e", "A", ":y", "e", "s.", "</s>"]
    assert example.loss_mask.tolist() == [False, False, False, True, True, True]


def test_sentencepiece_spaces():
    """A Metaspace tokenizer writes the space before the answer into its first token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([*TEXT, "[INST] hello [/INST] four"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = INST
    example = encode_conversation(tokenizer, chat("hello", "four two", "what", "two"))
    tokens = np.array(tokenizer.convert_ids_to_tokens(example.tokens.tolist()))
    assert "".join(tokens[example.loss_mask]) == "▁four▁two</s>▁two</s>"
    assert "".join(tokens) == "<s>[INST]▁hello▁[/INST]▁four▁two</s>[INST]▁what▁[/INST]▁two</s>"


def test_train_on_all():
    example = encode_conversation(TOKENIZERS["chatml"], chat("two", "four", "what"), train_on="all")
    assert (
        example.tokens.tolist()
        == encode_conversation(TOKENIZERS["chatml"], chat("two", "four")).tokens.tolist()
    )
    assert example.loss_mask.tolist() == [False] + [True] * 10


@pytest.mark.parametrize("sampled", [None, "four"])
def test_train_on_last(sampled):
    tokenizer = TOKENIZERS["chatml"]
    ids = None if sampled is None else encode(tokenizer, sampled)
    talk = chat("a", "four", "b", "four")
    example = encode_conversation(tokenizer, talk, train_on="last", completion_token_ids=ids)
    assert marked(tokenizer, example) == (
        f"{USER}a<|im_end|>\n{ASSISTANT}four<|im_end|>\n{USER}b<|im_end|>\n{ASSISTANT}«four<|im_end|>»"
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "inst", "plain", "smollm2"])
def test_sampled_ids_are_used_as_they_are(name):
    """Pitfall 13: ids that the text would not tokenise to."""
    tokenizer = TOKENIZERS[name]
    messages = chat("hello", "four", "what", "is two")
    prompt = encode(tokenizer, render_prompt(tokenizer, messages[:3]))
    ids = [i for letter in "is two" for i in encode(tokenizer, letter)]
    assert ids != encode(tokenizer, "is two")
    example = encode_conversation(tokenizer, messages, completion_token_ids=ids)
    assert example.tokens.tolist() == [*prompt, *ids, end_of_turn_id(tokenizer)]
    assert example.loss_mask[len(prompt) :].all()
    text = encode_conversation(tokenizer, messages)
    earlier = text.loss_mask[: len(prompt)]
    assert example.loss_mask[: len(prompt)].tolist() == earlier.tolist()
    assert pieces(tokenizer, example.tokens[: len(prompt)][earlier]).strip().startswith("four")

    cut = encode_conversation(tokenizer, messages, completion_token_ids=ids, complete=False)
    assert cut.tokens.tolist() == [*prompt, *ids]
    assert cut.loss_mask[len(prompt) :].all()


def test_sampled_ids_equal_the_text_where_they_agree():
    tokenizer = TOKENIZERS["smollm2"]
    messages = chat("hello", "four", "what", "is two plus two")
    ids = encode(tokenizer, "is two plus two")
    a = encode_conversation(tokenizer, messages)
    b = encode_conversation(tokenizer, messages, completion_token_ids=ids)
    assert (a.tokens.tolist(), a.loss_mask.tolist()) == (b.tokens.tolist(), b.loss_mask.tolist())


def test_sampled_ids_follow_the_prompt_they_were_sampled_from():
    """Pitfall 12: with thinking off the prompt ends in an empty thought, with thinking on it does not."""
    tokenizer = TOKENIZERS["qwen3"]
    messages = chat("a", "four")
    ids = encode(tokenizer, "four")
    head = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"

    def text(**options):
        return marked(tokenizer, encode_conversation(tokenizer, messages, **options))

    assert (
        text(completion_token_ids=ids, enable_thinking=False)
        == head + "<think>\n\n</think>\n\n«four<|im_end|>»"
    )
    assert text(completion_token_ids=ids) == head + "«four<|im_end|>»"
    assert text(enable_thinking=False) == head + "<think>\n\n</think>\n\n«four<|im_end|>»"
    assert text() == head + "«<think>\n\n</think>\n\nfour<|im_end|>»"


def test_a_cut_off_answer_has_no_end_of_turn():
    messages = chat("a", "b", "hello", "four")
    for name, expected in {"chatml": "b<|im_end|>four", "inst": " b</s> four", "plain": "bfour"}.items():
        tokenizer = TOKENIZERS[name]
        example = encode_conversation(tokenizer, messages, complete=False)
        assert pieces(tokenizer, example.tokens[example.loss_mask]) == expected
        assert example.loss_mask[-1]
    # The tokenizer leaves spaces out of its offsets; they are part of the answer all the same.
    example = encode_conversation(TOKENIZERS["chatml"], chat("a", "  two  "), complete=False)
    assert pieces(TOKENIZERS["chatml"], example.tokens[example.loss_mask]) == "  two  "


@pytest.mark.parametrize(
    ("name", "token"), [("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("plain", "</s>")]
)
def test_end_of_turn_id(name, token):
    assert TOKENIZERS[name].convert_ids_to_tokens(end_of_turn_id(TOKENIZERS[name])) == token


def test_render_prompt():
    tokenizer = TOKENIZERS["qwen3"]
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(tokenizer, chat("hi")) == head
    assert render_prompt(tokenizer, chat("hi"), enable_thinking=True) == head
    assert render_prompt(tokenizer, chat("hi"), enable_thinking=False) == head + "<think>\n\n</think>\n\n"


def test_a_developer_s_turn_is_the_system_s_where_a_template_does_not_know_it():
    """Many leave a role that they do not know out, and with it what is asked for."""
    known = "{% for m in messages if m.role in ROLES %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    messages = [{"role": "developer", "content": "be brief"}, *chat("hi")]
    for roles, role in (("system", "system"), ("developer", "developer")):
        tokenizer = byte_level(known.replace("ROLES", f"['user', '{roles}']"))
        assert render_prompt(tokenizer, messages) == f"[{role}] be brief\n[user] hi\n"
    assert messages[0]["role"] == "developer"


def test_a_turn_of_which_the_template_leaves_nothing_is_not_learnt():
    tokenizer = TOKENIZERS["qwen3"]  # drops the thoughts of earlier turns
    example = encode_conversation(tokenizer, chat("q", "<think>\nabc\n</think>\n\n", "r", "yes"))
    text = tokenizer.decode(example.tokens[example.loss_mask])
    assert "abc" not in tokenizer.decode(example.tokens) and text.endswith("yes<|im_end|>")
    assert text.count("<|im_end|>") == 1


def test_the_date_in_a_template_is_fixed():
    """Else a run that is resumed tomorrow trains on other tokens."""
    template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    )
    tokenizer = byte_level(template + "{{ date_string }}")
    assert render_prompt(tokenizer, chat("hi")) == "26 Jul 2024"
    for call in ("strftime_now('%d %B %Y')", 'strftime_now( format = "%d %B %Y" )'):
        assert render_prompt(byte_level("{{ " + call + " }}"), chat("hi")) == "26 July 2024"


def test_the_default_of_several_templates():
    tokenizer = byte_level("")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "x"}
    assert render_prompt(tokenizer, chat("hi")) == "hi"
    tokenizer.chat_template = {"default": "{{ strftime_now('%Y') }}", "tool_use": "x"}
    assert render_prompt(tokenizer, chat("hi")) == "2024"


def test_templates_without_a_default_are_none(tmp_path):
    tokenizer = byte_level("")
    tokenizer.chat_template = {"tool_use": "x"}
    with pytest.raises(UserError, match="has no chat template"):
        render_prompt(tokenizer, chat("hi"))
    data = tmp_path / "a.jsonl"
    data.write_text('{"question": "q", "answer": "a"}')
    with pytest.raises(UserError, match="has no chat template"):
        load_examples(str(data), tokenizer)
    assert stop_tokens({"eos_token_id": 7}, tokenizer) == tuple(sorted({7, tokenizer.eos_token_id}))


def test_encode_adds_no_special_tokens_and_encode_plain_does():
    tokenizer = byte_level(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = encode(tokenizer, "four")
    assert tokenizer.convert_ids_to_tokens(ids) == ["four"]
    assert encode_plain(tokenizer, "four") == [tokenizer.bos_token_id, *ids]
    example = encode_conversation(tokenizer, chat("a", "b"))
    assert tokenizer.bos_token_id not in example.tokens


MARKED = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"


def test_safe_in_threads():
    """Templates with generation markers too: transformers keeps their state in the shared template."""
    template = CHATML.replace("m.role + '\n' + m.content + '<|im_end|>\n' }}", "m.role + '\n' }}" + MARKED)
    assert "generation %}" in template
    tokenizer = byte_level(template, eos="<|im_end|>")
    conversations = [chat("hello", "four " * (i % 5), "x", "two") for i in range(200)]
    expected = [
        marked(TOKENIZERS["chatml"], encode_conversation(TOKENIZERS["chatml"], c)) for c in conversations
    ]
    with ThreadPoolExecutor(8) as pool:
        examples = list(pool.map(lambda c: encode_conversation(tokenizer, c), conversations))
    assert [marked(tokenizer, example) for example in examples] == expected


def test_fingerprint_is_about_behaviour(tmp_path):
    tokenizer = TOKENIZERS["smollm2"]
    fingerprint = fingerprint_of(tokenizer)
    assert len(fingerprint) == 64
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint_of(reloaded) == fingerprint
    reloaded.chat_template = "another"
    assert fingerprint_of(reloaded) == fingerprint
    reloaded.add_tokens(["<new>"])
    assert fingerprint_of(reloaded) != fingerprint


def test_fingerprint_sees_the_pre_tokenizer():
    """The same vocabulary and merges, other splits."""
    a, b = byte_level(CHATML), byte_level(CHATML)
    assert fingerprint_of(a) == fingerprint_of(b)
    b.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    assert a.get_vocab() == b.get_vocab()
    assert fingerprint_of(a) != fingerprint_of(b)


def no_template():
    tokenizer = byte_level(None)
    tokenizer.name_or_path = "some/base-model"
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "messages", "words"),
    [
        (no_template(), chat("a", "b"), "tokenizer some/base-model has no chat template: set tokenizer_path"),
        (TOKENIZERS["chatml"], chat("a"), "no assistant message"),
        (TOKENIZERS["chatml"], [], "conversation is empty"),
        (
            TOKENIZERS["chatml"],
            [{"role": "robot", "content": "a"}],
            "message 0 .counted from 0. has the unknown role 'robot'",
        ),
        (TOKENIZERS["chatml"], [{"content": "a"}], "message 0 .counted from 0. has the unknown role None"),
        (
            TOKENIZERS["chatml"],
            [{"role": "user", "content": None}],
            r"message 0 \(user, counted from 0\) has no text",
        ),
        (TOKENIZERS["gemma"], chat("a", "b")[::-1], "refuses the conversation: roles must alternate"),
        (byte_level("{{ messages[9].content }}"), chat("a", "b"), "chat template refuses the conversation"),
        (
            byte_level(CHATML.replace("m.content", "m.content | upper")),
            chat("a", "b"),
            r"message 1 \(assistant, counted from 0\) is not in the text",
        ),
    ],
)
def test_mistakes_are_one_sentence(tokenizer, messages, words):
    with pytest.raises(UserError, match=words):
        encode_conversation(tokenizer, messages)


def test_no_end_token_at_all():
    tokenizer = byte_level(PLAIN, eos=None)
    with pytest.raises(UserError, match="set its eos_token"):
        encode_conversation(tokenizer, chat("a", "b"))
