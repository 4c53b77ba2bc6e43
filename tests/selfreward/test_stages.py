"""What single stages do with odd rows; the loop as a whole is in test_run."""

import json
from typing import Any

from engine import Tokenizer
from selfreward.recipe import Recipe
from selfreward.stages import Run, _ift_rows

NOTHING: Any = None  # the parts of a run that these stages do not touch


def test_instruction_rows_are_cut_and_prompts_that_leave_no_room_are_counted(tmp_path):
    file = tmp_path / "ift.jsonl"
    given = [("copy a b c", "a b c"), ("copy a b c d e f g", "a"), ("copy a b c", "a b c d e f g a b c")]
    file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in given))
    recipe = Recipe.load("tiny", [f"data.ift={file}", "data.max_tokens=11"])
    tokenizer = Tokenizer(recipe.model)
    rows, counts = _ift_rows(Run(recipe, NOTHING, tokenizer, NOTHING, NOTHING))
    assert counts == {"ift": 2, "ift_cut": 1, "ift_prompt_too_long": 1}
    whole, cut = rows
    assert whole.completion == [*tokenizer.encode("a b c"), tokenizer.eos_id]
    assert len(cut.prompt) + len(cut.completion) == 11 and tokenizer.eos_id not in cut.completion
