"""The page at / in headless Chromium: what a person does with it, by mouse and by keyboard, on a phone and in
the dark.

Needs playwright (`pip install playwright==1.65.2`) and a Chromium: Debian's `chromium`, Chrome, or
`playwright install chromium`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.client import running_server
from rdlm.checkpoints.folder import save
from serve.engine.engine import Served

pytestmark = [pytest.mark.slow, pytest.mark.multiproc]
PATIENCE = 120_000
"""Milliseconds: machines that run other work are slow."""


@contextmanager
def _serving(served: Served, folder: Path) -> Iterator[str]:
    """Address of a server process."""
    save(folder, served.runner.denoiser, served.config, served.tokenizer)  # type: ignore[attr-defined]
    with running_server(folder, "--max-slots 8") as server:
        yield server.url


@pytest.fixture(scope="module")
def url(make_served: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _serving(make_served(max_seq_len=512), tmp_path_factory.mktemp("page") / "tiny") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """``visit(**context_options)`` -> the page, greeted by the server; the script must not have failed by the
    end of the test."""
    contexts, problems = [], []

    def open_page(address: str = url, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if _is_defect(message) else None)
        page.goto(address)
        page.wait_for_function("() => document.getElementById('k').max > 1")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def _is_defect(message: Any) -> bool:
    """A refused request is logged by the browser itself, and is an answer."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def ended(page: Any, how: str = "done") -> None:
    page.wait_for_function("how => document.getElementById('said').textContent === how", arg=how)


def _fulfill(answer: dict[str, Any], route: Any) -> None:
    route.fulfill(**answer)


def tokens(page: Any, panel: int = 0) -> Any:
    return page.locator("article").nth(panel).locator("p span:not(.prompt)")


def test_several_k_side_by_side_stream_and_say_what_the_api_says(visit: Callable[..., Any], url: str) -> None:
    page = visit()
    assert page.locator("#order").is_hidden() and page.locator("#exit").is_visible()
    assert (
        page.locator("#name").inner_text() == "tiny"
        and "K from 1 to 8" in page.locator("#about").inner_text()
    )
    page.fill("#prompt", "in the beginning")
    page.fill("#compare", "1, 4 2")
    page.fill("#tokens", "40")
    seen: list[int] = []
    page.expose_function("note", lambda count: seen.append(count))
    page.evaluate("""new MutationObserver(() => note(document.querySelectorAll("article:last-child p span").length - 1))
                     .observe(document.getElementById("answers"), { childList: true, subtree: true })""")
    page.click("#go")
    ended(page)
    assert page.locator("article h2").all_inner_texts() == ["K = 1", "K = 2", "K = 4"]
    assert len({count for count in seen if 0 < count < 40}) > 5, "tokens did not arrive one by one"
    for i, k in enumerate((1, 2, 4)):
        body = {"prompt": "in the beginning", "num_steps": k, "max_tokens": 40, "temperature": 0.8, "seed": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert "".join(tokens(page, i).all_text_contents()) == answer["choices"][0]["text"]
        count, cost = answer["usage"]["completion_tokens"], answer["usage"]["recurrence"]["core_steps"]
        note = page.locator("article .note").nth(i).inner_text()
        assert note.startswith(f"{count} tokens · ") and " tokens/s" in note and f"{cost} core steps" in note
    assert page.locator("#legend").inner_text().split() == ["probable", "improbable"]


def test_a_masked_model_asks_for_an_order_and_for_nothing_it_has_not(
    visit: Callable[..., Any], make_served: Callable[..., Served], tmp_path: Path
) -> None:
    with _serving(make_served("masked", "masked"), tmp_path / "tiny") as address:
        page = visit(address)
        assert (
            page.locator("#order").is_visible()
            and page.locator("#exit").is_hidden()
            and page.locator("#threshold").is_hidden()
        )
        assert page.locator("label[for=steps]").inner_text() == "Steps that fill the answer in, K"
        assert page.input_value("#k") == "2" and page.locator("#score").is_hidden()
        for order in ("confidence", "left_to_right"):
            page.select_option("#order", order)
            page.fill("#tokens", "30")
            page.click("#go")
            ended(page)
            body = {
                "prompt": "And it came to pass",
                "num_steps": 2,
                "max_tokens": 30,
                "temperature": 0.8,
                "seed": 0,
                "order": order,
            }
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
            assert "".join(tokens(page).all_text_contents()) == answer["choices"][0]["text"]


def test_keyboard_alone(visit: Callable[..., Any]) -> None:
    page = visit()
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Tab")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.input_value("#k") == "7" and page.get_attribute("#steps", "aria-valuetext") == "7"
    page.fill("#tokens", "400")
    page.keyboard.press("Control+Enter")
    tokens(page).nth(3).wait_for(state="attached")
    page.keyboard.press("Escape")
    ended(page, "stopped")
    assert "stopped" in page.locator("article .note").inner_text() and tokens(page).count() < 400
    page.fill("#tokens", "3")
    page.focus("#go")
    page.keyboard.press("Enter")
    ended(page)
    assert page.evaluate("document.activeElement.id") == "go", (
        "the button keeps the focus, for the next answer"
    )
    page.focus("article p")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.locator(".detail").inner_text().startswith("token 2 ")
    page.focus("#generate")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "score" and page.inner_text("#go") == "Score"


def test_the_slider_is_logarithmic(visit: Callable[..., Any]) -> None:
    page = visit()
    places = page.evaluate("() => [1, 2, 4, 8].map(k => { setK(k); return $('steps').valueAsNumber; })")
    assert places == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert page.evaluate("() => { $('k').max = 64; return ladder(); }")[-4:] == [42, 50, 60, 64]


def test_a_token_tells_its_alternatives_and_every_steps_prediction(
    visit: Callable[..., Any], url: str
) -> None:
    page = visit()
    page.fill("#k", "4")
    page.fill("#tokens", "5")
    page.click("#more summary")
    page.check("#trajectory")
    page.click("#go")
    ended(page)
    page.focus("article p")
    page.keyboard.press("ArrowRight")
    alternatives, path = (page.locator(".detail table").nth(i).locator("tbody tr") for i in range(2))
    assert alternatives.count() == 5 and path.locator("td:first-child").all_inner_texts() == ["1", "2", "3"]
    body = {
        "prompt": "And it came to pass",
        "num_steps": 4,
        "max_tokens": 1,
        "temperature": 0.8,
        "seed": 0,
        "logprobs": 1,
    }
    top = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]
    assert f"({top['token_logprobs'][0]:.3f})" in page.locator(".detail").inner_text()


