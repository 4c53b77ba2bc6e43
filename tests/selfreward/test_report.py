"""The report: figures against values worked out by hand, the page against hostile text and missing parts, the plots' bytes."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from selfreward.metrics import entropy_bits
from selfreward.report import build_report, print_report
from selfreward.report_html import SHOWN_CHARACTERS, example_pairs, render, write_report
from selfreward.report_plots import Plot, draw_plots
from selfreward.report_rounds import FIGURES, judgement_figures, pair_figures, prompt_figures, round_figures
from selfreward.state import RunDir

ROOT = Path(__file__).parents[2]
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp; {{ 7 * 7 }} <b"
VOID = {"meta", "img", "link", "br", "hr", "input"}


# ---- a small run ------------------------------------------------------------------------------------------------------


def judgement(score, status="ok"):
    return {"id": "x", "candidate_id": "x", "draw": 0, "score": score, "status": status, "text": "", "token_ids": []}


def pair(number=0, chosen=2, rejected=1, text="b a"):
    return {
        "id": f"1-{number}",
        "prompt_id": f"1-{number}",
        **{key: [{"role": "any", "content": f"{key} {number} {text}"}] for key in ("prompt", "chosen", "rejected")},
        "score_chosen": 4.5,
        "score_rejected": 3.0,
        "chosen_token_ids": [1] * chosen,
        "rejected_token_ids": [1] * rejected,
    }


PROMPTS = [
    {"id": "1-0", "prompt": "Write a poem about rivers.", "rouge": 0.25},
    {"id": "1-1", "prompt": "write a letter about rivers and rivers", "rouge": 0.75},
    {"id": "1-2", "prompt": "Name rivers!", "rouge": 0.5},
]
JUDGEMENTS = [*map(judgement, (5.0, 5.0, 4.5, 4.0)), judgement(None, "truncated"), judgement(None, "no_score")]
PAIRS = [pair(0, chosen=7, rejected=4), pair(1, chosen=5, rejected=6)]
DROPPED = [{"id": "1-2", "prompt_id": "1-2", "prompt": "p", "reason": "tie"}]


def dpo_metrics(steps=3):
    keys = ("rewards/margins", "rewards/accuracies")
    return [
        {"step": s, "loss": 0.7 - s / 100, "grad_norm": 1.0} | dict.fromkeys(keys, s / 10) for s in range(1, steps + 1)
    ]


def sft_metrics():
    return [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-5} for step in (1, 2, 3)]


def model(name, stage, **figures):
    row = {"name": name, "stage": stage, "pairs": None, "mean_length": 5.5, "true_quality_n": 0}
    row |= dict.fromkeys(("true_quality", "true_quality_se", "true_quality_greedy", "true_quality_greedy_se"))
    return row | figures


def graded(quality, **more):
    return {"true_quality": quality, "true_quality_se": 0.05, "true_quality_n": 500} | more


def judged(share):
    judge = {"judge_pairs": 900, "judge_pairwise": share, "judge_pairwise_ties_half": share + 0.05}
    return judge | {"longer_wins": 0.53, "longer_pairwise": 0.48, "longer_pairwise_ties_half": 0.53}


def all_models(rounds=2):
    names = [("M0", "m0/model"), ("SFT", "sft/model"), ("M1", "m1/model")]
    names += [(f"M{k + 1}", f"iter_{k}/model") for k in range(1, rounds + 1)]
    return [model(name, stage, **graded(3 + i / 10), **judged(0.6 + i / 50)) for i, (name, stage) in enumerate(names)]


def match(model, against, win=0.25, tie=0.5, **more):
    row = {"model": model, "against": against, "n": 8, "unread": 0, "win": win, "tie": tie, "loss": 1 - win - tie}
    row |= {"win_minus_loss": 2 * win + tie - 1, "win_minus_loss_se": 0.05, "same_text": 2}
    return row | {"mean_length": 5.0, "mean_length_against": 6.0} | more


MATCHES = [match("SFT", "M0"), match("M1", "SFT"), match("M2", "M1", 0.375), match("M2", "SFT", 0.5)]


def make_run(folder, rounds=2, sft=True, pairs=PAIRS, seconds=1.5, recipe=None):
    """A finished run in `folder`; the returned directory is open."""
    run = RunDir(folder, {"recipe": recipe or {"seed": 0}})
    if sft:
        for stage in ("sft", "m1"):
            run.write_jsonl(f"{stage}/metrics.jsonl", sft_metrics())
            run.mark_done(f"{stage}/model", {"rows": 3, "steps": 3})
    for k in range(1, rounds + 1):
        run.write_jsonl(f"iter_{k}/prompts.jsonl", PROMPTS)
        run.write_jsonl(f"iter_{k}/judgements.jsonl", JUDGEMENTS)
        run.write_jsonl(f"iter_{k}/pairs.jsonl", pairs)
        run.write_jsonl(f"iter_{k}/dropped.jsonl", DROPPED)
        run.write_jsonl(f"iter_{k}/metrics.jsonl", dpo_metrics())
        run.mark_done(f"iter_{k}/prompts", {"kept": 3, "dropped": {"duplicate": 2, "enough": 7}})
        run.mark_done(f"iter_{k}/judgements", {"judgements": 6})
        run.mark_done(f"iter_{k}/pairs", {"pairs": len(pairs)})
        run.mark_done(f"iter_{k}/model", {"pairs": len(pairs), "steps": 3})
    if sft:
        run.write_jsonl("evaluation/head_to_head.jsonl", MATCHES)
        run.mark_done("evaluation/head_to_head", {"by": "M3", "how": "scores", "prompts": 8, "unread": 0})
    for stage in run.finished():
        run.append_timing({"stage": stage, "seconds": seconds})
    return run


class Page(HTMLParser):
    """A page's tags, attributes and text; an end tag that does not close the open one, or is left over, is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.data = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)

    @property
    def text(self):
        return " ".join("".join(self.data).split())

    @property
    def cells(self):
        return " ".join(data.strip() for data in self.data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def write(run, models, **more):
    with run:
        report = write_report(run, models, **more)
    return report, Page((run.path / "report.html").read_text(encoding="utf-8"))


# ---- figures ----------------------------------------------------------------------------------------------------------


def test_scores_are_counted_by_hand():
    figures = judgement_figures(JUDGEMENTS)
    assert figures["judgements"] == 6
    assert figures["statuses"] == {"ok": 4, "no_score": 1, "truncated": 1}
    assert list(figures["statuses"]) == ["ok", "no_score", "truncated"]  # the most frequent first, then by name
    assert figures["score_histogram"] == [0, 0, 0, 0, 2, 2]  # 4.5 counts with 4
    assert figures["score_entropy_bits"] == 1.0
    assert figures["score_mean"] == (5 + 5 + 4.5 + 4) / 4


def test_draws_and_expected_scores_are_compared_by_hand():
    rows = [
        {"candidate_id": c, "score": s, "status": "ok", "expected": e} for c, s, e in (("a", 4, 3.5), ("a", 2, 2.25))
    ]
    rows += [{"candidate_id": "b", "score": 5, "status": "ok", "expected": 4.75}, {"candidate_id": "c", "score": 0.5}]
    rows += [{"candidate_id": "b", "score": None, "status": "empty", "expected": None}]
    figures = judgement_figures([row | {"status": "ok"} for row in rows])
    assert figures["draw_variance"] == 1.0  # of answer a alone: the others have one readable draw
    assert figures["expected_share"] == 0.75 and figures["expected_gap"] == 1 / 3
    plain = judgement_figures([{key: row[key] for key in ("candidate_id", "score")} | {"status": "ok"} for row in rows])
    assert plain["draw_variance"] == 1.0 and plain["expected_share"] is plain["expected_gap"] is None


def test_no_readable_score_is_none_and_not_zero():
    figures = judgement_figures([judgement(None, "empty")])
    assert figures["score_entropy_bits"] is None and figures["score_mean"] is None
    assert figures["score_histogram"] == [0] * 6


@pytest.mark.parametrize(
    ("counts", "bits"),
    [([0, 0, 9, 0, 0, 0], 0.0), ([1, 1, 0, 0, 1, 1], 2.0), ([3, 1], 0.75 * math.log2(4 / 3) + 0.5), ([0, 0], None)],
)
def test_entropy(counts, bits):
    assert entropy_bits(counts) == (None if bits is None else pytest.approx(bits, abs=1e-12))


def test_the_spread_of_prompts_is_counted_by_hand():
    figures = prompt_figures(PROMPTS)
    assert figures["prompt_words"] == (5 + 7 + 2) / 3 and figures["prompt_rouge"] == 0.5
    assert figures["openings"] == {"write a": 2, "name rivers": 1} and figures["openings_different"] == 2 / 3
    assert figures["opening_entropy_bits"] == pytest.approx(2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3), abs=1e-12)
    assert figures["topics"] == {"rivers": 3, "letter": 1}  # once each prompt, of six letters or more
    unfiltered = prompt_figures([{"id": "1-0", "prompt": "?"}, {"id": "1-1", "prompt": "!"}])
    assert unfiltered["prompt_rouge"] is None and unfiltered["openings"] == {"": 2} and unfiltered["topics"] == {}
    many = prompt_figures([{"id": str(i), "prompt": f"{'abcdefghijklmnop'[i] * 6} x"} for i in range(16)])
    assert len(many["openings"]) == len(many["topics"]) == 8 and many["opening_entropy_bits"] == 4.0


