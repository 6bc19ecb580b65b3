"""How models spell calls of tools: one class for each spelling, recognised from the chat template.

A spelling has two sides: the rules of one call in a grammar, and a reader that turns what follows the head of a call
into the JSON text of its arguments. Both follow the parameters' schema in the same way, so that reading needs no
guesses.
"""

from __future__ import annotations

import json
import keyword
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from serve.api.tools import Tool, begun
from serve.engine.grammar import choice_rule, json_rule, special_rule
from serve.errors import invalid, shorten

NAME = r"([a-zA-Z0-9_.-]{1,64})"
"""Name of a function in the head of a call."""
ID = "[a-zA-Z0-9]{9}"
"""Identifier of a call, where the model names it itself."""


class ArgumentReader(Protocol):
    """Reads the arguments of one call, as they arrive."""

    is_closed: bool

    def feed(self, text: str) -> tuple[int, str]:
        """Characters of ``text`` that are done with, and their part of the JSON text."""


@dataclass(frozen=True)
class ToolFormat(ABC):
    """How an answer spells its calls: ``open``, then the calls joined by ``between``, then ``close``."""

    open: str
    between: str | None
    """None: one call at most."""
    close: str
    short_ids: bool = False
    """Whether the template takes ids of nine letters and digits only."""
    first: str = ""
    """The first character of a call, where nothing else tells it from text."""
    tag: str = ""
    """A special token that may stand before all of it."""

    @property
    def mark(self) -> str:
        """What tells a call from text."""
        return self.first or self.open.split("\n")[0].split(" ")[0].removesuffix("[")

    @property
    @abstractmethod
    def head(self) -> re.Pattern[str]:
        """What stands before the arguments of a call; groups: name and, where the model gives it, id."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """The fixed texts of calls."""
        return (self.open, self.close, self.tag)

    @abstractmethod
    def rules(self, name: str, tool: Tool, special: Mapping[str, int]) -> list[str]:
        """Rules of a grammar that make one call, the first of them called ``name``. Raises ApiError."""

    @abstractmethod
    def arguments(self, tool: Tool) -> ArgumentReader:
        """A reader for the arguments of one call of ``tool``."""

    def new_id(self) -> str:
        letters = string.ascii_letters + string.digits
        if self.short_ids:
            return "".join(secrets.choice(letters) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def spelt(self, special: Mapping[str, int]) -> frozenset[int]:
        """Special tokens that calls consist of."""
        return frozenset(i for name, i in special.items() if name and name in "\0".join(self.spellings))


# JSON objects: Hermes, Qwen, Llama 3, Mistral ------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonCalls(ToolFormat):
    """A call is its name and its arguments, a JSON object, with ``call`` before, between and behind them."""

    call: tuple[str, str, str] = ("", "", "")
    id_mark: str = ""
    """What stands between the name and an id that the model gives the call; "" where it gives none."""

    @property
    def head(self) -> re.Pattern[str]:
        given = f"{re.escape(self.id_mark)}({ID})" if self.id_mark else "()"
        return re.compile(re.escape(self.call[0]) + NAME + given + re.escape(self.call[1]))

    @property
    def spellings(self) -> tuple[str, ...]:
        return (*super().spellings, *self.call, self.id_mark)

    def rules(self, name: str, tool: Tool, special: Mapping[str, int]) -> list[str]:
        before, between, behind = self.call
        head = special_rule(f"{before}{tool.name}{self.id_mark or between}", special)
        if self.id_mark:
            head += f" /{ID}/ {special_rule(between, special)}"
        return [f"{name}: {head} {json_rule(tool.parameters)} {special_rule(behind, special)}"]

    def arguments(self, tool: Tool) -> ArgumentReader:
        return JsonArguments()


class JsonScan:
    """Where in JSON a text is that arrives by characters."""

    def __init__(self) -> None:
        self.depth, self._in_string, self._escaped = 0, False, False

    @property
    def is_outside(self) -> bool:
        """Whether nothing is open."""
        return not self.depth and not self._in_string

    def step(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1


class JsonArguments:
    """A JSON object as it is."""

    def __init__(self) -> None:
        self._scan = JsonScan()
        self.is_closed = False

    def feed(self, text: str) -> tuple[int, str]:
        for at, char in enumerate(text):
            self._scan.step(char)
            if char == "}" and self._scan.is_outside:
                self.is_closed = True
                return at + 1, text[: at + 1]
        return len(text), text


# One parameter after the other: Qwen3-Coder, Llama 3.2 ---------------------------------------------------------------


def parameters_of(tool: Tool) -> dict[str, Any]:
    """Schema of each parameter, the required ones without a schema too. Raises ApiError for what cannot be said of
    parameters one by one."""
    structure = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
    known = structure | {"$schema", "$id", "title", "description", "examples", "default", "strict"}
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    properties, required = tool.parameters.get("properties", {}), tool.parameters.get("required", [])
    problem = None
    if unknown := sorted(map(str, tool.parameters.keys() - known)):
        problem = (
            f"this model's calls have one parameter after the other, which cannot be held to {unknown[0]!r}"
        )
    elif not isinstance(properties, dict):
        problem = "properties must be an object"
    elif not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        problem = "required must be a list of names"
    elif not all(isinstance(schema, dict | bool) for schema in properties.values()):
        problem = "the schema of a property is an object"
    if problem:
        raise invalid(f"{tool.field}: {shorten(problem, 200)}; change it", tool.field)
    schemas = properties | {name: {} for name in required if name not in properties}
    return {name: _with(schema, shared) for name, schema in schemas.items()}


def _with(schema: Any, shared: Mapping[str, Any]) -> Any:
    return {**shared, **schema} if isinstance(schema, dict) else schema


def _is_optional(tool: Tool, name: str) -> bool:
    return name not in tool.parameters.get("required", ())


@dataclass(frozen=True)
class XmlCalls(ToolFormat):
    """Qwen3-Coder: ``<function=NAME>``, ``<parameter=NAME>`` with a value on lines of its own, ``</function>``.

    A text of any kind stands as it is, as do the texts of an enumeration; every other value is JSON.
    """

    @property
    def head(self) -> re.Pattern[str]:
        return re.compile(f"<function={NAME}()>\n")

    def rules(self, name: str, tool: Tool, special: Mapping[str, int]) -> list[str]:
        parts, rules = [], []
        for number, (parameter, schema) in enumerate(parameters_of(tool).items()):
            if re.search(r"[>\n]", parameter):
                problem = (
                    f"this model cannot name a parameter {shorten(parameter)!r}; name it without > and lines"
                )
                raise invalid(f"{tool.field}: {problem}", tool.field)
            value, end = f"{name}v{number}", XmlArguments.END
            opened = json.dumps(f"<parameter={parameter}>\n")
            if (texts := _texts(schema)) is None:
                rules.append(f"{value}: {opened} {json_rule(schema)} {json.dumps(end)}")
            elif texts:
                rules.append(f"{value}: {opened} ({choice_rule(texts)}) {json.dumps(end)}")
            else:
                rules += [f"{value}: {opened} {value}text", rf"{value}text[lazy]: /(.|\n)*{_literal(end)}/"]
            parts.append(value + "?" * _is_optional(tool, parameter))
        start, end = (json.dumps(text) for text in (f"<function={tool.name}>\n", "</function>"))
        return [f"{name}: {start} {' '.join(parts)} {end}", *rules]

    def arguments(self, tool: Tool) -> ArgumentReader:
        return XmlArguments(
            {name for name, schema in parameters_of(tool).items() if _texts(schema) is not None}
        )


def _literal(text: str) -> str:
    """``text`` in a regular expression between slashes."""
    return text.replace("/", r"\/").replace("\n", r"\n")


def _texts(schema: Any) -> list[str] | None:
    """The texts that a value may be where it stands as it is, [] for any; None where it is JSON."""
    if not isinstance(schema, dict) or schema.get("type", "string") != "string":
        return None
    told = schema.keys() - {"title", "description", "default", "examples", "$defs", "definitions", "type"}
    if told == {"enum"}:
        texts = schema["enum"]
        fits = (
            isinstance(texts, list)
            and texts
            and all(isinstance(t, str) and t and END not in t for t in texts)
        )
        return texts if fits else None
    return [] if not told and "type" in schema else None


END = "\n</parameter>\n"


class XmlArguments:
    """Parameters of XmlCalls. texts: those whose value stands as it is."""

    END = END

    def __init__(self, texts: set[str]) -> None:
        self._texts, self._quote = texts, ""
        self._in_value, self._is_first, self.is_closed = False, True, False

    def feed(self, text: str) -> tuple[int, str]:
        if not self._in_value:
            head = re.match(r"<parameter=([^>\n]+)>\n|</function>", text)
            if head is None:
                return 0, ""
            opened, self._is_first = "{" if self._is_first else ", ", False
            self.is_closed, self._in_value = head[1] is None, head[1] is not None
            if self.is_closed:
                return head.end(), "{}" if opened == "{" else "}"
            self._quote = '"' if head[1] in self._texts else ""
            return head.end(), f"{opened}{json.dumps(head[1])}: {self._quote}"
        at = text.find(END)
        certain = at if at >= 0 else len(text) - begun(text, END)
        value = json.dumps(text[:certain], ensure_ascii=False)[1:-1] if self._quote else text[:certain]
        if at < 0:
            return certain, value
        self._in_value = False
        return at + len(END), value + self._quote


@dataclass(frozen=True)
class PythonCalls(ToolFormat):
    """Llama 3.2: ``name(parameter=value, ...)`` with values as in JSON, and True, False and None."""

    @property
    def head(self) -> re.Pattern[str]:
        return re.compile(rf"{NAME}()\(")

    def rules(self, name: str, tool: Tool, special: Mapping[str, int]) -> list[str]:
        parameters = parameters_of(tool)
        after = [f"{name}more{i}" for i in range(len(parameters))] + ['""']
        first = [f"{name}first{i}" for i in range(len(parameters))] + ['""']
        rules = []
        for i, (parameter, schema) in enumerate(parameters.items()):
            if not parameter.isidentifier() or keyword.iskeyword(parameter):
                problem = f"this model cannot name a parameter {shorten(parameter)!r}; name it as Python does"
                raise invalid(f"{tool.field}: {problem}", tool.field)
            is_optional = _is_optional(tool, parameter)
            rules.append(f"{name}value{i}: {json.dumps(parameter + '=')} {_python_rule(schema)}")
            rules.append(
                f'{after[i]}: ", " {name}value{i} {after[i + 1]}' + f" | {after[i + 1]}" * is_optional
            )
            rules.append(f"{first[i]}: {name}value{i} {after[i + 1]}" + f" | {first[i + 1]}" * is_optional)
        return [f'{name}: {json.dumps(tool.name + "(")} {first[0]} ")"', *rules]

    def arguments(self, tool: Tool) -> ArgumentReader:
        return PythonArguments()


def _python_rule(schema: Any) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "boolean" and "enum" not in schema and "const" not in schema:
        return '("True" | "False")'
    return '"None"' if kind == "null" else json_rule(schema)


class PythonArguments:
    """Arguments of PythonCalls."""

    WORDS = {"True": "true", "False": "false", "None": "null"}

    def __init__(self) -> None:
        self._scan, self._is_first = JsonScan(), True
        self._in_value, self._has_begun, self.is_closed = False, False, False

    def feed(self, text: str) -> tuple[int, str]:
        if not self._in_value:
            head = re.match(r"(?:, )?(\w+)=|\)", text)
            if head is None:
                return 0, ""
            opened, self._is_first = "{" if self._is_first else ", ", False
            self.is_closed, self._in_value = head[1] is None, head[1] is not None
            self._has_begun = False
            if self.is_closed:
                return head.end(), "{}" if opened == "{" else "}"
            return head.end(), f"{opened}{json.dumps(head[1])}: "
        if not self._has_begun:
            word = next((word for word in self.WORDS if word.startswith(text[: len(word)])), None)
            if word is not None and not text.startswith(word):
                return 0, ""
            self._has_begun = True
            if word is not None:
                return len(word), self.WORDS[word]
        for at, char in enumerate(text):
            if self._scan.is_outside and char in ",)":
                self._in_value = False
                return (at, text[:at]) if at else self.feed(text)
            self._scan.step(char)
        return len(text), text


# From templates ------------------------------------------------------------------------------------------------------

HERMES = JsonCalls(
    "<tool_call>\n",
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
    call=('{"name": "', '", "arguments": ', "}"),
)
QWEN_CODER = XmlCalls("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")
PYTHON = PythonCalls("[", ", ", "]", first="[")
LLAMA = JsonCalls(
    "", None, "", first="{", tag="<|python_tag|>", call=('{"name": "', '", "parameters": ', "}")
)
MISTRAL = JsonCalls("[TOOL_CALLS]", "[TOOL_CALLS]", "", short_ids=True, call=("", "[ARGS]", ""))
MISTRAL_IDS = JsonCalls(
    "[TOOL_CALLS]", "[TOOL_CALLS]", "", short_ids=True, call=("", "[ARGS]", ""), id_mark="[CALL_ID]"
)


def _mistral_list(space: str) -> JsonCalls:
    call = ('{"name": "', '", "arguments": ', "}")
    return JsonCalls(f"[TOOL_CALLS]{space}[", ", ", "]", short_ids=True, call=call)


def tool_format(template: str) -> ToolFormat | None:
    """How the template's model calls tools; None where it is none of the forms that are known here."""
    if "[TOOL_CALLS]" in template:  # Mistral, since 2025 with [ARGS]
        if "[ARGS]" not in template:
            return _mistral_list(" " if "[TOOL_CALLS] [" in template else "")
        return MISTRAL_IDS if "[CALL_ID]" in template else MISTRAL
    if "<tool_call>" in template and "<arg_key>" not in template:  # Hermes, Qwen
        if "<function=" not in template:
            return HERMES
        return QWEN_CODER if "<parameter=" in template else None
    if re.search(r"\[\w+\(\w+=", template):  # Llama 3.2 as it is asked in words
        return PYTHON
    if re.search(r"""\\?"parameters\\?": """, template) and re.search(
        r"""\\?"name\\?": """, template
    ):  # Llama 3
        return LLAMA
    return None
