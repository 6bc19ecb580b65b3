"""Two replicas under a local Ray. Needs ray (extra ``ray``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from rdlm.checkpoints.folder import save
from rdlm.errors import UserError
from serve.engine.engine import Served

ray = pytest.importorskip("ray", reason="ray is not installed (extra ray)")
pytestmark = [pytest.mark.slow, pytest.mark.multiproc]
PORT = 18471


@pytest.fixture(scope="module")
def url(make_served: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve as ray_serve

    from serve.ray_app import build

    served = make_served()
    folder = tmp_path_factory.mktemp("ray") / "tiny"
    save(folder, served.runner.denoiser, served.config, served.tokenizer)  # type: ignore[attr-defined]
    root = str(Path(__file__).parents[2])
    environment = {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": environment},
    )
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        ray_serve.run(
            build({"checkpoint": str(folder), "replicas": "2", "cpus": 0.1, "http": {"api_keys": ["one"]}})
        )
        yield f"http://127.0.0.1:{PORT}"
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def test_two_replicas_answer_alike(url: str) -> None:
    headers = {"authorization": "Bearer one"}
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 401

    def ask(seed: int) -> dict[str, Any]:
        body = {
            "prompt": "in the",
            "num_steps": 1 + seed % 8,
            "seed": seed,
            "max_tokens": 8,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    text = httpx.get(f"{url}/metrics", headers=headers).text  # of one replica, whichever answers
    drawn = float(next(line for line in text.splitlines() if line.startswith("rdlm_tokens_total")).split()[1])
    assert 0 < drawn < 2 * 8 * 8, "both replicas have worked"


def test_streams_pass_through(url: str) -> None:
    body = {"prompt": "x", "max_tokens": 5, "stream": True, "ignore_eos": True, "seed": 1}
    text = httpx.post(
        f"{url}/v1/completions", json=body, headers={"authorization": "Bearer one"}, timeout=60
    ).text
    assert text.count("data: ") == 6 and text.endswith("data: [DONE]\n\n")


def test_wrong_arguments_are_named() -> None:
    from serve.ray_app import build

    with pytest.raises(UserError, match="replicas"):
        build({"checkpoint": "x", "replicas": 0})