def test_pairs_are_counted_by_hand():
    figures = pair_figures(PAIRS, DROPPED)
    assert figures["pairs"] == 2 and figures["pair_yield"] == pytest.approx(2 / 3)
    assert figures["pairs_dropped"] == {"tie": 1}
    more = [
        {"prompt_id": "1-0", "reason": "no_more"},
        {"prompt_id": "1-2", "reason": "tie"},
        {"prompt_id": "1-2", "reason": "no_more"},
    ]
    several = pair_figures([*PAIRS, pair(0)], more)  # two pairs, one, and none
    assert several["pair_yield"] == 1.0 and several["pairs_dropped"] == {"tie": 1}
    assert figures["length_chosen"] == 6.0 and figures["length_rejected"] == 5.0
    assert figures["length_gap"] == 1.0  # 3 and -1: deviations of 2, variance 8, error sqrt(8 / 2)
    assert figures["length_gap_se"] == pytest.approx(2.0)
    assert pair_figures([], DROPPED)["length_gap"] is None and pair_figures([], DROPPED)["pair_yield"] == 0.0


def test_a_round_that_stopped_on_the_way_has_what_it_finished(tmp_path):
    with make_run(tmp_path / "run") as run:
        stages = run.finished()
    for stage in ("iter_2/pairs", "iter_2/model"):
        del stages[stage]
    (tmp_path / "run/iter_2/pairs.jsonl").write_text("a half-written fil")
    first, second = round_figures(tmp_path / "run", stages)
    assert (first["round"], first["model"], first["prompts_kept"]) == (1, "M1", 3)
    assert first["prompts_dropped"] == {"enough": 7, "duplicate": 2} and first["pairs"] == 2
    assert second["score_histogram"] == [0, 0, 0, 0, 2, 2] and second["pairs"] is None and second["length_gap"] is None
    assert first.keys() == second.keys()


