"""A teacher behind one or several OpenAI-compatible URLs."""

import asyncio
import contextlib
import logging
import os
import queue
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any

from distillax.errors import UserError
from distillax.teachers import Completion, Request, SamplingParams, Working, untold
from distillax.teachers.endpoint import (
    ENDLESS,
    NO_KEY,
    Endpoint,
    PromptFormat,
    RequestError,
    ask,
    base_url,
    discover,
    failed,
    open_endpoint,
)
from distillax.teachers.scoring import Scored, score

_log = logging.getLogger(__name__)
_Ask = Callable[[Endpoint, Request, int], Awaitable[Any]]

SHORTEST_TIMEOUT_S = 600.0
SLOWEST = 5.0  # tokens a second of one answer among many, for which a server is still waited for
LONGEST_WAIT_S = 60.0
PATIENCE_S = 3.0  # for a server that has not said what it serves: then it is named, and the others begin
LONGEST_RETRY_AFTER_S = 600.0
LEFT_AFTER = 3  # rounds of failures after which a URL gets one request at a time, if another works
TRIES_AT_START = 3  # of servers of which none was ever reached: the URL is wrong, or nobody started them
HOPELESS_AFTER = 16  # requests in a row that ran out of retries: the server is broken, not they

DEFAULT_IN_FLIGHT = 64