def test_panels_show_where_they_part(visit: Callable[..., Any]) -> None:
    page = visit()
    page.fill("#compare", "1, 8")
    page.click("#go")
    ended(page)
    texts = [tokens(page, i).all_text_contents() for i in range(3)]
    for i, k in ((1, 2), (2, 8)):
        place = next(
            at for at, pair in enumerate(zip(texts[0], texts[i], strict=False)) if len(set(pair)) == 2
        )
        assert f"differs from K = 1 at token {place + 1}" in page.locator("article .note").nth(i).inner_text()
        assert page.locator("article h2").nth(i).inner_text() == f"K = {k}"


def test_a_text_is_scored_at_many_k(visit: Callable[..., Any], url: str) -> None:
    page = visit()
    page.click("#score")
    page.fill("#prompt", "in the beginning")
    page.click("#go")
    ended(page)
    body = {"prompt": "in the beginning", "num_steps": [1, 2, 4, 8]}
    scores = httpx.post(f"{url}/v1/score", json=body, timeout=60).json()["scores"][0]
    count = len(scores["tokens"]) - 1
    rows = page.locator(".heat tbody tr")
    assert rows.count() == 4 and page.locator(".heat td").count() == 4 * count
    heads = [f"{k} ({-scores['logprob'][str(k)] / count:.3f})" for k in (1, 2, 4, 8)]
    assert page.locator(".heat tbody th").all_inner_texts() == heads
    assert all(head.split("(")[1][:-1] in page.get_attribute("svg", "aria-label") for head in heads)
    page.focus(".heat")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    shown = page.locator(".detail tbody tr").all_inner_texts()
    assert [line.split()[1] for line in shown] == [
        f"{scores['token_logprobs'][str(k)][2]:.3f}" for k in (1, 2, 4, 8)
    ]