# ---- files ------------------------------------------------------------------------------------------------------------


def test_report_json_holds_the_rounds(tmp_path):
    report, _ = write(make_run(tmp_path / "run"), all_models())
    assert json.loads((tmp_path / "run/report.json").read_text()) == report
    assert [row["pairs"] for row in report["rounds"]] == [2, 2]
    assert report["timing"]["seconds"]["sft/model"] == 1.5


def test_equal_runs_differ_in_times_alone(tmp_path):
    one, _ = write(make_run(tmp_path / "one", seconds=1.25), all_models())
    two, _ = write(make_run(tmp_path / "two", seconds=977.75), all_models())
    assert one.pop("timing") != two.pop("timing") and json.dumps(one) == json.dumps(two)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert {path.name for path in files if path.suffix == ".png"} == {
        *("quality.png", "judge.png", "texts.png", "head_to_head.png", "scores.png", "pairs.png", "dpo.png", "sft.png")
    }
    assert not [path for path in files if path.name.endswith(".tmp")]
    for path in files:
        same = (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
        assert same == (path.name not in ("report.json", "report.html", "timing.jsonl")), path


def test_plots_do_not_depend_on_the_users_matplotlib_settings(tmp_path):
    code = (
        "import hashlib, sys; sys.path.insert(0, 'tests/selfreward'); import test_report as t;"
        "print(*[hashlib.sha256(p.png).hexdigest() for p in t.drawn()])"
    )
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nfont.size: 20\nbackend: svg\nsavefig.dpi: 33\n")

    def run(**more):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=True)
        return done.stdout

    there = run(MATPLOTLIBRC=str(tmp_path / "matplotlibrc"), PYTHONPATH=str(ROOT), SOURCE_DATE_EPOCH="1")
    assert there == run(PYTHONPATH=str(ROOT)) and len(set(there.split())) == 8


