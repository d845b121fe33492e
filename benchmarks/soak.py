"""Hours of mixed load on a server that drafts: right tokens, no leak, no crash, and what speed is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from script import NOVELS, run_main, split_list, with_plain_errors
from serving import MODEL, Server, serve
from soak_checks import (
    TIE_NATS,
    acceptance_length,
    find_faults,
    first_difference,
    memory_growth,
    percentile,
    time_between_tokens,
)

EXAMPLES = """
Examples:

    python benchmarks/soak.py

    python benchmarks/soak.py --minutes 10 --no-speed

    python benchmarks/soak.py --speed-only --concurrency 1,16 --window 20

    python benchmarks/soak.py --target MODEL --drafter DIR --minutes 60 --max-model-len 512 --out results/soak-model
"""

LEVELS = (1, 2, 4, 8, 16, 32)
# Share of each kind of request. A tenth ends early: by closing a stream, or by hanging up while nothing has come yet.
KINDS = {"greedy": 0.68, "sampled": 0.1, "limit": 0.04, "above": 0.03, "abort": 0.05, "disconnect": 0.05, "bad": 0.05}
# Requests that no server may take: name, and what the answer must be.
BAD_STATUS = {"wrong JSON": 400, "negative max_tokens": 400, "unknown model": 404, "empty messages": 400}
REQUEST_S = 300.0
SAMPLE_S = 5.0
# A second apart: the server's gauge may be one step late.
IDLE_READINGS = 20
# Kept of what went wrong; the numbers count all.
KEPT = 20


@dataclass
class Prompt:
    """A prompt with what plain decoding writes behind it, `[M]` token ids."""

    ids: list[int]
    expected: list[int] = field(default_factory=list)


@dataclass
class Tally:
    """What the clients of one run have seen."""

    requests: Counter[str] = field(default_factory=Counter)
    bad_statuses: Counter[str] = field(default_factory=Counter)
    checked_tokens: int = 0
    differences: list[tuple[Prompt, int, int]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    num_unexpected: int = 0

    def miss(self, what: str) -> None:
        """Note a request that ended in another way than it must."""
        self.num_unexpected += 1
        self.unexpected = [*self.unexpected, what[:500]][:KEPT]

    def check(self, prompt: Prompt, answer: Sequence[int], num_tokens: int) -> None:
        """Compare a greedy answer with plain decoding's; a shorter one than was asked for is a miss."""
        place = first_difference(answer, prompt.expected)
        self.checked_tokens += len(answer) if place is None else place + 1
        if place is not None:
            self.differences.append((prompt, place, answer[place]))
        elif len(answer) != num_tokens:
            self.miss(f"{len(answer)} tokens for {num_tokens} behind a prompt of {len(prompt.ids)}")


class Log:
    """Lines with the seconds since the start, on the terminal and in a file."""

    def __init__(self, file: Path) -> None:
        self.file, self.begin = file, time.monotonic()
        file.write_text("")

    def __call__(self, text: str) -> None:
        """Write a line."""
        line = f"{time.monotonic() - self.begin:7.0f} s  {text}"
        typer.echo(line)
        with self.file.open("a") as stream:
            stream.write(line + "\n")