def test_a_conversation_goes_on(visit: Callable[..., Any]) -> None:
    page = visit()
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if "chat" in request.url else None)
    page.click("#chat")
    for message in ("the word", "and it came"):
        page.fill("#prompt", message)
        page.fill("#tokens", "6")
        page.click("#go")
        ended(page)
    assert page.locator("article h2").all_inner_texts()[::2] == ["user", "user"]
    assert [m["role"] for m in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert sent[1]["messages"][1]["content"] == page.locator("article p").nth(1).evaluate(
        "p => p.textContent"
    )
    page.click("#clear")
    assert page.locator("article").count() == 0


def test_settings_are_kept_and_travel_in_links(visit: Callable[..., Any], url: str) -> None:
    page = visit()
    page.fill("#prompt", "ærlig & #talt")
    page.fill("#k", "5")
    page.fill("#tokens", "7")
    page.click("#link")
    link = page.url
    page.goto(url)
    page.wait_for_function("() => document.getElementById('k').max > 1")
    assert page.input_value("#tokens") == "7", "kept by the browser"
    other = visit(link)
    assert [other.input_value(f"#{name}") for name in ("prompt", "k", "tokens")] == [
        "ærlig & #talt",
        "5",
        "7",
    ]
    other.click("#go")
    ended(other)
    with other.expect_download() as download:
        other.click("#save")
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved[0]["request"]["num_steps"] == 5 and len(saved[0]["tokens"]) == 7


def test_steps_of_each_token_are_shown_as_colour_and_in_words(visit: Callable[..., Any]) -> None:
    page = visit()
    page.fill("#k", "8")
    page.select_option("#exit", "latent-diff")
    page.fill("#threshold", "0.6")
    page.fill("#tokens", "30")
    page.click("#go")
    ended(page)
    titles = tokens(page).evaluate_all("spans => spans.map(s => s.title)")
    colours = tokens(page).evaluate_all("spans => spans.map(s => s.style.background)")
    assert all(title.partition(" ")[2] in ("step", "steps") for title in titles) and all(colours)
    assert len(set(colours)) == len(set(titles)) and dict(zip(titles, colours, strict=True)).keys() == set(
        titles
    )
    assert (
        page.locator("#legend").inner_text().split() == ["1", "step", "8", "steps"]
        and "steps a token" in page.locator("article .note").inner_text()
    )


def test_mistakes_are_said_where_they_are_made(visit: Callable[..., Any], url: str) -> None:
    page = visit()
    for field, value, says in (
        ("#compare", "4, 900", "900 is no K from 1 to 8"),
        ("#tokens", "", ""),
        ("#prompt", "", ""),
    ):
        before = page.input_value(field)
        page.fill(field, value)
        page.click("#go")
        assert page.locator("article").count() == 0 and not page.locator(field).evaluate(
            "field => field.checkValidity()"
        )
        assert says in page.locator(field).evaluate("field => field.validationMessage")
        page.fill(field, before)


def test_what_goes_wrong_is_said_and_what_came_stays(visit: Callable[..., Any]) -> None:
    """An error within a stream; a stream that breaks off after comments and a token; a server that is gone."""
    page = visit()
    token = "data: " + json.dumps(
        {"choices": [{"index": 0, "text": "so far", "finish_reason": None, "logprobs": None}]}
    )
    refusal = "data: " + json.dumps({"error": {"message": "the model failed"}})
    for body, says in ((refusal, "the model failed"), (token, "broke before the answer was complete")):
        answer = {"status": 200, "body": f": ping\n\n{body}\n\n: ping\n\n"}
        page.route("**/v1/completions", partial(_fulfill, answer))
        page.click("#go")
        ended(page, "failed")
        assert says in page.locator("article [role=alert].bad").inner_text()
    assert tokens(page).all_text_contents() == ["so far"]
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("#go")
    ended(page, "failed")
    assert page.locator("article .bad").inner_text() == "the server cannot be reached"


def test_texts_of_models_and_long_prompts_are_only_text(visit: Callable[..., Any]) -> None:
    page = visit()
    hostile = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script></p>"
    logprobs = {
        "tokens": [hostile],
        "token_logprobs": [-1],
        "top_logprobs": [{hostile: -1}],
        "text_offset": [0],
    }
    choice = {"index": 0, "text": hostile, "finish_reason": "length", "logprobs": logprobs}
    said = json.dumps({"choices": [choice], "warnings": [hostile]})
    body = f"data: {said}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", partial(_fulfill, {"status": 200, "body": body}))
    page.fill("#prompt", hostile + "long " * 10_000)
    page.click("#go")
    ended(page, "done")
    tokens(page).first.click()
    assert tokens(page).all_text_contents() == [hostile] and page.locator(".detail").inner_text().count(
        "onerror"
    )
    assert page.locator("#answers img, #answers script").count() == 0 and "taken" not in page.title()
    assert len(page.locator("article .prompt").inner_text()) < 2100, "its end says where the answer begins"


