"""Jinja files that make a prompt, the judge's or the one that asks for new prompts: found, sandboxed, and their mistakes
named with file and line."""

from __future__ import annotations

import hashlib
import traceback
from pathlib import Path

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from engine import InputError

TEMPLATES = Path(__file__).parent / "templates"


def template_path(kind: str, path_or_name: str | Path) -> Path:
    """A shipped template of a kind ("judge", "prompts") for a plain name, else the file itself."""
    name = str(path_or_name)
    if isinstance(path_or_name, Path) or "/" in name or "." in name:
        return Path(path_or_name)
    path = TEMPLATES / f"{kind}_{name.removeprefix(f'{kind}_')}.jinja"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem.removeprefix(f"{kind}_") for p in TEMPLATES.glob(f"{kind}_*.jinja")))
        raise InputError(f"{kind} template {name!r} is not shipped; use one of {shipped}, or the path of a .jinja file")
    return path


def read_template(kind: str, path: Path) -> tuple[str, str]:
    """A template's text, and the hash of its bytes for the manifest."""
    try:
        source = path.read_bytes()
        return source.decode("utf-8"), hashlib.sha256(source).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{kind} template {path} cannot be read: {error}") from None


def sandbox() -> SandboxedEnvironment:
    """Sandboxed and deterministic: `lipsum` and `random` would make two renderings differ."""
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.globals = {"range": environment.globals["range"]}
    del environment.filters["random"]
    return environment


def template_line(error: Exception, template: jinja2.Template) -> str:
    """The suffix ", line N": a block's own frames carry lines of the compiled code, mapped back to the source here."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == template.filename]
    return f", line {template.get_corresponding_lineno(lines[-1])}" if lines and lines[-1] else ""
