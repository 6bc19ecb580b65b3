"""The server as a process on loopback: stock clients, raw sockets, disconnects, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from rdlm.checkpoints.folder import save
from serve.engine.engine import Served

pytestmark = pytest.mark.multiproc


@dataclass
class Live:
    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)


def launch(checkpoint: Path, folder: Path, *options: str) -> Live:
    port_file = folder / "port"
    command = [
        sys.executable,
        "-m",
        "rdlm",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        "0",
        "--port-file",
        str(port_file),
    ]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.stdout.read() if process.stdout else "")
        if port_file.exists():
            live = Live(process, int(port_file.read_text()))
            try:
                if httpx.get(f"{live.url}/ready").status_code == 200:
                    return live
            except httpx.TransportError:
                pass  # bound but not listening yet
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the server was not ready within 180 s")


@pytest.fixture(scope="module")
def checkpoint(make_served: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Path:
    served = make_served(max_seq_len=2048)
    folder = tmp_path_factory.mktemp("live") / "tiny"
    save(folder, served.runner.denoiser, served.config, served.tokenizer)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def live(checkpoint: Path) -> Iterator[Live]:
    server = launch(checkpoint, checkpoint.parent)
    yield server
    server.process.terminate()
    server.process.wait(20)


def test_openai_client_completions_and_chat(live: Live) -> None:
    client = live.client()
    assert "tiny:k4" in [model.id for model in client.models.list()]
    whole = client.completions.create(
        model="tiny", prompt="in the", max_tokens=8, temperature=0, extra_body={"num_steps": 4}
    )
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    assert whole.usage.model_extra is not None and whole.usage.model_extra["recurrence"]["num_steps"] == 4
    parts = client.completions.create(
        model="tiny:k4",
        prompt="in the",
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(parts)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    messages: Any = [{"role": "user", "content": "the word"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, seed=1, logprobs=True, top_logprobs=3
    )
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, seed=1, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == chat.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="1 to 8"):
        client.completions.create(model="tiny", prompt="x", extra_body={"num_steps": 100})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_two_lengths_and_repeated_headers_on_a_raw_socket(live: Live) -> None:
    """A request that two servers in a row may end at two places, or read by two headers, is a 400."""

    def talk(head: str, body: str) -> list[str]:
        request = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{head}\r\n{body}"
        with socket.create_connection(("127.0.0.1", live.port), timeout=60) as wire:
            wire.sendall(request.encode())
            answer = b"".join(iter(lambda: wire.recv(65536), b"")).decode()
        return re.findall(r"^HTTP/1.1 (\d+)", answer, re.MULTILINE) + re.findall(
            '"message": ?"([^"]*)', answer
        )

    body, kind = '{"prompt": "x", "max_tokens": 1}', "content-type: application/json\r\n"
    chunks = f"{len(body):x}\r\n{body}\r\n0\r\n\r\n"
    length, chunked = f"content-length: {len(body)}\r\n", "transfer-encoding: chunked\r\n"
    assert talk(kind + length, body) == talk(kind + chunked, chunks) == ["200"]
    hidden = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    status, problem = talk(kind + length + chunked, "0\r\n\r\n" + hidden)
    assert status == "400" and "Content-Length and Transfer-Encoding" in problem
    for repeated in (kind, "Content-Type: text/plain\r\n", "authorization: a\r\nAuthorization: b\r\n"):
        status, problem = talk(kind + length + repeated, body)
        assert status == "400" and "sent 2 times" in problem


def test_parameters_of_the_url_are_ignored_unless_they_name_a_field(live: Live) -> None:
    """As OpenAI's servers ignore them; but K in the URL would be a K that is not used."""
    body = {"prompt": "x", "max_tokens": 1}
    assert httpx.post(f"{live.url}/v1/completions?api-version=1&x=", json=body).status_code == 200
    refused = httpx.post(f"{live.url}/v1/completions?num_steps=8", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "num_steps"


def test_concurrent_strangers_get_what_they_get_alone(live: Live) -> None:
    client = live.client()

    def ask(i: int) -> str:
        body = {"num_steps": 1 + i % 8}
        return (
            client.completions.create(
                model="tiny", prompt="the word " * (1 + i), max_tokens=12, seed=i, extra_body=body
            )
            .choices[0]
            .text
        )

    alone = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_two_events_in_one_segment_split_on_a_blank_line(live: Live) -> None:
    """A client that waits lets events pile up in one read; splitting on "\\n\\n" alone must give them all
    back."""
    body = json.dumps(
        {"prompt": "x", "max_tokens": 20, "stream": True, "temperature": 0, "ignore_eos": True}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: "
        f"application/json\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(0.5)
        raw = b""
        while received := connection.recv(1 << 16):
            raw += received
    payload, rest = b"", raw.partition(b"\r\n\r\n")[2]
    while rest:  # undo chunked transfer encoding
        size, _, rest = rest.partition(b"\r\n")
        payload, rest = payload + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    events = payload.split(b"\n\n")
    assert b"\r" not in payload and len(events) == 22 and events[-2:] == [b"data: [DONE]", b""]
    assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in events[:-2])


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels_the_work(live: Live, stream: bool) -> None:
    """Long answers whose clients leave end before their 2000 tokens: each is counted as cancelled, and none
    as finished."""
    before = metric(live, 'rdlm_sequences_total{finish="abort"}')
    body = {"prompt": "x", "max_tokens": 2000, "num_steps": 8, "stream": stream, "ignore_eos": True, "n": 16}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{live.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.5)
        ) if not stream else _leave(live, body)
    deadline = time.monotonic() + 120
    while metric(live, 'rdlm_sequences_total{finish="abort"}') < before + 16:
        assert time.monotonic() < deadline, "they run on"
        time.sleep(0.02)
    assert metric(live, "rdlm_running_sequences") == 0
    assert live.client().completions.create(model="tiny", prompt="x", max_tokens=4).choices


