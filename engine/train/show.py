"""What a pack holds, for the eye: tokens, who sees whom, and what is predicted from where.

    python -m engine.train.show DIRECTORY rows.jsonl      # packs of the rows, in one of TRL's formats, with its tokenizer

A line per token: its row in the pack, its depth, its id and text, the rows that see it (from itself to where its subtree
ends), and the edges that leave it, `target x weight -> sequence`. The last token of a shared prompt has several.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import InputError
from engine.tokenizer import Tokenizer
from engine.train.batches import build_trees, pack_trees, row_keys
from engine.train.trl import rows_from_trl
from engine.tree import Pack

HEADER = f"{'row':>5} {'depth':>5} {'id':>6} {'text':<16} {'seen by':<12} {'key':>6}  edges"


def show_pack(pack: Pack, tokenizer: Tokenizer | None = None) -> str:
    """A pack as a table. Without a tokenizer the texts are left out."""
    edges: dict[int, list[str]] = {}
    columns = (pack.edges.row, pack.edges.target, pack.edges.weight, pack.edges.sequence)
    for row, target, weight, sequence in zip(*(column.tolist() for column in columns), strict=True):
        edges.setdefault(row, []).append(f"{_text(target, tokenizer) or target} x {weight:g} -> {sequence}")
    lines = [f"{len(pack)} tokens, {len(pack.edges)} edges, {len(set(columns[3].tolist()))} sequences", HEADER]
    each = (pack.tokens, pack.position, pack.end, pack.key)
    for row, (token, position, end, key) in enumerate(zip(*(column.tolist() for column in each), strict=True)):
        seen = f"{row}..{end - 1}"
        line = f"{row:>5} {position:>5} {token:>6} {_text(token, tokenizer):<16} {seen:<12} {key:>6}  "
        lines.append((line + ", ".join(edges.get(row, []))).rstrip())
    return "\n".join(lines)


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return ""
    return {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}.get(token) or repr(tokenizer.decode([token]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.train.show", description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.model, or the directory of a model that has one")
    parser.add_argument("rows", type=Path, help="JSON lines in one of TRL's formats")
    parser.add_argument("--max-pack-tokens", type=int, default=4096)
    options = parser.parse_args(arguments)
    try:
        tokenizer = Tokenizer(options.tokenizer)
        rows = rows_from_trl(_records(options.rows), tokenizer)
        trees, _ = build_trees(list(zip(row_keys(rows), rows, strict=True)), options.max_pack_tokens)
        for pack in pack_trees(trees, options.max_pack_tokens):
            print(show_pack(pack, tokenizer), end="\n\n")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _records(path: Path) -> list[dict[str, object]]:
    records = []
    try:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            records.append(json.loads(line))
            if not isinstance(records[-1], dict):
                raise InputError(f"{path}, line {number} is no JSON object")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}, line {number} is no JSON ({error})") from None
    return records


if __name__ == "__main__":
    sys.exit(main())
