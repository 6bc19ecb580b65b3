"""Locust against `rdlm serve`: streamed completions at mixed K, with the times that matter as figures of
their own.

locust -f benchmarks/locustfile.py --headless --host http://127.0.0.1:8000 --users 16 --spawn-rate 4
--run-time 60s
"""

from __future__ import annotations

import json
import random
import time

from locust import HttpUser, between, task

NUM_TOKENS = 24


class Reader(HttpUser):
    """Asks, reads the stream to its end, thinks a moment, asks again; a full queue (429) is an answer and no
    failure."""

    wait_time = between(0.1, 0.5)

    @task
    def complete(self) -> None:
        body = {
            "prompt": "And it came to pass",
            "num_steps": random.choice([2, 4, 8]),
            "max_tokens": NUM_TOKENS,
        }
        body |= {"ignore_eos": True, "stream": True}
        last = time.perf_counter()
        tokens, done = 0, False
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as answer:
            if answer.status_code == 429:
                return answer.success()
            for line in answer.iter_lines():
                if line == b"data: [DONE]":
                    done = True
                elif line.startswith(b"data: ") and json.loads(line[6:])["choices"]:
                    now = time.perf_counter()
                    self.note("time between tokens" if tokens else "time to first token", now - last)
                    tokens, last = tokens + 1, now
            if not done or tokens != NUM_TOKENS:
                answer.failure(f"{tokens} of {NUM_TOKENS} tokens, {'' if done else 'no '}[DONE]")

    def note(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=1e3 * seconds,
            response_length=0,
            exception=None,
            context={},
        )