def test_half_a_body_is_no_defect_of_the_server(live: Live) -> None:
    """A client that announces more than it sends and hangs up: counted as one that left (499), by no error of
    ours."""

    def refused(status: int) -> float:
        text = httpx.get(f"{live.url}/metrics").text
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if f'refusals_total{{status="{status}"}}' in line
        )

    left, defects = refused(499), refused(500)
    address = httpx.URL(live.url)
    with socket.create_connection((address.host, address.port or 80)) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            "application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        connection.sendall(head.encode() + b'{"prompt": "x')
    deadline = time.monotonic() + 60
    while refused(499) + refused(500) == left + defects:
        assert time.monotonic() < deadline, "it counts as neither"
        time.sleep(0.02)
    assert (refused(499), refused(500)) == (left + 1, defects)


def _leave(live: Live, body: dict[str, Any]) -> None:
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as answer:
        for _ in zip(range(5), answer.iter_lines(), strict=False):
            pass
    raise httpx.ReadTimeout("left on purpose")


def metric(server: Live, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[-1])


def test_sigterm_loses_no_accepted_request(checkpoint: Path, tmp_path: Path) -> None:
    """Running and still waiting, streamed and in one piece: all are answered in full. Whatever comes later is
    refused."""
    server = launch(
        checkpoint, tmp_path, "--drain-seconds", "120", "--max-slots", "2", "--log-format", "json"
    )
    client = server.client()

    def ask(i: int) -> int:
        body: dict[str, Any] = {
            "model": "tiny:k8",
            "prompt": "x",
            "max_tokens": 400,
            "extra_body": {"ignore_eos": True},
        }
        if i % 2:
            answer = client.completions.create(**body)
            return answer.usage.completion_tokens if answer.usage else 0
        return sum(1 for part in client.completions.create(**body, stream=True) if part.choices)

    with ThreadPoolExecutor(6) as pool:
        counts = [pool.submit(ask, i) for i in range(6)]
        while metric(server, "rdlm_running_sequences") + metric(server, "rdlm_queue_sequences") < 6:
            assert not any(count.done() for count in counts)
            time.sleep(0.02)
        assert not any(count.done() for count in counts)
        server.process.send_signal(signal.SIGTERM)
        late = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        while late.status_code == 200:  # sent before the signal arrived
            late = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert [count.result(120) for count in counts] == [400] * 6
    assert server.process.wait(60) == 0
    said = (server.process.stdout.read() if server.process.stdout else "").splitlines()
    own = [line for line in said if line.startswith("rdlm: ")]
    assert [line.split()[1] for line in own] == ["loading", "serving", "draining"]
    assert "serving tiny at http://127.0.0.1:" in own[1] and "a page to try it at" in own[1]
    logged = [json.loads(line) for line in said if line.startswith("{")]
    answered = [line for line in logged if line.get("path") == "/v1/completions" and line["status"] == 200]
    assert len(answered) >= 6 and len({line["request_id"] for line in answered}) == len(answered)