def drawn(models=None, rounds=None, curves=None, matches=MATCHES):
    default_rounds = [{"round": 1} | judgement_figures(JUDGEMENTS) | pair_figures(PAIRS, DROPPED)]
    default_curves = {"SFT": sft_metrics(), "M1": sft_metrics(), "M2": dpo_metrics()}
    return draw_plots(models or all_models(1), rounds or default_rounds, matches, curves or default_curves)


def test_png_files_carry_no_date_and_no_version():
    for plot in drawn():
        assert plot.png.startswith(b"\x89PNG")
        for chunk in (b"tIME", b"tEXt", b"iTXt", b"zTXt"):
            assert chunk not in plot.png, (plot.name, chunk)


def test_every_plot_shows_its_own_figures_and_no_others():
    models, rounds = all_models(1), [{"round": 1} | judgement_figures(JUDGEMENTS) | pair_figures(PAIRS, DROPPED)]
    curves = {"SFT": sft_metrics(), "M2": dpo_metrics()}
    before = drawn(models, rounds, curves, MATCHES)

    def changed(edit):
        new = copy.deepcopy((models, rounds, curves, MATCHES))
        edit(*new)
        return {old.name for old, new in zip(before, drawn(*new), strict=True) if old.png != new.png}

    assert changed(lambda m, r, c, h: None) == set()
    assert changed(lambda m, r, c, h: m[-1].update(true_quality=4.9)) == {"quality"}
    assert changed(lambda m, r, c, h: m[-1].update(true_quality_greedy=4.9)) == {"quality"}
    assert changed(lambda m, r, c, h: m[-1].update(judge_pairwise=0.9)) == {"judge"}
    assert changed(lambda m, r, c, h: m[-1].update(mean_length=9.0)) == {"texts"}
    assert changed(lambda m, r, c, h: m[-1].update(distinct_2=0.5)) == {"texts"}
    assert changed(lambda m, r, c, h: h[0].update(tie=0.25)) == {"head_to_head"}
    assert changed(lambda m, r, c, h: r[0].update(score_histogram=[0, 0, 0, 0, 1, 3])) == {"scores"}
    assert changed(lambda m, r, c, h: r[0].update(pairs_dropped={"tie": 2})) == {"pairs"}
    for key in ("loss", "rewards/margins", "rewards/accuracies"):
        assert changed(lambda m, r, c, h, key=key: c["M2"][1].update({key: 0.5})) == {"dpo"}
    assert changed(lambda m, r, c, h: c["SFT"][1].update(loss=0.9)) == {"sft"}


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, selfreward.report_html; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_tables_and_the_plots(tmp_path):
    models = all_models()
    models[-1] |= {"pairs": 41, "true_quality_greedy": 4.321, "true_quality_greedy_se": 0.02}
    _, page = write(make_run(tmp_path / "run"), models)
    for text in (
        "3.40 ± 0.05",
        "4.32 ± 0.02",
        "0.680",
        "0.730",
        "longer text--0.4800.530",
        "41",
        "66.7%",
        "+1.00 ± 2.00",
        "enough 7",
    ):
        assert text in page.text, text
    images = page.all("img")
    assert len(images) == 8
    for image in images:
        assert image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 40
    assert "M0 3.00, SFT 3.10, M1 3.20, M2 3.30, M3 3.40" in images[0]["alt"]


