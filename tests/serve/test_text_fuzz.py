"""Stop strings across tokens and chat templates: texts and ids are those that transformers gives for any text."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.chat_template import ChatTemplate
from serve.engine.detokenizer import Detokenizer, StopStrings
from tests.rdlm.test_tokenizer_fuzz import KINDS, TEXT, both

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|pad|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "trimmed": "{%- for m in messages -%}{%- if m.role == 'user' -%}[INST] {{ m.content | trim }} [/INST]"
    "{%- else -%}{{ m.content }}<tool>{%- endif -%}{%- endfor -%}",
    "json": "{% for m in messages %}{{ m | tojson }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}",
}
ODD = st.sampled_from(["{{ 1 }}", "{% raw %}", "'\"", "\u2028", "\x85", "<|im_start|>", "\\n"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    text=TEXT,
    cuts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5), st.sampled_from(["", "x", "日"]))),
)
def test_a_text_ends_where_a_stop_string_is_first_complete(
    kind: str, text: str, cuts: list[tuple[int, int, str]]
) -> None:
    """Stop strings are pieces of the text, wherever tokens end; the prefixes are decoded by transformers."""
    ours, theirs = both(kind)
    ids = ours.encode(text)

    def decoded(count: int) -> str:
        return theirs.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    whole = ours.decode(ids)
    space = " " if whole != decoded(len(ids)) else ""  # of llama 2, put before a text
    stops = [whole[a : a + length] + more for a, length, more in cuts]
    stops = [stop for stop in stops if stop and "\ufffd" not in stop]
    begins = [
        [at for stop in stops if (at := (space + decoded(count)).find(stop)) >= 0]
        for count in range(len(ids) + 1)
    ]
    expected = next((whole[: min(found)] for found in begins if found), whole)
    stream, said, stopped = Detokenizer(ours, StopStrings(stops)), "", False
    for token in ids:
        piece, stopped = stream.feed(token)
        said += piece
        if stopped:
            break
    assert said + ("" if stopped else stream.finish()) == expected and stopped == any(begins)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(
        st.tuples(
            st.sampled_from(["user", "assistant", "system"]), st.lists(st.one_of(TEXT, ODD)).map("".join)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_conversation_has_the_ids_of_transformers(name: str, messages: list[tuple[str, str]]) -> None:
    ours, theirs = both(KINDS[0])
    ours = copy.copy(ours)
    ours.chat_template = TEMPLATES[name]
    given_messages = [{"role": role, "content": content} for role, content in messages]
    template = ChatTemplate.of(ours)
    assert template is not None
    written = template.render(given_messages, {})
    expected = theirs.apply_chat_template(
        given_messages,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert ours.encode(written) == list(expected)