def test_what_outlives_the_drain_ends_with_503(checkpoint: Path, tmp_path: Path) -> None:
    """Running, waiting and streamed requests at the hard end: each is told so in OpenAI's form, and the log
    has no traceback."""
    server = launch(checkpoint, tmp_path, "--drain-seconds", "0.2", "--max-slots", "2")
    body = {"prompt": "x", "max_tokens": 2000, "num_steps": 8, "ignore_eos": True}

    def ask(stream: bool) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=120)

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, i == 0) for i in range(4)]
        while metric(server, "rdlm_running_sequences") + metric(server, "rdlm_queue_sequences") < 4:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        first, *others = [answer.result(120) for answer in answers]
    assert [(a.status_code, a.json()["error"]["code"]) for a in others] == [(503, "aborted")] * 3
    events = first.text.split("\n\n")
    assert first.status_code == 200 and events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "aborted"
    assert server.process.wait(60) == 0
    said = server.process.stdout.read() if server.process.stdout else ""
    assert "Traceback" not in said, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_is_gone_keeps_no_server_from_its_end(
    number: signal.Signals, checkpoint: Path, tmp_path: Path
) -> None:
    """Nobody reads what it says, on either stream; a closed terminal is the same wish as SIGTERM."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it inherits what nohup has set, and respects it
    server = launch(checkpoint, tmp_path, "--log-format", "json")
    signal.signal(signal.SIGHUP, before)
    assert server.process.stdout is not None
    server.process.stdout.close()
    body = {"prompt": "x", "max_tokens": 100, "num_steps": 8, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=120)
        while metric(server, "rdlm_running_sequences") < 1 and not answer.done():
            time.sleep(0.01)
        server.process.send_signal(number)
        assert answer.result(120).status_code == 200
    assert server.process.wait(60) == 0


def test_odd_hosts_reach_no_defect(live: Live) -> None:
    """As bytes on a socket: clients' libraries do not send them."""
    address = httpx.URL(live.url)
    for host, status in (
        (b"a:99999", 403),
        (b"evil.example", 403),
        (b"a:b", 403),
        (b"localhost:99999", 200),
        (b"[::1]:b", 200),
    ):
        with socket.create_connection((address.host, address.port or 80)) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert int(answer.split()[1]) == status, answer
        json.loads(answer.partition(b"\r\n\r\n")[2])


def test_after_sigkill_the_same_command_serves_again(checkpoint: Path, tmp_path: Path) -> None:
    """Nothing of a killed server stands in the way: not its port, not its port file, not its clients'
    connections."""
    server = launch(checkpoint, tmp_path)

    def ask(live: Live) -> str:
        body = {"prompt": "in the", "max_tokens": 12, "seed": 3, "num_steps": 5, "ignore_eos": True}
        return httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    expected = ask(server)
    body = {"prompt": "x", "max_tokens": 2000, "num_steps": 8, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.kill()
        with pytest.raises(
            httpx.TransportError
        ):  # a client sees that the stream broke: no [DONE], no end of the body
            list(lines)
    assert server.process.wait(60) == -signal.SIGKILL
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    again = launch(checkpoint, tmp_path, "--port", str(server.port))
    try:
        assert again.port == server.port and ask(again) == expected
    finally:
        again.process.terminate()
        assert again.process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-steps", "99"], "default_steps=99"),
        (["--dtype", "int3"], "dtype='int3'"),
        (["--port", "70000"], "port=70000"),
        (["--max-len", "99999"], "max_len=99999"),
        (["--drain-seconds", "1e300"], "drain_seconds=1e+300"),
        (["--model-name", "a:k4"], "model_name='a:k4'"),
        (["--model-name", ""], "--model-name=''"),
    ],
)
def test_bad_options_exit_2_with_one_line(options: list[str], says: str, checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rdlm",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        "0",
        *options,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and says in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_generate_command(checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rdlm",
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--prompt",
        "in the",
    ]
    ended = subprocess.run(
        [*command, "--num-steps", "1,8", "--max-tokens", "6"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("tokens/s") == 2 and "K = 8" in ended.stdout and "core steps" in ended.stdout
    wrong = subprocess.run([*command, "--num-steps", "1,900"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "1 to 8" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_page_runs_in_a_browser(live: Live, tmp_path: Path) -> None:
    """Headless Chromium runs its script under its own content policy: the model's name and range arrive,
    nothing fails."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    shot = tmp_path / "page.png"
    common = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=390,844",
        "--virtual-time-budget=5000",
    ]
    seen = subprocess.run(
        [*common, "--dump-dom", f"{live.url}/"], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert '<h1 id="name">tiny</h1>' in seen and "K from 1 to 8" in seen and 'max="8"' in seen
    subprocess.run(
        [*common, f"--screenshot={shot}", f"{live.url}/"], check=True, capture_output=True, timeout=120
    )
    assert shot.stat().st_size > 5000