def test_matches_times_and_what_is_odd_stand_on_the_page_and_in_the_report(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    sampled = {
        "seconds": 2.0,
        "computed_rows": 3000,
        "new_tokens": 9,
        "prefix_tokens_saved": 70,
        "fork_tokens_saved": 7,
    }
    run.append_timing({"stage": "iter_1/judgements", "seconds": 1.0, "sampler": sampled})
    run.append_timing({"stage": "iter_1/judgements", "seconds": 1.0, "sampler": sampled})  # it was interrupted
    report, page = write(run, all_models())
    assert report["matches"] == MATCHES
    assert (
        "by M3's scores" in page.text and "M2 SFT 50.0% 50.0% 0.0% +0.50\u00a0±\u00a00.05 25.0% 0 5.0 6.0" in page.cells
    )
    assert report["timing"]["seconds"]["iter_1/judgements"] == 3.5
    assert report["timing"]["sampler"] == {"iter_1/judgements": {key: 2 * value for key, value in sampled.items()}}
    assert "iter_1/judgements 3.5 1,500 154" in page.cells
    (said,) = {sentence.partition(": ")[2] for sentence in report["warnings"]}  # of both rounds
    assert said.startswith("33% of the judgements cannot be read") and said in page.text
    print_report(report, as_json=False)
    assert "M3's scores" in (out := capsys.readouterr().out) and "+0.50 +- 0.05" in out and "1,500" in out


def test_a_round_has_what_its_stages_counted(tmp_path):
    with make_run(tmp_path / "run", rounds=1) as run:
        run.write_jsonl("iter_1/candidates.jsonl", [{"prompt_id": "1", "text": text} for text in "abcd"])
        run.mark_done("iter_1/candidates", {"prompts": 1, "candidates": 4, "finish_stop": 3, "finish_length": 1})
        run.mark_done("iter_1/pairs", {"pairs": 2, "consistency": 0.875})
        trained = {"steps": 9, "best_step": 6, "held_out": 2, "label_smoothing": 0.125, "parity_max": 1e-5}
        run.mark_done("iter_1/model", {"pairs": 2, **trained})
        (row,) = round_figures(run.path, run.finished())
    assert row["answers_cut"] == 0.25 and row["consistency"] == 0.875 and trained.items() <= row.items()
    _, page = write(RunDir(tmp_path / "run", {"recipe": {"seed": 0}}), all_models(1))
    for text in ("cut 25.0%", "draws 0.875", "smoothing 0.125", "step 6", "choose it 2", "a token 1.0e-05"):
        assert text in page.cells, text


def test_text_of_models_data_and_recipe_cannot_leave_its_place(tmp_path):
    run = make_run(tmp_path / "run", pairs=[pair(0, text=HOSTILE)], recipe={"model": HOSTILE})
    models = all_models()
    models[-1]["name"] = HOSTILE
    _, page = write(run, models, stopped=HOSTILE)
    shown = " ".join(HOSTILE.split())
    assert page.text.count(f"chosen 0 {shown}") == 2 and page.text.count(f"rejected 0 {shown}") == 2  # of two rounds
    assert page.text.count(f"prompt 0 {shown}") == 2 and f"stopped early: {shown}" in page.text
    assert json.dumps(HOSTILE) in page.text
    names = {tag for tag, _ in page.tags}
    assert "script" not in names and "b" in names and all("<" not in name for name in names)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]