class ServerTeacher:
    """Asks servers that speak the OpenAI-compatible API; each request goes to the least busy of them.

    vLLM is recognised and given token ids, so its answers come from exactly the prompt held here;
    other servers get the messages, or the text if `use_chat_template` is false. Log-probabilities
    are as the server reports them: vLLM's are the model's own, before temperature and cuts.

    Args:
        urls: such as http://localhost:8000/v1. All must serve the same model.
        model: the served name; found by asking if None.
        max_in_flight: most requests at once for each URL.
        enable_thinking: put to the chat template of servers other than vLLM, if not None.
        api_key: the environment's OPENAI_API_KEY if None. Never printed.
        timeout_s: for one attempt of one request; None: ten minutes, or what the longest answer takes at 5
            tokens a second, if that is longer.
        max_retries: for one request that meets 5xx or time-outs. Refused connections and 429 are the
            server's affair, not the request's: a URL is tried that many times in a row, then given up;
            sooner where none was ever reached.
        backoff_s: first pause; it doubles up to a minute, with jitter. Retry-After is honoured.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None = None,
        *,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        use_chat_template: bool = True,
        enable_thinking: bool | None = None,
        api_key: str | None = None,
        timeout_s: float | None = None,
        max_retries: int = 6,
        backoff_s: float = 0.5,
    ):
        if not urls:
            raise UserError("no teacher URL was given: name at least one, such as http://localhost:8000/v1")
        if not 1 <= max_in_flight <= 1000:
            raise UserError(f"max_in_flight is {max_in_flight}: give 1 to 1000 requests for each URL")
        self.urls = tuple(dict.fromkeys(base_url(url) for url in urls))
        self.model = model
        self.max_in_flight, self.timeout_s = max_in_flight, timeout_s
        self.max_retries, self.backoff_s = max_retries, backoff_s
        self.form = PromptFormat(use_chat_template, enable_thinking)
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or NO_KEY
        self._runs: set[_Run] = set()
        self.reached = False  # whether a server has ever answered
        self.least = 0  # window of those that answered at the start

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, working: Working = untold
    ) -> Iterator[Completion]:
        """Yields one completion a request, each as soon as it is finished.

        A request that fails for good gives a completion with finish_reason "error". Prompt and answer have
        room in the window of every server that answers at the start, whichever is asked; one that comes later
        and has less is left out. Raises UserError if the key or the model is refused, or no server works.
        `working` is told nothing: it takes a stream.
        """
        longest = _longest(requests) + sampling.max_new_tokens
        asking = partial(ask, sampling=sampling, form=self.form)
        return self._run(requests, asking, min(longest, sampling.max_length), sampling.max_new_tokens)

    def score(self, requests: Sequence[Request], k: int) -> Iterator[Scored]:
        """Yields the k likeliest ids at every token of each request, as soon as they come; vLLM only.

        Retries and errors are as in `generate`; a server without room for the longest text, and for the token
        that vLLM would write after it, is left out. Raises UserError if all are.
        """
        for found in self._run(requests, partial(score, k=k), _longest(requests) + 1, whole=True):
            lost = isinstance(found, Completion)
            yield Scored(found.prompt_id, error=found.error) if lost else found

    def window(self) -> int | None:
        """Tokens that a text and what follows it may have together: the least of what the servers say that
        answer at the start; None if they say nothing. Raises UserError as `generate`."""

        async def nothing(*_: Any) -> None: ...

        list(self._run([Request("window", 0, [], "", [])], nothing, ENDLESS))
        return None if self.least == ENDLESS else self.least

    def _run(
        self, requests: Sequence[Request], ask: _Ask, wanted: int, new_tokens: int = 0, whole: bool = False
    ) -> Iterator[Any]:
        """What `ask(endpoint, request, room)` gives for each request, or a failed Completion. `room` are the
        tokens that are asked for at most: those `wanted`, or if not `whole`, what the servers agree on."""
        run = _Run(self, self._open_endpoints(new_tokens), requests, ask, wanted, whole)
        self._runs.add(run)
        try:
            run.start()
            for _ in range(len(requests)):
                result = run.results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            run.close()
            self._runs.discard(run)

    def _open_endpoints(self, max_new_tokens: int) -> list[Endpoint]:
        timeout_s = self.timeout_s or max(SHORTEST_TIMEOUT_S, max_new_tokens / SLOWEST)
        return [open_endpoint(url, self._api_key, timeout_s, self.max_in_flight) for url in self.urls]

    def __enter__(self) -> "ServerTeacher":
        return self

    def __exit__(self, *exc: object) -> None:
        for run in list(self._runs):
            run.close()


class _Run:
    """One call of generate() or score(): an event loop in a thread, which puts answers into `results`."""

    def __init__(
        self,
        teacher: ServerTeacher,
        endpoints: list[Endpoint],
        requests: Sequence[Request],
        ask: _Ask,
        wanted: int,
        whole: bool,
    ):
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._teacher, self._opened, self._endpoints = teacher, endpoints, list(endpoints)
        self._requests, self._ask, self._model = requests, ask, teacher.model
        self._wanted = wanted
        self._room = wanted if whole else min(wanted, teacher.least)  # 0: nothing is agreed yet
        self._hopeless = 0
        self._changed = asyncio.Condition()  # an endpoint may have become free
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._in_thread, name="distillax-teacher", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def close(self) -> None:
        """Cancels what is in flight, and returns when the thread is gone."""
        if self._thread.ident is None:
            return
        self._started.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: it was done already
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _in_thread(self) -> None:
        try:
            asyncio.run(self._answer_all())
        except asyncio.CancelledError:
            self.results.put(RuntimeError("the teacher was closed before it had answered everything"))
        except BaseException as error:
            # Whatever it is, it is raised where the answers are read.
            self.results.put(error)

    async def _answer_all(self) -> None:
        # Two tasks, so that a cancellation never interrupts the closing of the clients.
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._work_together())
        self._started.set()
        try:
            await self._task
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for endpoint in self._opened:
                await endpoint.client.close()

    async def _work_together(self) -> None:
        if not self._requests:
            return
        pending = iter(self._requests)
        workers = min(len(self._requests), sum(endpoint.limit for endpoint in self._endpoints))
        async with asyncio.TaskGroup() as group:
            self._loop.call_later(PATIENCE_S, self._name_silent)
            meetings = [group.create_task(self._meet(endpoint)) for endpoint in self._endpoints]
            if not self._room:
                await self._agree()
            await asyncio.wait([group.create_task(self._work(pending)) for _ in range(workers)])
            for meeting in meetings:
                meeting.cancel()

    async def _work(self, pending: Iterator[Request]) -> None:
        for request in pending:
            self.results.put(await self._complete(request))

    async def _complete(self, request: Request) -> Any:
        attempts = 0
        while True:
            endpoint = await self._acquire()
            rounds = endpoint.rounds
            try:
                completion = await self._ask(endpoint, request, self._room)
            except RequestError as error:
                failure = error
            else:
                self._hopeless = 0
                self._note_answer(endpoint)
                return completion
            finally:
                endpoint.in_flight -= 1
                await self._notify()
            if failure.kind == "refused":
                self._check_refusal(endpoint, failure)
            if failure.kind in ("request", "refused"):
                return failed(request, failure)
            self._note_failure(endpoint, rounds, failure)
            if failure.kind in ("server", "timeout"):
                attempts += 1
                if attempts > self._teacher.max_retries:
                    self._check_hope(failure)
                    return failed(request, failure)
                await asyncio.sleep(max(self._backoff(attempts), _asked_for(failure)))

    async def _meet(self, endpoint: Endpoint) -> None:
        """Asks a server what it serves until it says it. No request is given to it before."""
        while not endpoint.discovered:
            await asyncio.sleep(endpoint.rest_until - self._loop.time())
            try:
                await self._discover(endpoint)
            except RequestError as failure:
                if failure.kind in ("refused", "request"):
                    self._check_refusal(endpoint, failure)
                self._note_failure(endpoint, endpoint.rounds, failure)
            await self._notify()

    def _name_silent(self) -> None:
        for endpoint in self._endpoints:
            if not (endpoint.discovered or endpoint.failures):
                _log.warning("waiting for %s, which has not said yet what it serves", endpoint.url)

    async def _agree(self) -> None:
        """Waits for a server, and a moment for the others. None is asked for more than all that have answered
        by then have room for: an answer must not depend on which of them is free."""
        async with self._changed:
            await self._changed.wait_for(lambda: any(e.discovered for e in self._endpoints))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self._changed.wait_for(
                        lambda: all(e.discovered or e.failures >= LEFT_AFTER for e in self._endpoints)
                    )
        there = [endpoint for endpoint in self._endpoints if endpoint.discovered]
        smallest = min(there, key=lambda endpoint: endpoint.window)
        self._teacher.least = smallest.window
        self._room = min(self._wanted, smallest.window)
        if self._room < self._wanted and any(endpoint.window > self._room for endpoint in there):
            told = "%s has room for %d tokens, less than other teacher servers: none is asked for more"
            _log.warning(told, smallest.url, self._room)

    async def _discover(self, endpoint: Endpoint) -> None:
        await discover(endpoint, self._model)
        self._teacher.reached = True
        self._model = self._model or endpoint.model
        if endpoint.model != self._model:
            raise UserError(
                f"{endpoint.url} serves {endpoint.model!r} and another URL {self._model!r}: "
                "all teacher URLs must serve the same model"
            )
        if endpoint.window < self._room:  # which is 0 until they have agreed
            told = f"{endpoint.url} has room for {endpoint.window} tokens, {self._room} are asked for"
            self._endpoints.remove(endpoint)
            if not self._endpoints:
                raise UserError(
                    f"{told}: start it with that many or more (a capture of fewer begins in another folder)"
                )
            self._teacher.urls = tuple(url for url in self._teacher.urls if url != endpoint.url)
            _log.warning("%s: it is left out of this run; start it with more to use it", told)

    async def _acquire(self) -> Endpoint:
        """Waits for an endpoint that may be asked now, and counts one more request in flight there."""
        loop = asyncio.get_running_loop()
        async with self._changed:
            while True:
                now = loop.time()
                if endpoint := self._least_busy(now):
                    endpoint.in_flight += 1
                    return endpoint
                wake = min((e.rest_until for e in self._endpoints if e.rest_until > now), default=None)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(wake):
                        await self._changed.wait()

    def _least_busy(self, now: float) -> Endpoint | None:
        known = [e for e in self._endpoints if e.discovered]
        others_work = any(e.failures < LEFT_AFTER for e in known)

        def may_be_asked(e: Endpoint) -> bool:
            if e.rest_until > now or e.in_flight >= e.limit:
                return False
            # One probe at a time where little good is known.
            return e.in_flight == 0 or e.failures < LEFT_AFTER or not others_work

        free = [e for e in known if may_be_asked(e)]
        # A URL that died is never busy: without the first key it would draw everything.
        return min(free, key=lambda e: (e.failures > 0, e.in_flight), default=None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _note_answer(self, endpoint: Endpoint) -> None:
        endpoint.answered += 1
        endpoint.failures = 0
        endpoint.limit = min(endpoint.limit + 1, self._teacher.max_in_flight)

    def _note_failure(self, endpoint: Endpoint, rounds: int, failure: RequestError) -> None:
        """Lets the endpoint rest if need be. Raises UserError if no endpoint is left."""
        if failure.kind != "connection":
            self._teacher.reached = True
        if rounds != endpoint.rounds:
            return  # one of several that failed together: already noted
        endpoint.rounds += 1
        endpoint.failures += 1
        if failure.kind == "busy":
            endpoint.limit = max(1, endpoint.limit // 2)
        unreachable = failure.kind in ("busy", "connection") or not endpoint.discovered
        tries = 1 + self._teacher.max_retries
        if failure.kind == "connection" and not self._teacher.reached:
            tries = min(tries, TRIES_AT_START)
        elif failure.kind == "server" and not endpoint.discovered:
            tries = max(tries, HOPELESS_AFTER)  # it may be loading its model, for minutes
        if unreachable and all(e.failures >= tries for e in self._endpoints):
            raise UserError(f"no teacher server answers ({failure.reason}): see to it and run this again")
        if unreachable or endpoint.failures >= LEFT_AFTER:
            pause = max(self._backoff(endpoint.failures), _asked_for(failure))
            endpoint.rest_until = asyncio.get_running_loop().time() + pause
            _log.warning("%s; next try in %.1f s", failure.reason, pause)

    def _check_refusal(self, endpoint: Endpoint, failure: RequestError) -> None:
        """A bad key, and what is refused from the first, will be refused every time."""
        if failure.status == 401 or not endpoint.answered:
            key = failure.status in (401, 403)
            what = "the key in OPENAI_API_KEY" if key else "the model's name and the URL"
            raise UserError(f"{failure.reason}: check {what}")

    def _check_hope(self, failure: RequestError) -> None:
        self._hopeless += 1
        if self._hopeless >= HOPELESS_AFTER:
            raise UserError(
                f"{HOPELESS_AFTER} requests in a row failed after all their retries, the last because "
                f"{failure.reason}: see to the server and run this again"
            )

    def _backoff(self, failures: int) -> float:
        longest = min(LONGEST_WAIT_S, self._teacher.backoff_s * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


def _longest(requests: Sequence[Request]) -> int:
    return max((len(request.prompt_token_ids) for request in requests), default=0)


def _asked_for(failure: RequestError) -> float:
    return min(failure.retry_after or 0.0, LONGEST_RETRY_AFTER_S)