class Client:
    """Requests to one server by OpenAI's client."""

    def __init__(self, server: Server) -> None:
        from openai import AsyncOpenAI

        self.server = server
        self.api = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=REQUEST_S, max_retries=0)

    def _body(self, ids: Sequence[int], num_tokens: int, **fields: Any) -> dict[str, Any]:
        extra = {"return_token_ids": True, "ignore_eos": True}
        body = {"model": MODEL, "prompt": list(ids), "max_tokens": num_tokens, "temperature": 0, "extra_body": extra}
        return {**body, **fields}

    async def complete(self, ids: Sequence[int], num_tokens: int, **fields: Any) -> list[int]:
        """Return the token ids behind a prompt."""
        answer = await self.api.completions.create(**self._body(ids, num_tokens, **fields))
        return list(answer.choices[0].token_ids)

    async def stream(
        self, ids: Sequence[int], num_tokens: int, *, most_parts: int | None = None
    ) -> tuple[list[int], list[tuple[float, int]]]:
        """Return token ids as they come and when how many came, and hang up after `most_parts` parts."""
        token_ids: list[int] = []
        arrivals: list[tuple[float, int]] = []
        async with await self.api.completions.create(**self._body(ids, num_tokens, stream=True)) as parts:
            async for part in parts:
                if part.choices and (new := part.choices[0].token_ids):
                    token_ids += new
                    arrivals.append((time.monotonic(), len(new)))
                if most_parts is not None and len(arrivals) >= most_parts:
                    break
        return token_ids, arrivals

    async def margin(self, ids: Sequence[int], token: int) -> float:
        """Return how much likelier the best next token is than `token`, in nats; infinite beyond the first five."""
        answer = await self.api.completions.create(
            **self._body(ids, 1, logprobs=5, extra_body={"return_tokens_as_token_ids": True})
        )
        likeliest = answer.choices[0].logprobs.top_logprobs[0]
        return float(max(likeliest.values()) - likeliest.get(f"token_id:{token}", float("-inf")))

    async def bad(self, kind: str, ids: Sequence[int]) -> int:
        """Send one of `BAD_STATUS` and return the answer's status."""
        import aiohttp

        path, body = "completions", {"model": MODEL, "prompt": list(ids), "max_tokens": 4}
        if kind == "negative max_tokens":
            body["max_tokens"] = -1
        elif kind == "unknown model":
            body["model"] = "nobody"
        elif kind == "empty messages":
            path, body = "chat/completions", {"model": MODEL, "messages": []}
        text = json.dumps(body)[: -5 if kind == "wrong JSON" else None]
        url, headers = f"{self.server.url}/v1/{path}", {"Content-Type": "application/json"}
        async with aiohttp.ClientSession() as session, session.post(url, data=text, headers=headers) as reply:
            return reply.status