def test_the_page_needs_no_other_file(tmp_path):
    write(make_run(tmp_path / "run"), all_models())
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "script", "iframe", "object", "base"), tag
        for name in ("src", "href", "srcset", "style", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    policy = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_long_and_unprintable_text_is_shown_within_bounds(tmp_path):
    _, page = write(make_run(tmp_path / "run", rounds=1, pairs=[pair(0, text="\x00\x1b[31m" + "w" * 50_000)]), [])
    answer = next(data for data in page.data if data.startswith("chosen 0"))
    assert answer.startswith("chosen 0 \ufffd\ufffd[31mwww") and answer.endswith("w ...")
    assert len(answer) == SHOWN_CHARACTERS + len(" ...")


def test_examples_are_spread_over_the_pairs(tmp_path):
    with make_run(tmp_path / "run", rounds=1, pairs=[pair(number) for number in range(9)]) as run:
        (found,) = example_pairs(run.path, run.finished())
    assert [example["prompt"] for example in found["pairs"]] == ["prompt 0 b a", "prompt 3 b a", "prompt 6 b a"]


def without(*keys):
    return [{key: None if key.startswith(keys) else value for key, value in row.items()} for row in all_models()]


def test_without_an_oracle_there_is_no_true_quality(tmp_path):
    models = [row | {"true_quality_n": 0} for row in without("true_quality")]
    _, page = write(make_run(tmp_path / "run"), models)
    assert len(page.all("img")) == 7 and "no true quality" in page.text and "true quality:" not in page.text


def test_without_held_out_ranks_there_is_no_judge_accuracy(tmp_path):
    models = [{k: v for k, v in row.items() if not k.startswith(("judge", "longer"))} for row in all_models()]
    _, page = write(make_run(tmp_path / "run"), models)
    assert len(page.all("img")) == 7 and "judgement was not measured" in page.text and "longer text" not in page.text


def test_without_judge_data_m1_is_the_baseline(tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "m1/metrics.jsonl").unlink()
    run.mark_done("m1/model", {"same_as": "sft/model"})
    _, page = write(run, all_models())
    assert "M1 is the SFT baseline" in page.text and len(page.all("img")) == 8


def test_a_run_from_a_given_m1_speaks_of_no_m0(tmp_path):
    _, page = write(make_run(tmp_path / "run", rounds=1, sft=False), all_models(1)[2:])
    assert len(page.all("img")) == 6 and "began with a finished model" in page.text
    assert "M0" not in page.text and "SFT" not in page.text


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"judge": {"by": "model"}, "judge_model": None}, "scores its own answers"),
        (
            {"judge": {"by": "model"}, "judge_model": "/y/x"},
            "fixed judge model, x (its contents' hash begins with 0123456789ab),",
        ),
        ({"judge": {"by": "model", "score": "expected"}}, "expected scores"),
        ({"judge": {"by": "random"}}, "random scores"),
        ({"judge": {"by": "oracle"}}, "program that knows the truth"),
    ],
)
def test_the_page_says_who_judged(recipe, says):
    models, timing = all_models(1), [{"stage": "m1/model", "seconds": 1.0}]
    rounds = [dict.fromkeys(FIGURES) | {"round": 1, "prompts_kept": 1}]
    page = Page(render(build_report(models, rounds, [], {}, timing, recipe), [], [], recipe, "0123456789abcdef"))
    assert says in page.text
    assert ("never sees these grades" in page.text) == (recipe["judge"]["by"] != "oracle")


def test_the_page_says_nothing_of_humans_and_why_dropout_starts_above_ln_2(tmp_path):
    """In the tiny world a program ranked the answers; what others' data are made of, the page does not know."""
    _, page = write(make_run(tmp_path / "run"), all_models())
    assert "human" not in page.text and "starts above ln 2" not in page.text
    models, pairs = all_models(1), [Plot("dpo", "DPO", "DPO", b"")]
    page = Page(render(build_report(models, [], [], {}, [], {}), pairs, [], {"dpo": {"dropout": 0.1}}))
    assert "starts above ln 2 = 0.693" in page.text


def test_many_rounds_are_drawn(tmp_path):
    report, page = write(make_run(tmp_path / "run", rounds=12), all_models(12))
    assert len(report["rounds"]) == 12 and len(page.all("img")) == 8 and "M13" in page.text


def test_perfect_answers_instead_of_pairs(tmp_path):
    run = make_run(tmp_path / "run", rounds=1, pairs=[], recipe={"method": "positives"})
    run.write_jsonl("iter_1/metrics.jsonl", sft_metrics())
    run.mark_done("iter_1/model", {"rows": 9, "steps": 3, "positives": 17})
    report, page = write(run, all_models(1))
    assert report["rounds"][0]["positives"] == 17 and report["rounds"][0]["pair_yield"] == 0.0
    assert "17 up to round 1" in page.text and "before it. The pairs are not trained on" in page.text
    assert (
        "the best answer to every prompt that has one" in page.text
        and "perfect score" in page.text
        and "Example pairs" not in page.text
    )
    assert not [image for image in page.all("img") if image["alt"].startswith("DPO")]


def test_a_round_that_stopped_before_its_pairs_leaves_those_of_the_round_before_on_the_page(tmp_path):
    with make_run(tmp_path / "run", recipe={"method": "positives"}) as run:
        stages = run.finished()
    for stage in ("iter_1/model", "iter_2/pairs", "iter_2/model", "evaluation/head_to_head"):
        del stages[stage]
    rounds = round_figures(tmp_path / "run", stages)
    page = Page(render(build_report([], rounds, [], stages, [], {}, "a gate"), [], [], {}))
    assert "Preference pairs made from the models' own answers: 2 in round 1." in page.text
    page = Page(render(build_report([], rounds, [], stages, [], {}, "a gate"), [], [], {"method": "positives"}))
    assert "best answer to every prompt" in page.text and "the worst answer" not in page.text  # none is trained yet


