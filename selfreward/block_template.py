"""Prompts of named Jinja blocks, each tokenised apart, so that what prompts have in common they have token for token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from engine import InputError
from selfreward.template_files import read_template, sandbox, template_line, template_path


class TextEncoder(Protocol):
    """What a template needs of a tokenizer."""

    bos_id: int

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Ids of the text without BOS; `continuation` encodes exactly as written, without a dummy prefix space."""
        ...


class BlockTemplate:
    """A prompt of Jinja blocks in a fixed order, tokenised apart: prompts whose first blocks are equal share those tokens.

    `path_or_name` is a file, or the name of a shipped template of this kind. Text between the blocks is blank; what stands
    between `{% block x %}` and `{% endblock %}` counts to the last space. A block may use some of the variables only, so
    that nothing breaks the sharing, and one with the name of a variable must use it. Raises InputError naming file and line.
    """

    kind: ClassVar[str]
    variables: ClassVar[tuple[str, ...]]  # the texts of a prompt, in the order in which they are given
    blocks: ClassVar[Mapping[str, tuple[str, ...]]]  # name -> the variables that it may use

    def __init__(self, path_or_name: str | Path) -> None:
        self.path = template_path(self.kind, path_or_name)
        text, self.hash = read_template(self.kind, self.path)
        self._template = self._compile(text)
        self.segments(*(f"the {name}" for name in self.variables))  # what only shows when rendering, shows now

    def segments(self, *texts: str) -> list[str]:
        """The rendered blocks. The texts are data: Jinja syntax in them stays as it is."""
        context = self._template.new_context(dict(zip(self.variables, texts, strict=True)))
        try:
            return ["".join(self._template.blocks[name](context)) for name in self.blocks]
        except Exception as error:  # a user's template can raise anything; the sandbox keeps it from doing more
            line = template_line(error, self._template)
            raise InputError(f"{self.kind} template {self.path}{line}: {error}; correct the template") from None

    def token_ids(self, tokenizer: TextEncoder, *texts: str) -> list[int]:
        """BOS, then the ids of each segment; a shared prefix of segments is a shared prefix of ids."""
        first, *rest = self.segments(*texts)
        ids = [tokenizer.bos_id, *tokenizer.encode(first)]
        for segment in rest:
            ids += tokenizer.encode(segment, continuation=True)
        return ids

    def _compile(self, text: str) -> jinja2.Template:
        environment, name = sandbox(), str(self.path)
        try:
            tree = environment.parse(text, name=name, filename=name)
            self._check_blocks(tree, environment)
            code = environment.compile(text, name=name, filename=name)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{self.kind} template {name}, line {error.lineno}: {error.message}; correct the syntax"
            ) from None
        return jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def _check_blocks(self, tree: nodes.Template, environment: SandboxedEnvironment) -> None:
        """The top level holds the blocks, in order, and nothing else; each uses only its own variables."""
        found, expected = [], ", ".join(self.blocks)
        for node in tree.body:
            if isinstance(node, nodes.Block):
                found.append(node.name)
                self._check_variables(node, environment)
            elif not _is_blank(node):
                raise self._wrong(
                    _first_line(node),
                    f"text or code outside the blocks would be lost; move it into one of the blocks {expected}",
                )
        if found != list(self.blocks):
            last = max((node.lineno for node in tree.body), default=1)
            raise self._wrong(
                last, f"found the blocks {', '.join(found) or 'none'}; expected exactly {expected}, in this order"
            )

    def _check_variables(self, block: nodes.Block, environment: SandboxedEnvironment) -> None:
        allowed = set(self.blocks.get(block.name, ()))
        inner = nodes.Template(block.body, lineno=block.lineno)
        inner.set_environment(environment)
        used = meta.find_undeclared_variables(inner)
        for name in block.find_all(nodes.Name):
            if name.ctx == "load" and name.name in used - allowed:
                may = ", ".join(sorted(allowed)) or "no variable"
                raise self._wrong(name.lineno, f"block {block.name!r} uses {name.name!r}; it may use {may}")
        if block.name in self.variables and block.name not in used:
            raise self._wrong(
                block.lineno,
                f"block {block.name!r} does not use its variable; write {{{{ {block.name} }}}} where the text belongs",
            )

    def _wrong(self, line: int, what: str) -> InputError:
        return InputError(f"{self.kind} template {self.path}, line {line}: {what}")


def _is_blank(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Output) and all(
        isinstance(part, nodes.TemplateData) and not part.data.strip() for part in node.nodes
    )


def _first_line(node: nodes.Node) -> int:
    """The line of the first visible character: a text node's own line is that of the blank before it."""
    data = next((part for part in node.find_all(nodes.TemplateData) if part.data.strip()), None)
    return data.lineno + data.data[: -len(data.data.lstrip())].count("\n") if data else node.lineno
