"""One OpenAI-compatible URL: which model it serves, and how to ask it for one answer."""

import email.utils
import hashlib
import ipaddress
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import openai

from distillax.errors import UserError
from distillax.teachers import Completion, Request, SamplingParams

ENDLESS = sys.maxsize  # the window of a server that does not say how many tokens it has room for
NO_KEY = "none"  # the client insists on a key; servers without keys ignore it
_DISCOVERY_TIMEOUT_S = 20.0
_THOUGHTS = ("reasoning_content", "reasoning")  # where servers put what comes before the answer
_FINISH_REASONS = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
}


class RequestError(Exception):
    """One request failed. `kind` says whose fault it is and so what to do next:

    "connection": no server there; "busy": it asks for fewer requests (429); "server": it answered 5xx;
    "timeout": it did not answer; "refused": 401, 403 or 404; "request": this very request cannot be answered.
    `retry_after` is the pause the server asked for, in seconds.
    """

    def __init__(self, kind: str, reason: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(reason)
        self.kind, self.reason, self.status, self.retry_after = kind, reason, status, retry_after


@dataclass
class Endpoint:
    """A URL, its client, and how it has fared so far (changed by the scheduler in server.py)."""

    url: str  # holds no secret, so it may be printed
    client: openai.AsyncOpenAI
    limit: int  # most requests in flight, lowered while the server says it is busy
    api_key: str = field(repr=False)
    model: str | None = None
    is_vllm: bool = False
    window: int = ENDLESS  # tokens of a prompt and its answer together
    in_flight: int = 0
    answered: int = 0
    failures: int = 0  # rounds in a row; requests that fail together are one round
    rounds: int = 0
    rest_until: float = 0.0  # event-loop time
    discovered: bool = False


def base_url(url: str) -> str:
    """`url` ready for a client: a bare host gets the usual path /v1. Raises UserError if it is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"teacher URL {url.rpartition('@')[2]!r} is not like http://localhost:8000/v1")
    if parts.query or parts.username:
        address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        raise UserError(f"teacher URL {address} has a user name or a query: give a key as OPENAI_API_KEY")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1", fragment=""))


def open_endpoint(base: str, api_key: str, timeout_s: float, limit: int) -> Endpoint:
    """An endpoint for a `base_url`, for at most `limit` requests at once. The caller closes its client."""
    client = openai.AsyncOpenAI(
        base_url=base,
        api_key=api_key,
        max_retries=0,
        timeout=openai.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
        # A proxy from the environment cannot reach this machine's own loopback.
        http_client=openai.DefaultAsyncHttpxClient(trust_env=not _is_loopback(urlsplit(base).hostname or "")),
    )
    return Endpoint(base, client, limit, api_key)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def discover(endpoint: Endpoint, model: str | None) -> None:
    """Finds the model's name, its window, and whether this is vLLM, from /v1/models.

    Raises UserError if no model can be chosen, RequestError if the server fails.
    """
    served = await _served_models(endpoint, needed=model is None)
    endpoint.is_vllm = any(m.get("owned_by") == "vllm" for m in served)
    entry = next((m for m in served if m["id"] == model), None)
    if model is None:
        bases = [m for m in served if not m.get("parent")]  # a LoRA adapter names its parent
        if len(bases) != 1:
            raise UserError(f"{endpoint.url} serves {_names(bases)}: name the teacher model to use")
        entry = bases[0]
    if entry is None and endpoint.is_vllm:
        raise UserError(f"{endpoint.url} serves {_names(served)}, not {model!r}: name one that it serves")
    endpoint.model = model if entry is None else entry["id"]
    endpoint.window = (entry or {}).get("max_model_len") or ENDLESS
    endpoint.discovered = True


async def _served_models(endpoint: Endpoint, needed: bool) -> list[dict[str, Any]]:
    try:
        raw = await endpoint.client.models.with_raw_response.list(timeout=_DISCOVERY_TIMEOUT_S)
        data = json.loads(raw.text)["data"]
        return [m for m in data if isinstance(m["id"], str)]
    except openai.APIStatusError as error:
        if error.status_code in (404, 405, 501) and not needed:
            return []  # some hosts have no list; the first request tells whether the model is there
        if error.status_code in (404, 405, 501):
            raise UserError(f"{endpoint.url} does not list its models: name the teacher model") from None
        raise request_error(error, endpoint) from None
    except openai.APITimeoutError:
        raise RequestError("connection", f"{endpoint.url} did not answer in time") from None
    except openai.OpenAIError as error:
        raise request_error(error, endpoint) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{endpoint.url}/models is no OpenAI-compatible answer: check the URL") from None


def _names(models: list[dict[str, Any]]) -> str:
    names = [repr(m["id"]) for m in models]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "no model"


def request_seed(seed: int, prompt_id: str, generation: int) -> int:
    """A 31-bit seed that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{generation}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is put to a server that does not take token ids."""

    use_chat_template: bool = True
    enable_thinking: bool | None = None


async def ask(
    endpoint: Endpoint, request: Request, room: int, sampling: SamplingParams, form: PromptFormat
) -> Completion:
    """One answer from one discovered endpoint, with its prompt `room` tokens at most. Raises RequestError."""
    length = len(request.prompt_token_ids)
    max_tokens = min(sampling.max_new_tokens, room - length)
    if max_tokens < 1:
        raise RequestError(
            "request", f"a prompt of {length} tokens leaves no room for an answer within {room}"
        )
    as_ids = endpoint.is_vllm and bool(request.prompt_token_ids)
    chat = form.use_chat_template and not as_ids
    body = _body(endpoint, request, sampling, max_tokens, chat)
    if chat:
        body["messages"] = request.messages
        if form.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": form.enable_thinking}
    else:  # as ids: with the same template and BOS as everywhere else
        body["prompt"] = request.prompt_token_ids if as_ids else request.prompt_text
    answer = await post(endpoint, "/chat/completions" if chat else "/completions", body)
    return _completion(endpoint, request, answer, chat)


async def post(endpoint: Endpoint, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON of the server's answer. Raises RequestError.

    The client's own methods look at every item of what they send and receive, such as token ids, which takes
    as long as all else that a request costs here.
    """
    try:
        answer = await endpoint.client.post(path, cast_to=object, body=body)
        if isinstance(answer, str):  # so it is if the server does not say that it is JSON
            answer = json.loads(answer)
    except openai.OpenAIError as error:
        raise request_error(error, endpoint) from None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RequestError("server", f"{endpoint.url} sent a body that is not JSON")
    return answer


def _body(
    endpoint: Endpoint, request: Request, sampling: SamplingParams, max_tokens: int, chat: bool
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": endpoint.model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request_seed(sampling.seed, request.prompt_id, request.generation),
    }
    if endpoint.is_vllm:
        # Penalties are sent because vLLM takes those that are not from the model's generation config.
        body |= {
            "return_token_ids": True,
            "stop_token_ids": list(sampling.stop_token_ids),
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": True,
        }
    elif sampling.top_k:
        body["top_k"] = sampling.top_k
    # OpenAI's own newer models refuse the older name; other servers may not know the newer one.
    new_name = chat and urlsplit(endpoint.url).hostname == "api.openai.com"
    body["max_completion_tokens" if new_name else "max_tokens"] = max_tokens
    if sampling.logprobs:
        body["logprobs"] = True if chat else 0 if endpoint.is_vllm else 1
    return body


def _completion(endpoint: Endpoint, request: Request, answer: dict[str, Any], chat: bool) -> Completion:
    try:
        choice = answer["choices"][0]
        ended = choice.get("finish_reason")
        finish_reason = _FINISH_REASONS.get(ended or "")
        if finish_reason is None:
            raise RequestError("request", f"{endpoint.url} ended the answer with {ended!r}")
        if chat and any((choice["message"].get(name) or "").strip() for name in _THOUGHTS):
            raise UserError(
                f"{endpoint.url} gives thoughts apart from the answer, which would be lost; start it without "
                "reasoning parser, or ask without them (--no-enable-thinking, generate.enable_thinking=false)"
            )
        text = (choice["message"].get("content") if chat else choice["text"]) or ""
        # Half a surrogate pair is text in JSON, and nowhere else.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        token_ids: list[int] | None = choice.get("token_ids")
        logprobs = _logprobs(choice.get("logprobs"), chat)
        # vLLM returns the stop token among the ids; a stop string would show in stop_reason.
        stop_token = finish_reason == "stop" and not isinstance(choice.get("stop_reason"), str)
        if endpoint.is_vllm and stop_token:
            token_ids = token_ids[:-1] if token_ids else token_ids
            logprobs = logprobs[:-1] if logprobs else logprobs
        usage = answer.get("usage") or {}
        prompt_tokens = usage.get("prompt_tokens") or len(request.prompt_token_ids)
        completion_tokens = len(token_ids) if token_ids is not None else usage.get("completion_tokens") or 0
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestError("request", f"{endpoint.url} answered without a choice that can be read") from None
    return Completion(
        request.prompt_id,
        request.generation,
        text,
        finish_reason,
        prompt_tokens,
        completion_tokens,
        token_ids,
        logprobs,
    )


def failed(request: Request, failure: RequestError) -> Completion:
    """What takes the place of an answer that cannot be had."""
    return Completion(
        request.prompt_id,
        request.generation,
        text="",
        finish_reason="error",
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=0,
        error=failure.reason,
    )


def _logprobs(logprobs: dict[str, Any] | None, chat: bool) -> list[float] | None:
    if logprobs is None:
        return None
    if chat:
        return [entry["logprob"] for entry in logprobs.get("content") or []]
    return logprobs.get("token_logprobs")


def request_error(error: openai.OpenAIError, endpoint: Endpoint) -> RequestError:
    # A server that does not even take the connection is gone, not slow.
    if isinstance(error, openai.APITimeoutError) and type(error.__cause__).__name__ != "ConnectTimeout":
        return RequestError("timeout", f"{endpoint.url} did not answer in time")
    if isinstance(error, openai.APIConnectionError):
        cause = f" ({_clean(error.__cause__, endpoint)})" if error.__cause__ else ""
        return RequestError("connection", f"cannot reach {endpoint.url}{cause}")
    if not isinstance(error, openai.APIStatusError):
        return RequestError("request", f"{endpoint.url}: {_clean(error, endpoint)}")
    status = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    # openai unwraps {"error": {...}}; some servers put the message elsewhere.
    detail = body.get("message") or body.get("detail") or body.get("error") or error.message
    reason = f"{endpoint.url} answered HTTP {status}: {_clean(detail, endpoint)}"
    if status == 429:
        kind = "busy"
    elif status >= 500 or status in (408, 409):
        kind = "server"
    else:
        kind = "refused" if status in (401, 403, 404) else "request"
    return RequestError(kind, reason, status, _retry_after(error.response.headers.get("retry-after")))


def _retry_after(header: str | None) -> float | None:
    """Seconds from a Retry-After header: a number, or an HTTP date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _clean(text: object, endpoint: Endpoint) -> str:
    """One short line without the key, even if the server or the client repeats it."""
    line = " ".join(str(text).split())
    if endpoint.api_key != NO_KEY:
        line = line.replace(endpoint.api_key, "***")
    return line if len(line) <= 300 else line[:297] + "..."