def test_without_held_out_instructions_the_page_does_not_miss_a_program(tmp_path):
    run = make_run(tmp_path / "run")
    models = [row | {"true_quality_n": 0} for row in without("true_quality", "mean_length")]
    _, page = write(run, models)
    assert "No held-out instructions were given" in page.text and "no program" not in page.text


@pytest.mark.parametrize(
    ("found", "says", "says_not"),
    [
        ({"by": "M2", "how": "scores"}, ["so do equal scores", "no independent witness"], ["wins in one order"]),
        ({"by": "M2", "how": "pairwise"}, ["each wins in one order", "no independent witness"], ["equal scores. win"]),
        ({"by": "judge_model", "how": "scores"}, ["so do equal scores"], ["no independent witness"]),
    ],
)
def test_the_page_says_what_ties_and_who_is_no_witness(found, says, says_not):
    stages = {"evaluation/head_to_head": {"prompts": 8, "unread": 0} | found}
    page = Page(render(build_report(all_models(1), [], MATCHES, stages, [], {}), [], [], {}))
    assert all(said in page.text for said in says) and not any(said in page.text for said in says_not)


def test_every_figure_of_the_page_is_explained(tmp_path):
    """By its own name in bold, or as a count of what another one names."""
    models = [
        row | {"judge_unread": 0.2, "distinct_2": 0.5, "repetition": 0.1, "judge_exact": 0.5} for row in all_models(1)
    ]
    changed = {"true_quality_change": 0.1, "judge_change": 0.1, "judge_pairwise_ties_half_interval": [0.5, 0.6]}
    keys = changed | {
        "judge_spearman": 0.5,
        "judge_kendall": 0.5,
        "judge_five_best": 0.5,
        "true_quality_greedy": 3.0,
        "pairs": 3,
    }
    text = render(
        build_report([row | keys for row in models], [], [], {}, [{"stage": "m1/model", "seconds": 2.0}], {}),
        [],
        [],
        {},
    )
    headings = re.findall(r'<th scope="col">(.*?)</th>', text)
    assert (
        len(headings) == 22
        and [name for name in {*headings} - {"model", "stage"} if f"<b>{name}</b>" not in text] == []
    )
    rounds = [
        dict.fromkeys(FIGURES) | {"round": 1, "prompts_kept": 1, "statuses": {"ok": 1, "duplicate": 2}, "held_out": 3}
    ]
    page = Page(render(build_report([], rounds, [], {}, [], {}), [], [], {}))
    assert "whose judgements it shares" in page.text and "the least loss on the rows held out" in page.text
    page = Page(
        render(build_report([], [rounds[0] | {"statuses": {"ok": 1}, "held_out": None}], [], {}, [], {}), [], [], {})
    )
    assert "whose judgements it shares" not in page.text and "the least loss" not in page.text


def test_a_run_that_has_nothing_yet_is_a_page(tmp_path):
    report, page = write(RunDir(tmp_path / "run", {}), [], stopped="no prompts left")
    assert report["rounds"] == [] and page.all("img") == []
    assert "stopped early: no prompts left" in page.text and "No model has been evaluated" in page.text


# ---- the printed table ------------------------------------------------------------------------------------------------


def printed(tmp_path, capsys, models):
    report, _ = write(make_run(tmp_path / "run"), models)
    print_report(report, as_json=False)
    return capsys.readouterr().out


def test_the_greedy_column_is_printed_where_present(tmp_path, capsys):
    models = all_models()
    for row in models:
        row |= {"true_quality_greedy": 4.5, "true_quality_greedy_se": 0.03}
    out = printed(tmp_path, capsys, models)
    assert "greedy" in out and "4.50 +- 0.03" in out and "500 held-out" in out
    assert max(map(len, out.splitlines())) <= 120 and "tokens/s" in out


def test_the_greedy_column_is_not_printed_where_absent(tmp_path, capsys):
    out = printed(tmp_path, capsys, all_models())
    assert "greedy" not in out and "3.00 +- 0.05" in out and "Kendall" not in out


def test_json_is_printed_alone(tmp_path, capsys):
    report, _ = write(make_run(tmp_path / "run"), all_models())
    print_report(report, as_json=True)
    assert json.loads(capsys.readouterr().out) == report
