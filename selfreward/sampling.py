"""Sampling for a stage: requests in, rows out, a group at a time to the disk.

The group is the unit of restart. Requests of all groups run through the sampler together, so that a group's end does not
leave it half empty; rows are written in the order of the requests, whole groups only. A request's tokens do not depend
on what else is in the batch, so a resumed stage writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import LLM, RequestOutput, SamplingParams
from selfreward.context import Row, Run, keys_named

GROUP = 64  # prompts


@dataclass(frozen=True)
class Request:
    """A prompt, how to continue it, and the `params.n` rows that the output becomes.

    The output is None where nothing is sampled: the prompt is too long, or empty because the rows are known without.
    """

    ids: list[int]
    params: SamplingParams
    rows: Callable[[RequestOutput | None], list[Row]]


def in_groups(items: Sequence[Any]) -> list[list[Any]]:
    return [list(items[start : start + GROUP]) for start in range(0, len(items), GROUP)]


def sample_groups(
    run: Run,
    name: str,
    model: Path,
    groups: Sequence[Sequence[Request]],
    enough: Callable[[list[Row]], bool] | None = None,
) -> list[Row]:
    """The rows of all requests to the model in that directory, appended to the file `name` group by group; a resumed stage
    samples the groups it lacks, and loads the model only if it lacks any.

    enough(rows): asked after every group; true ends the stage there. Raises Stopped between groups.
    """
    rows, done = run.dir.kept_groups(name, [sum(request.params.n for request in group) for group in groups])
    progress = run.report.progress(f"{name} (at most)" if enough else name, sum(map(len, groups)))
    progress(sum(map(len, groups[:done])))
    fresh = None
    while done < len(groups) and not (enough and done and enough(rows)):
        fresh = fresh or _finished(run.llm(model), groups[done:])
        with keys_named(f"{name}: "):
            group = next(fresh)
        run.dir.append_group(name, group)
        progress(len(groups[done]))
        rows, done = rows + group, done + 1
        run.check_stop()
    if fresh is not None:
        fresh.close()
    if not done:
        run.dir.write_jsonl(name, [])
    return rows


def _finished(llm: LLM, groups: Sequence[Sequence[Request]]) -> Generator[list[Row], None, None]:
    """The rows of one group after the other, while the sampler already works on later ones."""
    requests = [request for group in groups for request in group]
    asked = [number for number, request in enumerate(requests) if 0 < len(request.ids) < llm.max_model_len]
    stream = llm.stream([requests[number].ids for number in asked], [requests[number].params for number in asked])
    outputs: dict[int, RequestOutput | None] = dict.fromkeys(set(range(len(requests))) - set(asked))
    start = 0
    for group in groups:
        stop = start + len(group)
        while not all(number in outputs for number in range(start, stop)):
            output = next(stream)
            outputs[asked[output.index]] = output
        yield [row for number in range(start, stop) for row in requests[number].rows(outputs.pop(number))]
        start = stop


def sample_waves(
    run: Run, name: str, model: Path, most: int, wave: Callable[[list[Row]], Sequence[Request]]
) -> list[Row]:
    """`sample_groups` for requests that depend on what earlier ones gave, one row each, at most `most` groups of them.

    wave(rows): the next requests, whole groups of 64, made of all rows so far and nothing else, so that a resumed stage
    makes the same ones; none ends the stage. Several groups in a wave keep the sampler full.
    """
    kept, done = run.dir.kept_groups(name, [GROUP] * most)
    rows, at = list[Row](), 0
    progress = run.report.progress(f"{name} (at most)", most * GROUP)
    while at < most and (requests := wave(rows)):
        groups = in_groups(requests)[: most - at]
        fresh = None
        for place, group in enumerate(groups):
            assert len(group) == GROUP, "a wave is whole groups"
            if at < done:
                rows = rows + kept[at * GROUP : (at + 1) * GROUP]
            else:
                fresh = fresh or _finished(run.llm(model), groups[place:])
                with keys_named(f"{name}: "):
                    new = next(fresh)
                run.dir.append_group(name, new)
                run.check_stop()
                rows = rows + new
            at += 1
            progress(GROUP)
        if fresh is not None:
            fresh.close()
    return rows
