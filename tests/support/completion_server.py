"""A server of completions without a model, for tests of what loads servers: the next token is reckoned from the last.

`FAULTS` names how it may misbehave.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aiohttp import web

VOCABULARY = 97
LIMIT = 64
# tie: another token where both are as likely; leak: a page stays in use; takes bad: a wrong request is answered.
FAULTS = {None, "wrong token", "tie", "short", "dies", "leak", "takes bad", "failed steps", "interrupts"}


def answer(ids: list[int], num_tokens: int) -> list[int]:
    """Return what stands behind a prompt."""
    written = list(ids)
    for _ in range(num_tokens):
        written.append((7 * written[-1] + len(written)) % VOCABULARY)
    return written[len(ids) :]


class CompletionServer:
    """Answers as vLLM's API does, as far as `benchmarks/soak.py` asks.

    Args:
        fault: one of `FAULTS`, in every tenth request; "dies" ends all at the 50th, "interrupts" is Ctrl-C then.
        speed: tokens that come at a time in a stream.
    """

    def __init__(self, fault: str | None = None, speed: int = 2) -> None:
        assert fault in FAULTS
        self.fault, self.speed, self.requests, self.running = fault, speed, 0, 0

    @property
    def dead(self) -> bool:
        return self.fault == "dies" and self.requests >= 50

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.dead:
            raise web.HTTPInternalServerError
        try:
            body = await request.json()
        except json.JSONDecodeError:
            raise web.HTTPBadRequest from None
        if body["model"] != "soak":
            raise web.HTTPNotFound
        ids = body["prompt"]
        if len(ids) >= LIMIT or (body["max_tokens"] < 0 and self.fault != "takes bad"):
            raise web.HTTPBadRequest
        self.requests += 1
        if self.fault == "interrupts" and self.requests == 50:
            os.kill(os.getpid(), signal.SIGINT)
        token_ids = answer(ids, max(0, min(body["max_tokens"], LIMIT - len(ids))))
        if self.requests % 10 == 0 and self.fault in ("wrong token", "tie"):
            token_ids[-1] = (token_ids[-1] + 1) % VOCABULARY
        elif self.requests % 10 == 0 and self.fault == "short":
            token_ids = token_ids[:-1]
        self.running += 1
        try:
            await asyncio.sleep(0.002)
            if not body.get("stream"):
                return web.json_response({"choices": [self.choice(token_ids, body)]})
            reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await reply.prepare(request)
            for begin in range(0, len(token_ids), self.speed):
                part = {"choices": [self.choice(token_ids[begin : begin + self.speed], body)]}
                await reply.write(f"data: {json.dumps(part)}\n\n".encode())
                await asyncio.sleep(0.001)
            await reply.write(b"data: [DONE]\n\n")
            return reply
        finally:
            self.running -= 1

    def choice(self, token_ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "token_ids": token_ids}
        if body.get("logprobs"):
            gap = 0.0 if self.fault == "tie" else 2.0
            likely = {f"token_id:{token_ids[0]}": -1.0, f"token_id:{(token_ids[0] + 1) % VOCABULARY}": -1.0 - gap}
            found["logprobs"] = {"top_logprobs": [likely]}
        return found

    async def chat(self, request: web.Request) -> web.Response:
        raise web.HTTPBadRequest

    async def metrics(self, request: web.Request) -> web.Response:
        usage = 0.5 if self.running or self.fault == "leak" else 0
        failed = 3.0 if self.fault == "failed steps" and self.requests > 20 else 0.0
        return web.Response(
            text=f"""# HELP a comment
vllm:kv_cache_usage_perc{{engine="0"}} {usage}
vllm:num_requests_running{{engine="0"}} {self.running}
vllm:spec_decode_num_drafts_total{{engine="0"}} {self.requests}
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {2 * self.requests}
qm_spec:failed_steps_total{{engine="0"}} {failed}
"""
        )

    @asynccontextmanager
    async def serve(self, name: str) -> AsyncIterator[Any]:
        """Run it and yield it as `serving.Server` would be, with a memory that does not change."""
        from serving import Server

        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/metrics", self.metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]
        process = SimpleNamespace(poll=lambda: -9 if self.dead else None, returncode=-9, pid=1 << 30)
        try:
            yield Server(name, f"http://127.0.0.1:{port}", process, Path("none"))  # type: ignore[arg-type]
        finally:
            await runner.cleanup()
