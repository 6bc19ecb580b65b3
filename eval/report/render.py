"""A report as one HTML file with everything inside, as Markdown with its figures beside it, and as JSON."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from eval.output import write_bytes, write_json
from eval.report.report import Picture, Run, Sample, Section, Table

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;margin:1em 0;font-size:13px}"
    "td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right;vertical-align:top}th{background:#f2f2f2}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}figcaption,.note{color:#666;font-size:13px}"
    "blockquote{margin:.5em 0 1.5em;padding-left:1em;border-left:3px solid #ccc}dt{font-weight:600}"
)


def write_report(folder: Path, title: str, sections: Sequence[Section], runs: Sequence[Run]) -> list[Path]:
    """Write report.html, report.md (with a PNG for each figure) and report.json into the folder. -> their paths."""
    page, text, data = folder / "report.html", folder / "report.md", folder / "report.json"
    write_bytes(page, html(title, sections).encode())
    markdown, figures = as_markdown(title, sections)
    for name, content in figures.items():
        write_bytes(folder / name, content)
    write_bytes(text, markdown.encode())
    write_json(data, as_json(title, sections, runs))
    return [page, text, data]


def html(title: str, sections: Sequence[Section]) -> str:
    """A page that loads nothing: figures are inline."""
    body = "".join(
        f"<h2>{escape(s.title)}</h2>\n<p>{escape(s.about)}</p>\n" + "".join(map(_html_block, s.blocks))
        for s in sections
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"


def _html_block(block: Table | Picture | Sample) -> str:
    if isinstance(block, Picture):
        source = f"data:image/png;base64,{b64encode(block.content).decode()}"
        caption = escape(block.caption)
        return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>\n'
    if isinstance(block, Sample):
        answers = "".join(f"<dt>{escape(who)}</dt><dd>{escape(text)}</dd>" for who, text in block.answers)
        return f"<h3>After: {escape(block.prompt)}</h3><blockquote><dl>{answers}</dl></blockquote>\n"
    head = "".join(f"<th>{escape(h)}</th>" for h in block.headers)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in block.rows)
    note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>{note}\n"


def as_markdown(title: str, sections: Sequence[Section]) -> tuple[str, dict[str, bytes]]:
    """-> the text, and the figures it names."""
    figures: dict[str, bytes] = {}
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n\n{section.about}\n")
        stem = "-".join(section.title.lower().split())
        pictures = count(1)
        for block in section.blocks:
            if isinstance(block, Picture):
                name = f"{stem}-{next(pictures)}.png"
                figures[name] = block.content
                parts.append(f"![{block.caption}]({name})\n")
            else:
                parts.append(_markdown_block(block))
    return "\n".join(parts), figures


def _markdown_block(block: Table | Sample) -> str:
    if isinstance(block, Sample):
        answers = "\n".join(f"- **{_cell(who)}**: {_cell(text)}" for who, text in block.answers)
        return f"### After: {_cell(block.prompt)}\n\n{answers}\n"
    lines = [block.headers, ["---", *["---:"] * (len(block.headers) - 1)], *block.rows]
    table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    return table + (f"\n\n{block.note}\n" if block.note else "\n")


def _cell(text: str) -> str:
    """On one line, and without a character that would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def as_json(title: str, sections: Sequence[Section], runs: Sequence[Run]) -> dict[str, Any]:
    """The tables as they are shown, and every input as it was read."""
    shown = [
        {"title": s.title, "about": s.about, "tables": [asdict(b) for b in s.blocks if isinstance(b, Table)]}
        for s in sections
    ]
    inputs = [
        {"file": run.file.name, "label": run.label, "kind": run.kind, "report": run.report} for run in runs
    ]
    return {"title": title, "sections": shown, "runs": inputs}