def test_it_waits_for_a_server_that_loads(visit: Callable[..., Any]) -> None:
    loading = {"error": {"message": "the server is loading; try again later"}}
    page = visit()
    page.route("**/v1/models", lambda route: route.fulfill(status=503, body=json.dumps(loading)), times=1)
    page.reload()
    page.wait_for_function("() => document.getElementById('about').textContent.includes('loading')")
    page.wait_for_function("() => document.getElementById('k').max > 1")
    assert "bad" not in (page.locator("#about").get_attribute("class") or "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_in_both_schemes(visit: Callable[..., Any], scheme: str) -> None:
    page = visit(
        viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True, color_scheme=scheme
    )
    page.fill("#compare", "1, 4")
    page.fill("#tokens", "12")
    page.tap("#go")
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [page.locator("article").nth(i).bounding_box() for i in range(3)]
    assert all(box["x"] == boxes[0]["x"] and box["width"] > 300 for box in boxes), "one under the other"
    assert page.locator("#go").bounding_box()["height"] >= 44
    ratio = page.evaluate(CONTRAST)
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)") == (
        scheme == "dark"
    )
    assert all(value >= 4.5 for value in ratio.values()), ratio
    page.tap("#score")
    page.tap("#go")
    ended(page)
    height = page.locator("svg text").first.bounding_box()["height"]
    assert height >= 11 and page.evaluate("document.documentElement.scrollWidth") <= 360, (
        "its texts keep their size"
    )


CONTRAST = """() => {
  const numbers = css => css.match(/[0-9.]+/g).map(Number);
  const light = rgb => { const [r, g, b] = rgb.map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const between = (one, other) => { const [a, b] = [one, other].map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); };
  const colour = element => numbers(getComputedStyle(element).color).slice(0, 3);
  const behind = element => numbers(getComputedStyle(element).backgroundColor).slice(0, 3);
  const [article, soft, go] = ["article", "article .soft", "#go"].map(name => document.querySelector(name));
  const token = document.createElement("span");
  article.append(token);
  const shades = Array.from({ length: 21 }, (_, i) => {
    token.style.background = shade(i / 20);
    const [r, g, b, alpha] = numbers(getComputedStyle(token).backgroundColor);
    return between(colour(article), behind(article).map((under, j) => (1 - alpha) * under + alpha * [r, g, b][j]));
  });
  token.remove();
  return { text: between(colour(document.body), behind(document.body)), card: between(colour(article), behind(article)),
    soft: between(colour(soft), behind(article)), button: between(colour(go), behind(go)),
    shades: Math.min(...shades) };
}"""
"""WCAG contrast of the page's texts with what is behind them, the shades of steps per token included."""


def test_a_model_of_noise_levels_offers_its_samplers_and_one_likelihood(
    visit: Callable[..., Any], make_served: Callable[..., Served], tmp_path: Path
) -> None:
    with _serving(make_served("evidence"), tmp_path / "tiny") as address:
        page = visit(address)
        assert page.locator("#exit").is_hidden() and page.locator("#sampler").is_visible()
        assert page.locator("label[for=steps]").inner_text() == "Noise levels of each token, K"
        page.select_option("#sampler", "dpmpp_2m")
        page.fill("#tokens", "12")
        page.click("#go")
        ended(page)
        body = {
            "prompt": "And it came to pass",
            "num_steps": 2,
            "max_tokens": 12,
            "temperature": 0.8,
            "seed": 0,
            "sampler": "dpmpp_2m",
        }
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
        assert "".join(tokens(page).all_text_contents()) == answer["choices"][0]["text"]
        page.click("#score")
        page.click("#go")
        ended(page)
        assert page.locator(".heat tbody tr").count() == 1 and page.locator("svg").count() == 0
