"""The actions of the command, and the one stage that each of some of them runs: the next of its kind that is not finished."""

from __future__ import annotations

from selfreward.recipe import Recipe

FIRST = (("sft", "sft/model"), ("eft", "eft"), ("sft", "m1/model"))
EACH_ROUND = (
    ("prompts", "prompts"),
    ("sample", "candidates"),
    ("judge", "judgements"),
    ("pairs", "pairs"),
    ("dpo", "model"),
)
SINGLE = tuple(dict.fromkeys(action for action, _ in FIRST + EACH_ROUND))
ACTIONS = {
    "run": "the whole loop, the default",
    "validate": "what the data files hold; computes nothing",
    **dict.fromkeys(SINGLE, "up to the next unfinished stage of this kind, and that one"),
    "report": "report.html, report.json and the plots of the run in --out once more, from its files",
    "eval": "finished models measured; eval --help says what it can",
}
NOT_BUILT = {"plan": "comes with distributed runs"}


def stages_of(recipe: Recipe) -> list[tuple[str, str]]:
    """(action, stage) of every stage that makes data or trains, in order. Of what comes after, no single stage is run."""
    found = list(FIRST) if recipe.m1 is None else []
    return found + [(action, f"iter_{k}/{name}") for k in range(1, recipe.rounds + 1) for action, name in EACH_ROUND]


def described() -> str:
    """The actions for `--help`: those that do the same on one line."""
    by_use: dict[str, list[str]] = {}
    for action, use in ACTIONS.items():
        by_use.setdefault(use, []).append(action)
    return "\n".join(f"    {', '.join(actions)}: {use}" for use, actions in by_use.items())