class Load:
    """Clients whose number changes with time.

    Args:
        client: of the server under load.
        pool: prompts with what must stand behind them; the answers to the last two reach the length limit.
        num_tokens: the most that are written behind a prompt.
        limit: `max_model_len`.
        vocabulary: the target's number of tokens.
        seed: of the requests; when they are sent depends on the server.
    """

    def __init__(
        self, client: Client, pool: Sequence[Prompt], num_tokens: int, limit: int, vocabulary: int, seed: int
    ) -> None:
        self.client, self.pool, self.num_tokens, self.limit = client, pool, num_tokens, limit
        self.vocabulary = vocabulary
        self.random = random.Random(seed)
        self.tally = Tally()
        self.level, self.stopped = 1, False

    async def run(self, seconds: float, most_requests: float) -> None:
        """Send requests for so long or so many, then wait for those under way."""
        workers = [asyncio.create_task(self._work(number)) for number in range(LEVELS[-1])]
        end = time.monotonic() + seconds
        over = asyncio.create_task(self._count(most_requests))
        try:
            while (left := end - time.monotonic()) > 0 and not over.done():
                # From few clients to 32 all at once is a burst.
                self.level = self.random.choice(LEVELS)
                await asyncio.wait([over], timeout=min(self.random.uniform(2, 15), left))
            self.stopped = True
            await asyncio.gather(*workers)
        finally:
            for task in [over, *workers]:
                task.cancel()
            await asyncio.gather(over, *workers, return_exceptions=True)

    async def _count(self, most_requests: float) -> None:
        while self.client.server.alive and self.tally.requests.total() < most_requests:
            await asyncio.sleep(0.1)

    async def _work(self, number: int) -> None:
        while not self.stopped and self.client.server.alive:
            if number >= self.level:
                await asyncio.sleep(0.1)
                continue
            (kind,) = self.random.choices(list(KINDS), list(KINDS.values()))
            self.tally.requests[kind] += 1
            try:
                await self._send(kind)
            except Exception as error:
                # What the client's library raises has many classes; each of them is one answer too few.
                cause = f" ({error.__cause__!r})" if error.__cause__ else ""
                self.tally.miss(f"{kind}: {type(error).__name__}: {error}{cause}")
                await asyncio.sleep(0.5)

    def _allowed(self, prompt: Prompt, num_tokens: int) -> int:
        """Return how many tokens an answer has where `num_tokens` are asked for."""
        return min(num_tokens, self.limit - len(prompt.ids))

    async def _send(self, kind: str) -> None:
        from openai import BadRequestError

        client, prompt = self.client, self.random.choice(self.pool)
        num_tokens = self.random.randint(1, self.num_tokens)
        if kind == "greedy":
            if self.random.random() < 0.5:
                answer = await client.complete(prompt.ids, num_tokens)
            else:
                answer, _ = await client.stream(prompt.ids, num_tokens)
            self.tally.check(prompt, answer, self._allowed(prompt, num_tokens))
        elif kind == "limit":
            # The last token ends at the limit, and what is asked for beyond it is left out.
            prompt, asked = self.random.choice(self.pool[-2:]), self.num_tokens + self.random.randint(0, 1)
            self.tally.check(prompt, await client.complete(prompt.ids, asked), self._allowed(prompt, asked))
        elif kind == "above":
            ids = self.pool[-1].ids
            try:
                await client.complete([*ids, ids[0]], num_tokens)
                self.tally.miss("a prompt one token above the limit was answered")
            except BadRequestError:
                self.tally.bad_statuses["prompt one token above: 400"] += 1
        elif kind == "sampled":
            temperature, seed = self.random.choice([0.5, 1.0]), self.random.choice([None, 7])
            answer = await client.complete(prompt.ids, num_tokens, temperature=temperature, seed=seed, top_p=0.95)
            num_tokens = self._allowed(prompt, num_tokens)
            if len(answer) != num_tokens or not all(0 <= token < self.vocabulary for token in answer):
                self.tally.miss(f"a sampled answer of {len(answer)} tokens for {num_tokens}")
        elif kind == "abort":
            most = self.random.randint(1, 8)
            answer, _ = await client.stream(prompt.ids, self.num_tokens, most_parts=most)
            self.tally.check(prompt, answer, len(answer))
        elif kind == "disconnect":
            with contextlib.suppress(asyncio.TimeoutError):
                request = client.complete(prompt.ids, self.num_tokens)
                await asyncio.wait_for(request, self.random.uniform(0.01, 0.5))
        else:
            bad = self.random.choice(list(BAD_STATUS))
            status = await client.bad(bad, prompt.ids)
            self.tally.bad_statuses[f"{bad}: {status}"] += 1
            if status != BAD_STATUS[bad]:
                self.tally.miss(f"{bad}: status {status} for {BAD_STATUS[bad]}")


