"""The server teacher against a small server on loopback that fails on demand."""

import email.utils
import gc
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small
from fake_server import STOP_TOKEN, FakeServer, Fault, running

from distillax.errors import UserError
from distillax.teachers import Completion, Request, SamplingParams, endpoint
from distillax.teachers import server as teachers_server
from distillax.teachers.endpoint import open_endpoint, request_seed
from distillax.teachers.server import ServerTeacher

SAMPLING = SamplingParams(max_new_tokens=32, max_length=128, seed=7, stop_token_ids=(STOP_TOKEN,))


@pytest.fixture(autouse=True)
def no_leaks():
    """Every test leaves no thread and no warning behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        gc.collect()
    assert [t.name for t in threading.enumerate() if t.name.startswith("distillax")] == []


def make_requests(count: int) -> list[Request]:
    return [
        Request(f"p{i}", 0, [{"role": "user", "content": f"question {i}"}], f"<user>question {i}", [1, i, 9])
        for i in range(count)
    ]


def make_teacher(*servers: FakeServer | str, **options) -> ServerTeacher:
    urls = [s if isinstance(s, str) else s.url for s in servers]
    return ServerTeacher(urls, **{"backoff_s": 0.005, "timeout_s": 5.0} | options)


def answer(teacher: ServerTeacher, requests: list[Request], sampling=SAMPLING) -> dict[str, Completion]:
    with teacher:
        completions = list(teacher.generate(requests, sampling))
    by_id = {c.prompt_id: c for c in completions}
    assert len(by_id) == len(completions)
    assert set(by_id) == {r.prompt_id for r in requests}
    return by_id


def dead_url() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def test_vllm_gets_token_ids_and_gives_them():
    with running(FakeServer()) as server:
        sampling = replace(SAMPLING, top_k=20, logprobs=True, temperature=0.7, top_p=0.9)
        (completion,) = answer(make_teacher(server), make_requests(1), sampling).values()
        ((path, body),) = server.bodies
    assert path == "/v1/completions"
    assert body["prompt"] == [1, 0, 9]
    assert body["stop_token_ids"] == [STOP_TOKEN]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 20)
    assert (body["max_tokens"], body["model"]) == (32, "fake")
    assert body["seed"] == request_seed(7, "p0", 0)
    assert completion == Completion("p0", 0, "text:[1, 0, 9]", "stop", 5, 2, [10, 11], [-0.5, -0.25])


def test_half_a_character_is_replaced():
    """JSON can say it, and neither UTF-8 nor Arrow can."""
    choice = {"text": "a \ud83d b \U0001f600", "finish_reason": "stop"}
    raw = Fault(200, raw=json.dumps({"choices": [choice]}).encode())
    with running(FakeServer(fault=lambda *_: raw)) as server:
        (completion,) = answer(make_teacher(server), make_requests(1)).values()
    assert completion.text == "a \ufffd b \U0001f600"


def test_ids_of_a_cut_off_answer_are_all_kept():
    with running(FakeServer(finish_reason="length")) as server:
        (completion,) = answer(make_teacher(server), make_requests(1)).values()
    assert (completion.finish_reason, completion.token_ids) == ("length", [10, 11, STOP_TOKEN])
    assert completion.completion_tokens == 3


@pytest.mark.parametrize("thinking", [None, False])
def test_other_servers_get_messages(thinking):
    with running(FakeServer(owned_by="someone")) as server:
        teacher = make_teacher(server, enable_thinking=thinking)
        (completion,) = answer(teacher, make_requests(1), replace(SAMPLING, logprobs=True)).values()
        ((path, body),) = server.bodies
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "question 0"}]
    assert not {"stop_token_ids", "top_k", "return_token_ids"} & set(body)
    assert body.get("chat_template_kwargs") == (None if thinking is None else {"enable_thinking": False})
    assert completion == Completion("p0", 0, "chat:question 0", "stop", 5, 3, None, [-0.5])


def test_other_servers_get_text_without_a_template():
    with running(FakeServer(owned_by="someone")) as server:
        (completion,) = answer(make_teacher(server, use_chat_template=False), make_requests(1)).values()
        assert server.bodies[0][0] == "/v1/completions"
    assert completion.text == "text:<user>question 0"


def test_length_limits():
    requests = [
        replace(r, prompt_token_ids=[1] * n)
        for r, n in zip(make_requests(4), [10, 90, 100, 128], strict=True)
    ]
    with running(FakeServer(max_model_len=110)) as server:
        by_id = answer(make_teacher(server), requests)
        asked = {len(body["prompt"]): body["max_tokens"] for _, body in server.bodies}
    assert asked == {10: 32, 90: 20, 100: 10}
    assert by_id["p3"].finish_reason == "error"
    assert "128 tokens" in (by_id["p3"].error or "")
    assert [by_id[p].finish_reason for p in ("p0", "p1", "p2")] == ["stop"] * 3


def test_balanced_over_two_urls_with_many_in_flight():
    with running(FakeServer(gather=8)) as a, running(FakeServer(gather=8)) as b:
        answer(make_teacher(a, b, max_in_flight=8), make_requests(64))
    assert len(a.bodies) + len(b.bodies) == 64
    assert min(len(a.bodies), len(b.bodies)) >= 16
    assert a.busiest == b.busiest == 8  # the limit is reached, and kept


def test_the_less_busy_url_gets_more():
    with running(FakeServer()) as fast, running(FakeServer()) as slow:
        slow.fault = lambda body, n: fast.wait_until(lambda s: len(s.bodies) >= 40)
        answer(make_teacher(fast, slow, max_in_flight=4), make_requests(48))
    assert len(fast.bodies) >= 40


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(as_date):
    seen: list[float] = []

    def fault(body, n):
        seen.append(time.time())
        wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
        return Fault(429, "slow down", {"Retry-After": wait}) if n == 0 else None

    with running(FakeServer(fault=fault)) as server:
        by_id = answer(make_teacher(server), make_requests(1))
    assert by_id["p0"].finish_reason == "stop"
    assert len(seen) == 2
    assert seen[1] - seen[0] >= (0.9 if as_date else 0.39)  # HTTP dates have whole seconds


def test_busy_servers_cost_no_request_its_retries():
    # Three of four are refused, for ever: with retries counted for each request, some would fail.
    with running(FakeServer(fault=lambda body, n: Fault(429) if n % 4 else None)) as server:
        by_id = answer(make_teacher(server, max_retries=3), make_requests(40))
    assert Counter(c.finish_reason for c in by_id.values()) == {"stop": 40}


def test_server_errors_are_retried():
    with running(FakeServer(fault=lambda body, n: Fault(503) if n % 3 == 1 else None)) as server:
        by_id = answer(make_teacher(server), make_requests(30))
        assert len(server.bodies) > 30
    assert Counter(c.finish_reason for c in by_id.values()) == {"stop": 30}


def test_time_outs_are_retried():
    with running(FakeServer(fault=lambda body, n: Fault(hang_s=1.0) if n in (0, 3) else None)) as server:
        by_id = answer(make_teacher(server, timeout_s=0.25), make_requests(6))
        assert len(server.bodies) == 8
    assert Counter(c.finish_reason for c in by_id.values()) == {"stop": 6}


@pytest.mark.parametrize(
    ("given", "longest", "seconds"),
    [(None, 256, 600), (None, 3000, 600), (None, 8192, 1638.4), (5.0, 8192, 5)],
)
def test_a_request_has_the_time_that_its_longest_answer_takes(given, longest, seconds, monkeypatch):
    times = []

    def opened(base, api_key, timeout_s, limit):
        times.append(timeout_s)
        return open_endpoint(base, api_key, timeout_s, limit)

    monkeypatch.setattr(teachers_server, "open_endpoint", opened)
    with running(FakeServer()) as server:
        sampling = replace(SAMPLING, max_new_tokens=longest)
        answer(make_teacher(server, timeout_s=given), make_requests(1), sampling)
    assert times == [seconds]


@pytest.mark.parametrize(("status", "times"), [(400, 1), (422, 1), (500, 4), (404, 1)])
def test_a_permanent_failure_is_that_request_s_alone(status, times):
    def fault(body, n):
        return Fault(status, "cannot do {key}") if body["prompt"][1] == 5 else None

    with running(FakeServer(fault=fault)) as server:
        by_id = answer(
            make_teacher(server, max_retries=3, api_key="sk-secret", max_in_flight=2), make_requests(12)
        )
        assert sum(body["prompt"][1] == 5 for _, body in server.bodies) == times
    failed = by_id.pop("p5")
    assert (failed.finish_reason, failed.text, failed.token_ids) == ("error", "", None)
    assert failed.error == f"{server.url} answered HTTP {status}: cannot do Bearer ***"
    assert Counter(c.finish_reason for c in by_id.values()) == {"stop": 11}


@pytest.mark.parametrize("finish_reason", ["content_filter", None])
def test_an_answer_without_a_proper_end_is_an_error(finish_reason):
    with running(FakeServer(finish_reason=finish_reason)) as server:
        (completion,) = answer(make_teacher(server), make_requests(1)).values()
    assert completion.finish_reason == "error"
    assert repr(finish_reason) in (completion.error or "")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_beside_an_answer_are_not_lost_in_silence(name):
    choice = {"message": {"content": "4", name: "2 and 2"}, "finish_reason": "stop"}
    raw = Fault(200, raw=json.dumps({"choices": [choice]}).encode())
    thinks = FakeServer(owned_by="someone", fault=lambda *_: raw)
    with running(thinks) as server, pytest.raises(UserError, match="thoughts apart from the answer"):
        answer(make_teacher(server), make_requests(1))
    choice["message"][name] = "\n\n"  # of a template that leaves them empty
    raw = Fault(200, raw=json.dumps({"choices": [choice]}).encode())
    with running(FakeServer(owned_by="someone", fault=lambda *_: raw)) as server:
        (completion,) = answer(make_teacher(server), make_requests(1)).values()
    assert completion.text == "4"


def test_a_dead_url_is_left_for_the_other():
    with running(FakeServer()) as server:
        by_id = answer(make_teacher(dead_url(), server), make_requests(40))
        assert len(server.bodies) == 40
    assert Counter(c.finish_reason for c in by_id.values()) == {"stop": 40}


def test_a_server_that_loads_its_model_is_waited_for():
    with running(FakeServer(loading=4)) as server:
        by_id = answer(make_teacher(dead_url(), server, max_retries=6), make_requests(5))
    assert Counter(c.finish_reason for c in by_id.values()) == {"stop": 5}


def test_a_server_that_loads_its_model_for_ever_is_given_up():
    error = pytest.raises(UserError, match="no teacher server answers .*HTTP 503: loading model")
    with running(FakeServer(loading=1000)) as server, error:
        answer(make_teacher(server, backoff_s=1e-5), make_requests(5))
    assert 1000 - server.loading == teachers_server.HOPELESS_AFTER


def test_a_url_that_dies_on_the_way_is_left_for_the_other():
    with running(FakeServer()) as good, running(FakeServer()) as bad:
        bad.fault = lambda body, n: Fault(500) if n >= 10 else None
        by_id = answer(make_teacher(good, bad, max_in_flight=4, backoff_s=0.05), make_requests(200))
    assert Counter(c.finish_reason for c in by_id.values()) == {"stop": 200}
    assert len(good.bodies) > 150 > 50 > len(bad.bodies)


def test_no_server_at_all_is_the_user_s_error(caplog):
    url = dead_url()
    with pytest.raises(UserError, match=f"no teacher server answers.*{url}"):
        answer(make_teacher(url, max_retries=3), make_requests(20))
    assert any(url in record.getMessage() for record in caplog.records)


def test_servers_never_there_are_told_at_once_and_those_that_died_are_waited_for(caplog):
    urls = [dead_url(), dead_url()]
    with pytest.raises(UserError, match="no teacher server answers"):
        answer(make_teacher(*urls), make_requests(20))
    assert len(caplog.records) < 2 * make_teacher(*urls).max_retries
    caplog.clear()
    with running(FakeServer()) as server, make_teacher(server, backoff_s=0.001) as teacher:
        (found,) = teacher.generate(make_requests(1), SAMPLING)
        assert found.finish_reason == "stop"
        teacher.urls = (dead_url(),)  # another call, and nobody is there any more
        with pytest.raises(UserError, match="no teacher server answers"):
            list(teacher.generate(make_requests(9), SAMPLING))
    assert len(caplog.records) == teacher.max_retries


def test_a_server_that_says_nothing_is_named_while_it_is_waited_for(caplog, monkeypatch):
    """It takes connections, as one does that hangs, or a proxy before one that is gone."""
    monkeypatch.setattr(teachers_server, "PATIENCE_S", 0.05)
    monkeypatch.setattr(endpoint, "_DISCOVERY_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=f"no teacher server answers .*{url} did not answer in time"):
            answer(make_teacher(url), make_requests(2))
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"waiting for {url}, which has not said yet what it serves"
    assert [line.partition(";")[0] for line in said[1:]] == [f"{url} did not answer in time"] * 2
    caplog.clear()
    monkeypatch.setattr(teachers_server, "PATIENCE_S", 1.0)
    with running(FakeServer(fault=lambda body, n: time.sleep(1.2))) as server:  # one that said it is not
        answer(make_teacher(server), make_requests(2))
    assert not caplog.records


def test_a_server_that_only_fails_is_not_asked_for_ever():
    with running(FakeServer(fault=lambda body, n: Fault(500, "broken"))) as server:
        with pytest.raises(UserError, match="16 requests in a row.*HTTP 500: broken"):
            answer(make_teacher(server, max_retries=1, max_in_flight=4), make_requests(400))
        assert len(server.bodies) < 100


def test_a_wrong_key_is_the_user_s_error_and_never_shown(caplog):
    caplog.set_level(logging.DEBUG, logger="distillax")
    with running(FakeServer(key="right")) as server:
        teacher = make_teacher(server, api_key="sk-wrong")
        with pytest.raises(UserError, match=f"{server.url} answered HTTP 401.*OPENAI_API_KEY") as caught:
            answer(teacher, make_requests(3))
        assert server.bodies == []
        answer(make_teacher(server, api_key="right"), make_requests(3))
    shown = [str(caught.value), repr(caught.value), repr(teacher), str(vars(caught.value)), caplog.text]
    assert not any("sk-wrong" in text for text in shown)


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    with running(FakeServer(key="right")) as server:
        answer(make_teacher(server), make_requests(1))


@pytest.mark.parametrize(("status", "hint"), [(404, "model's name"), (403, "key"), (401, "key")])
def test_a_refusal_of_the_first_request_is_the_user_s_error(status, hint):
    with running(FakeServer(fault=lambda body, n: Fault(status, "no"))) as server:
        teacher = make_teacher(server)
        with pytest.raises(UserError, match=f"{server.url} answered HTTP {status}: no.*{hint}"):
            answer(teacher, make_requests(5))


def of_length(tokens: int) -> list[Request]:
    return [replace(r, prompt_token_ids=[1, i] + [9] * (tokens - 2)) for i, r in enumerate(make_requests(12))]


def rooms(*servers: FakeServer) -> list[set[int]]:
    """Of each server, how long it was told that answers may be."""
    return [{body["max_tokens"] for _, body in server.bodies} for server in servers]


def hold_until_told(caplog, words: str):
    """No answer before the log has the words."""

    def fault(body, n):
        until = time.monotonic() + 10
        while not any(words in told for told in caplog.messages) and time.monotonic() < until:
            time.sleep(0.01)

    return fault


LONG = replace(SAMPLING, max_new_tokens=100, max_length=4000)


def test_the_least_window_is_every_server_s(caplog):
    """An answer does not depend on which of them was free. Who is still loading at first counts, too."""
    with running(FakeServer(max_model_len=50, gather=4)) as a, running(FakeServer(gather=4)) as b:
        a.loading = b.loading = 1
        teacher = make_teacher(a, b, dead_url(), max_in_flight=4)
        found = answer(teacher, of_length(3), LONG)
        assert all(c.finish_reason == "stop" for c in found.values())
        assert rooms(a, b) == [{47}, {47}] and teacher.window() == 50
    (told,) = [s for s in caplog.messages if "room" in s]
    assert told == f"{a.url} has room for 50 tokens, less than other teacher servers: none is asked for more"


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_server_that_comes_later_with_less_is_left_out(asked_before, caplog):
    """It would swallow what the others can answer: it fails at once, and so is always free."""
    with running(FakeServer(max_model_len=120)) as first, running(FakeServer(max_model_len=40)) as late:
        first.fault = hold_until_told(caplog, "left out")
        late.loading = teachers_server.LEFT_AFTER + 2
        with make_teacher(first, late, max_in_flight=2) as teacher:
            assert not asked_before or teacher.window() == 120
            for _ in range(2):
                found = list(teacher.generate(of_length(60), LONG))
                assert [c.finish_reason for c in found] == ["stop"] * 12
    assert rooms(first, late) == [{60}, set()]
    (told,) = [s for s in caplog.messages if "room" in s]
    assert told == (
        f"{late.url} has room for 40 tokens, 120 are asked for: it is left out of this run; start it with "
        "more to use it"
    )


def test_less_room_is_no_matter_where_all_has_room(caplog):
    with running(FakeServer(max_model_len=400)) as first, running(FakeServer(max_model_len=40)) as late:
        first.fault = lambda body, n: late.wait_until(lambda s: len(s.bodies) > 3)
        late.loading = teachers_server.LEFT_AFTER + 2
        answer(make_teacher(first, late, max_in_flight=2), of_length(8), SAMPLING)
    assert rooms(first, late) == [{32}, {32}]
    assert "room" not in caplog.text


def test_texts_that_no_server_has_room_for_are_told_at_once(caplog):
    texts = of_length(10) + of_length(60)
    with running(FakeServer(max_model_len=60)) as server, pytest.raises(UserError) as caught:
        list(make_teacher(server).score(texts, 4))
    assert str(caught.value) == (
        f"{server.url} has room for 60 tokens, 61 are asked for: start it with that many or more (a capture "
        "of fewer begins in another folder)"
    )
    assert not server.bodies and not caplog.records


def test_a_silent_server_holds_up_no_request(caplog, monkeypatch):
    monkeypatch.setattr(teachers_server, "PATIENCE_S", 1.0)
    with running(FakeServer()) as server, socket.create_server(("127.0.0.1", 0)) as silent:
        url, begun = f"http://127.0.0.1:{silent.getsockname()[1]}/v1", time.monotonic()
        found = answer(make_teacher(url, server), make_requests(12))
        assert time.monotonic() - begun < endpoint._DISCOVERY_TIMEOUT_S / 2
    assert Counter(c.finish_reason for c in found.values()) == {"stop": 12}
    assert caplog.messages == [f"waiting for {url}, which has not said yet what it serves"]


def test_models_that_are_not_there():
    with running(FakeServer(model="a")) as a, running(FakeServer(model="b")) as b:
        with pytest.raises(UserError, match="serves 'a', not 'c'"):
            answer(make_teacher(a, model="c"), make_requests(1))
        with pytest.raises(UserError, match="must serve the same model"):
            answer(make_teacher(a, b), make_requests(8))


@pytest.mark.parametrize("urls", [[], ["localhost:8000"], ["ftp://host"], ["http://u:secret@host/v1"]])
def test_bad_urls(urls):
    with pytest.raises(UserError) as caught:
        ServerTeacher(urls)
    assert "secret" not in str(caught.value)


def test_seeds_depend_on_seed_prompt_and_generation_only():
    assert request_seed(7, "p0", 0) == 1791150703  # pinned: data sets must be reproducible across versions
    seeds = {request_seed(s, p, g) for s in (0, 1) for p in ("a", "b", "a\x001") for g in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)

    def sent(requests: list[Request]) -> dict[int, int]:
        with running(FakeServer()) as server:
            answer(make_teacher(server, max_in_flight=3), requests)
            return {body["prompt"][1]: body["seed"] for _, body in server.bodies}

    requests = make_requests(10)
    assert sent(requests) == sent(requests[::-1])


@pytest.mark.parametrize("raw", [b"", b"<html>busy</html>", b'{"choices": [', b"\xff\xfe", b"[]"])
def test_a_body_that_is_no_answer_is_tried_again(raw):
    """As whatever a server that is out of order sends: the request, and the run, go on."""
    fake = FakeServer(fault=lambda body, n: Fault(200, raw=raw) if n == 1 else None)
    with running(fake) as server, make_teacher(server) as teacher:
        found = list(teacher.generate(make_requests(3), SAMPLING))
    assert [c.finish_reason for c in found] == ["stop"] * 3 and len(server.bodies) == 4


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"choices": []}, "without a choice"),
        ({"choices": [{"finish_reason": "stop", "text": "x", "token_ids": 3}]}, "without a choice"),
        ({"choices": [{"finish_reason": "stop", "text": "x"}], "usage": [1]}, "without a choice"),
        ({"choices": [{"finish_reason": "content_filter"}]}, "ended the answer with 'content_filter'"),
    ],
)
def test_an_answer_that_cannot_be_read_fails_alone(answer, words):
    fault = Fault(200, raw=json.dumps(answer).encode())
    fake = FakeServer(fault=lambda body, n: fault if n == 1 else None)
    with running(fake) as server, make_teacher(server) as teacher:
        found = list(teacher.generate(make_requests(3), SAMPLING))
    (failed,) = (c for c in found if c.finish_reason == "error")
    assert words in failed.error and len(found) == 3


def test_json_by_another_name_and_no_usage():
    answer = {"choices": [{"finish_reason": "stop", "text": "x"}], "usage": {"completion_tokens": None}}
    fault = Fault(200, raw=json.dumps(answer).encode(), content_type="text/plain")
    with running(FakeServer(fault=lambda body, n: fault)) as server, make_teacher(server) as teacher:
        (found,) = teacher.generate(make_requests(1), SAMPLING)
    assert (found.text, found.completion_tokens) == ("x", 0)


def test_answers_come_as_they_finish():
    others_came, order = threading.Event(), []

    def hold_the_first(body, n):
        if body["prompt"][1] == 0:
            assert others_came.wait(60)

    with running(FakeServer(fault=hold_the_first)) as server, make_teacher(server) as teacher:
        for completion in teacher.generate(make_requests(5), SAMPLING):
            order.append(completion.prompt_id)
            if len(order) == 4:
                others_came.set()
    assert order[-1] == "p0"


def test_no_requests():
    with make_teacher(dead_url()) as teacher:
        assert list(teacher.generate([], SAMPLING)) == []


@pytest.mark.parametrize("way", ["close", "teacher exit"])
def test_early_close_cancels_what_is_in_flight(way):
    with running(FakeServer()) as server:
        server.fault = lambda body, n: server.wait_until(lambda s: False, 1.0) if n > 4 else None
        with make_teacher(server, max_in_flight=4) as teacher:
            answers = teacher.generate(make_requests(400), SAMPLING)
            next(answers)
            if way == "close":
                answers.close()
                assert not any(t.name.startswith("distillax") for t in threading.enumerate())
        asked = len(server.bodies)
        assert asked <= 9
        time.sleep(0.2)
        assert len(server.bodies) == asked
        if way == "teacher exit":
            with pytest.raises(RuntimeError, match="closed before"):
                list(answers)


def test_ctrl_c_cancels_what_is_in_flight():
    """In a process of its own, whose interrupts nobody else can swallow."""
    program = (
        "import sys; from test_server import answer, make_requests, make_teacher;"
        "answer(make_teacher(sys.argv[1], timeout_s=60.0), make_requests(4))"
    )
    with running(FakeServer(gather=5, patience_s=60)) as server:  # four requests never get an answer
        child = subprocess.Popen(
            [sys.executable, "-c", program, server.url],
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        server.wait_until(lambda s: s.busiest == 4, 60)
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
        assert time.monotonic() - started < 30
        assert "KeyboardInterrupt" in errors and child.returncode != 0, errors
        assert len(server.bodies) == 4


def test_sigterm_ends_a_generation_in_a_sentence(tmp_path):
    """What had finished is kept, and the exit code is that of the signal, which launch files wait for."""
    words = {
        "--engine": "server",
        "--teacher-model": small.chat_model("qwen3", tmp_path / "teacher"),
        "--dataset-path": small.questions(tmp_path / "prompts.jsonl", 5),
        "--output-file": tmp_path / "out.parquet",
    }
    with running(FakeServer()) as server:
        server.fault = lambda body, n: server.wait_until(lambda s: False, 8) if n > 1 else None
        command = [sys.executable, "-m", "distillax", "generate", "--teacher-url", server.url]
        command += [str(word) for pair in words.items() for word in pair]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        server.wait_until(lambda s: len(s.bodies) == 5, 60)
        time.sleep(2)  # for the two answers
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM; 2 of 5 answers are kept in " in errors and "Traceback" not in errors
    (shard,) = (tmp_path / "out.parquet.shards").glob("*.parquet")
    assert pq.read_table(shard).num_rows == 2
