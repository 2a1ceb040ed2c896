"""Hooks of mkdocs: pages that are made from the code, and links out of this folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import typer
from mkdocs.structure.files import File, Files

from fedex_lora.cli import app
from fedex_lora.recipe.meanings import Key, keys

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
SHOWN = ("examples/**/*.py", "recipes/**/*.yaml")  # files that get a page each


def on_files(files: Files, config: Any) -> Files:
    """Adds what is not in this folder."""
    made = {"index.md": _from_root("README.md"), "recipe.md": recipe(), "commands.md": commands()}
    made |= {name: _from_root(name) for name in PAGES if (ROOT / name).is_file()}
    for pattern in SHOWN:
        for file in sorted(ROOT.glob(pattern)):
            name = file.relative_to(ROOT).as_posix()
            language = {".py": "python", ".yaml": "yaml"}[file.suffix]
            made[f"{name}.md"] = f"# {name}\n\n```{language}\n{file.read_text()}\n```\n"
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository lead to their pages; to what has none, nowhere."""
    here = Path(page.file.src_uri).parent

    def to(match: re.Match[str]) -> str:
        target, anchor = match[2], match[3] or ""
        path = Path("docs") / here / target
        parts: list[str] = []
        for part in path.parts:
            parts = parts[:-1] if part == ".." else [*parts, part]
        name = "/".join(parts)
        if name.startswith("docs/"):
            return match[0]
        name = "index.md" if name == "README.md" else name
        known = name if files.get_file_from_path(name) else f"{name}.md"
        if files.get_file_from_path(known) is None:
            return f"{match[1]} (`{name}`)"
        return f"[{match[1]}]({'../' * len(here.parts)}{known}{anchor})"

    return _LINK.sub(to, markdown)


def _from_root(name: str) -> str:
    """A page of the repository's root, as if it lay in this folder."""
    text = re.sub(r"^\[!\[.*\n", "", (ROOT / name).read_text(), flags=re.M)  # badges ask servers
    return _LINK.sub(lambda m: f"[{m[1]}]({_down(m[2])}{m[3] or ''})", text)


def _down(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def recipe() -> str:
    """The page with every key of a recipe."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made from the code. `--set KEY=VALUE` overrides one.",
        "",
    ]
    lines += [
        "A recipe is one flat YAML file; whatever is wrong with it is told before a run, by line."
    ]
    block = ""
    for key in keys():
        title = f"task, of kind {key.kind}" if key.kind else key.name.partition(".")[0]
        if title != block and "." in key.name:
            lines += ["", f"## {title}"]
        elif block == "":
            lines += ["", "## The recipe"]
        block = title if "." in key.name else "The recipe"
        lines += _entry(key)
    return "\n".join(lines) + "\n"


def _entry(key: Key) -> list[str]:
    default = f"default `{key.default}`" if key.default else "has to be given"
    example = f"{key.name.rpartition('.')[2]}: {key.example}"
    about = f"*{key.type}*; {default}. {key.meaning}"
    heading = f"### `{key.name}`" + (f" ({key.kind})" if key.kind else "")
    return ["", heading, "", about, "", f"    {example}"]


def commands() -> str:
    """The page with every command, from what `--help` is made of."""
    lines = ["# Command line", "", "Made from the code; the same as `fedex-lora COMMAND --help`."]
    lines += _commands(typer.main.get_command(app), "fedex-lora")
    return "\n".join(lines) + "\n"


def _commands(command: click.Command, name: str) -> list[str]:
    lines = ["", f"## {name}", "", command.help or ""]
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    lines += ["", f"    {name} {usage}", ""]
    rows = []
    for parameter in command.params:
        about = (getattr(parameter, "help", None) or "").replace("|", "\\|")
        default = parameter.default
        shown = f" (default {default})" if default not in (None, False, [], (), "") else ""
        rows.append(f"| `{', '.join(parameter.opts)}` | {about}{shown} |")
    if rows:
        lines += ["| argument | meaning |", "|---|---|", *rows]
    for inner, one in sorted(getattr(command, "commands", {}).items()):
        lines += _commands(one, f"{name} {inner}")
    return lines