def make_pool(text: list[int], size: int, limit: int, num_tokens: int, seed: int) -> list[Prompt]:
    """Cut `size` prompts from a text, of 4 to `limit - num_tokens` tokens; half begin where others do and share pages.

    The last two reach the limit: one with its whole answer, one with its first token.
    """
    draw = random.Random(seed)
    longest = limit - num_tokens
    if longest < 4 or len(text) < limit:
        raise ValueError(
            f"--max-model-len {limit} must be at least --num-tokens {num_tokens} + 4, and at most the {len(text)} "
            "tokens of --prompts"
        )
    last = len(text) - limit
    shared = [draw.randint(0, last) for _ in range(4)]
    pool = []
    for number in range(size - 2):
        begin = shared[number // 2 % 4] if number % 2 else draw.randint(0, last)
        # Short ones are as frequent as long ones of twice the length.
        length = round(4 * (longest / 4) ** draw.random())
        pool.append(Prompt(text[begin : begin + length]))
    begin = shared[0]
    return [*pool, Prompt(text[begin : begin + longest]), Prompt(text[begin : begin + limit - 1])]


async def write_expected(client: Client, pool: Sequence[Prompt], num_tokens: int) -> None:
    """Let plain decoding write what must stand behind each prompt, one request at a time."""
    for prompt in pool:
        prompt.expected = await client.complete(prompt.ids, num_tokens)


async def judge(plain: Client, tally: Tally) -> dict[str, Any]:
    """Tell wrong tokens from ties: at a tie plain decoding itself finds both tokens equally likely."""
    wrong, ties, seen = [], 0, {}
    for prompt, place, token in tally.differences:
        key = (tuple(prompt.ids), place, token)
        if key not in seen:
            ids = [*prompt.ids, *prompt.expected[:place]]
            beyond = place >= len(prompt.expected)
            seen[key] = float("inf") if beyond else await plain.margin(ids, token)
        if seen[key] <= TIE_NATS:
            ties += 1
        else:
            row = {"prompt_tokens": len(prompt.ids), "place": place, "token": token, "margin_nats": seen[key]}
            wrong.append({**row, "expected": prompt.expected[place : place + 1]})
    widest = max((margin for margin in seen.values() if margin <= TIE_NATS), default=0.0)
    return {
        "wrong_tokens": len(wrong),
        "wrong_answers": wrong[:KEPT],
        "answers_parted_at_a_tie": ties,
        "widest_tie_nats": widest,
    }


async def watch(
    server: Server, load: Load, log: Log, samples: list[tuple[float, dict[str, float]]], counters: list[Any]
) -> None:
    """Read memory and metrics every few seconds."""
    begin = said = time.monotonic()
    while server.alive:
        await asyncio.sleep(SAMPLE_S)
        now = time.monotonic()
        # A server under load may be late, and one that has just ended does not answer.
        with contextlib.suppress(OSError):
            counters.append((now - begin, await asyncio.to_thread(server.metrics)))
            samples.append((round(now - begin, 1), server.resident_mb()))
        if now - said >= 30 and samples:
            said = now
            tally = load.tally
            log(
                f"{load.level:2} clients, {tally.requests.total()} requests,"
                f" {tally.checked_tokens} tokens checked, {len(tally.differences)} answers differ,"
                f" {tally.num_unexpected} unexpected, {sum(samples[-1][1].values()):.0f} MB"
            )


async def idle_usage(server: Server) -> float | None:
    """Return the share of KV pages in use once no request is left; None if the server does not say."""
    usage = None
    for _ in range(IDLE_READINGS):
        await asyncio.sleep(1)
        with contextlib.suppress(OSError):
            values = await asyncio.to_thread(server.metrics)
            usage = values.get("vllm:kv_cache_usage_perc")
            if usage == 0 and values.get("vllm:num_requests_running") == 0:
                break
    return usage


async def soak(
    drafting: Server, plain: Server, pool: list[Prompt], *, minutes: float, num_tokens: int, limit: int, seed: int,
    vocabulary: int, log: Log, most_requests: float = math.inf,
) -> dict[str, Any]:  # fmt: skip
    """Load the drafting server and return what is recorded of it; Ctrl-C ends it early."""
    reference = Client(plain)
    log(f"plain decoding writes {num_tokens} tokens behind {len(pool)} prompts")
    await write_expected(reference, pool, num_tokens)
    load = Load(Client(drafting), pool, num_tokens, limit, vocabulary, seed)
    samples: list[tuple[float, dict[str, float]]] = []
    counters: list[tuple[float, dict[str, float]]] = [(0.0, await asyncio.to_thread(drafting.metrics))]
    begin, interrupted = time.monotonic(), False
    watcher = asyncio.create_task(watch(drafting, load, log, samples, counters))
    task = asyncio.create_task(load.run(60 * minutes, most_requests))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        interrupted = True
        log("interrupted")
    seconds = time.monotonic() - begin
    watcher.cancel()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
    crashes = [
        f"server {server.name} ended with {server.process.returncode}"
        for server in (drafting, plain)
        if not server.alive
    ]
    usage = await idle_usage(drafting) if drafting.alive else None
    if drafting.alive:
        counters.append((seconds, await asyncio.to_thread(drafting.metrics)))
    verdict = await judge(reference, load.tally) if plain.alive else {"wrong_tokens": len(load.tally.differences)}
    (_, first), (_, last) = counters[0], counters[-1]
    early = next(values for at, values in counters if at >= seconds / 4 or values is last)
    # The last reading before the quarter: a later one may be the last of all.
    late = next((values for at, values in reversed(counters) if at <= 3 * seconds / 4), first)
    tally = load.tally

    def counted(name: str) -> float:
        return last.get(name, 0.0) - first.get(name, 0.0)

    return {
        "seconds": round(seconds, 1),
        "interrupted": interrupted,
        "requests": dict(tally.requests),
        "num_requests": tally.requests.total(),
        "bad_requests": dict(sorted(tally.bad_statuses.items())),
        "checked_tokens": tally.checked_tokens,
        **verdict,
        "num_unexpected": tally.num_unexpected,
        "unexpected": tally.unexpected,
        "crashes": crashes,
        "failed_steps": counted("qm_spec:failed_steps_total"),
        "preemptions": counted("vllm:num_preemptions_total"),
        "prompt_tokens": counted("vllm:prompt_tokens_total"),
        "output_tokens": counted("vllm:generation_tokens_total"),
        "prefix_cache_hit_tokens": counted("vllm:prefix_cache_hits_total"),
        "draft_tokens": counted("vllm:spec_decode_num_draft_tokens_total"),
        "accepted_tokens": counted("vllm:spec_decode_num_accepted_tokens_total"),
        "acceptance_length": {
            "first_quarter": acceptance_length(first, early),
            "last_quarter": acceptance_length(late, last),
        },
        "kv_usage_idle": usage,
        "memory": memory_growth([(at, sum(mb.values())) for at, mb in samples]),
        "resident_mb": [{"seconds": at, **mb} for at, mb in samples[:: max(1, len(samples) // 60)]],
    }


async def measure(server: Server, pool: Sequence[Prompt], concurrency: int, window: float, seed: int) -> dict[str, Any]:
    """Return tokens per second and the time between tokens of so many clients over `window` seconds."""
    client, draw, end = Client(server), random.Random(seed), time.monotonic() + window
    gaps: list[float] = []
    num_tokens = 0

    async def work() -> None:
        nonlocal num_tokens
        while time.monotonic() < end:
            prompt = draw.choice(pool)
            _, arrivals = await client.stream(prompt.ids, 64)
            num_tokens += sum(count for at, count in arrivals if at <= end)
            gaps.extend(time_between_tokens([arrival for arrival in arrivals if arrival[0] <= end]))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    milliseconds = [1000 * gap for gap in gaps]
    return {
        "server": server.name,
        "concurrency": concurrency,
        "output_tokens_per_s": round(num_tokens / window, 2),
        "ms_between_tokens_p50": round(percentile(milliseconds, 0.5), 2) if gaps else None,
        "ms_between_tokens_p99": round(percentile(milliseconds, 0.99), 2) if gaps else None,
    }


async def speed(
    servers: Sequence[Server], pool: Sequence[Prompt], levels: Sequence[int], window: float, repeats: int, log: Log
) -> list[dict[str, Any]]:
    """Measure both servers in turn, the order of a pair changing with each, after a short warm-up."""
    rows = []
    for server in servers:
        await measure(server, pool, levels[-1], min(window, 5.0), 0)
    for concurrency in levels:
        for number in range(repeats):
            for server in servers[:: 1 if number % 2 else -1]:
                rows.append({**await measure(server, pool, concurrency, window, number), "repeat": number})
                log(json.dumps(rows[-1]))
    return rows


@with_plain_errors
def main(
    target: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the target model.", show_default="the shipped pair's")
    ] = NOVELS / "target",
    drafter: Annotated[
        str,
        typer.Option(
            metavar="NAME|DIR",
            help="What --speculative-model is given; qm_spec is the target's own, none a plain server.",
        ),
    ] = "qm_spec",
    minutes: Annotated[float, typer.Option(metavar="N", min=0.1, help="Length of the load.")] = 60.0,
    dtype: Annotated[str, typer.Option(help="Of both servers. Answers are comparable in float32 alone.")] = "float32",
    max_model_len: Annotated[int, typer.Option(metavar="L", min=32, help="The limit that some requests reach.")] = 1024,
    num_tokens: Annotated[int, typer.Option(metavar="M", min=1, help="Most tokens of an answer.")] = 64,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=3, help="Distinct prompts.")] = 64,
    prompts: Annotated[
        Path, typer.Option(metavar="JSONL", help="Rows with a `text`, cut into prompts.", show_default="the shipped")
    ] = NOVELS / "prompts.jsonl",
    pages: Annotated[
        int, typer.Option(metavar="N", help="KV pages; few, so that requests are preempted. 0 leaves it to vLLM.")
    ] = 24,
    speed_only: Annotated[bool, typer.Option("--speed-only", help="Only measure speed.")] = False,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not measure speed.")] = False,
    concurrency: Annotated[
        str, typer.Option(metavar="C,...", help="Clients, where speed is measured.")
    ] = "1,4,8,16,32",
    window: Annotated[float, typer.Option(metavar="S", min=1, help="Seconds of a measurement of speed.")] = 20.0,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each server and number.")] = 3,
    seed: Annotated[int, typer.Option(metavar="S", help="Of prompts and load.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of record and logs.")] = Path("results/soak"),
) -> None:
    """Load a server that drafts as users do and check each greedy answer against plain decoding, token by token.

    Two servers run side by side: with the drafter, and plain. Clients change between 1 and 32; a tenth of them hang up
    early, some ask for what no server may give, some for the whole length and one token more. Writes soak.json,
    soak.log and both servers' logs. Exits with 1 and says what failed: a wrong token, a leak, a crash.

    Needs vLLM, which brings the clients.
    """
    from transformers import AutoConfig, AutoTokenizer

    from qm_spec.bench.environment import default_device, describe_environment
    from qm_spec.provenance import conditions, write_record

    if speed_only and no_speed:
        raise ValueError("--speed-only and --no-speed leave nothing to do")
    levels = [int(level) for level in split_list(concurrency)]
    if not levels or min(levels) < 1:
        raise ValueError(f"--concurrency must be positive integers, got {concurrency!r}")
    tokenizer = AutoTokenizer.from_pretrained(target)
    rows = [json.loads(line)["text"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    text = [token for row in rows for token in tokenizer(row, add_special_tokens=False)["input_ids"]]
    pool = make_pool(text, num_prompts, max_model_len, num_tokens, seed)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "soak.log")
    device = default_device()
    options = {"minutes": minutes, "dtype": dtype, "max_model_len": max_model_len, "num_tokens": num_tokens}
    record: dict[str, Any] = {
        **conditions(),
        "environment": describe_environment(),
        "target": target.name,
        "drafter": drafter,
        **options,
    }
    record |= {"num_prompts": num_prompts, "seed": seed, "pages": pages}
    vocabulary = AutoConfig.from_pretrained(target).vocab_size
    together = ["--gpu-memory-utilization", "0.4"] if device == "cuda" else []

    @contextlib.contextmanager
    def both(*arguments: str) -> Any:
        start = functools.partial(serve, target=target, dtype=dtype, max_model_len=max_model_len, device=device)
        given = [*together, *arguments]
        drafting = [] if drafter == "none" else ["--speculative-model", drafter]
        log("starting two servers")
        with (
            start("plain", arguments=given, log=out / "plain.log") as plain,
            start(Path(drafter).name, arguments=[*drafting, *given], log=out / "loaded.log") as ours,
        ):
            yield ours, plain

    faults: list[str] = []
    interrupted = False
    if not speed_only:
        few = ["--num-gpu-blocks-override", str(pages)] if pages else []
        with both(*few) as (ours, plain):
            run = soak(
                ours, plain, pool, minutes=minutes, num_tokens=num_tokens, limit=max_model_len, seed=seed,
                vocabulary=vocabulary, log=log,
            )  # fmt: skip
            record["soak"] = asyncio.run(run)
        faults = record["faults"] = find_faults(record["soak"])
        interrupted = record["soak"]["interrupted"]
        write_record(out / "soak.json", record)
    if not no_speed and not interrupted:
        short = [Prompt(prompt.ids[:128]) for prompt in pool]
        with both() as (ours, plain):
            record |= {
                "window_s": window,
                "speed": asyncio.run(speed((ours, plain), short, levels, window, repeats, log)),
            }
        write_record(out / "soak.json", record)
    for fault in faults:
        log(f"FAILED: {fault}")
    log(f"record: {out / 'soak.json'}")
    if interrupted:
        raise typer.Exit(130)
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_main(main, EXAMPLES)
