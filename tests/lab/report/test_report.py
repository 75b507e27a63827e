"""The page holds what the runs hold: the same numbers in HTML and Markdown, gaps that are seen, nothing made up."""

from __future__ import annotations

import json
import re
import sys
from html import unescape

import pytest
import torch
from support.runs import DENSE, PROMPTS, TEXT, W3, W4, WINDOWS, Runs, digest, evaluation, recovery, told

from lab.errors import RunError
from lab.report.evidence import gather
from lab.report.page import GAP, Page, Table, short
from lab.report.report import page_of
from lab.report.write import html, markdown
from lab.run import open_run
from lab.transfer.registry import StoreRegistry
from prompts_store.file import PromptFile, Provenance
from prompts_store.prompt import SoftPrompt
from prompts_store.records import Measurement
from prompts_store.store import PromptStore


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def whole(runs) -> Runs:
    """Two seeds of one cell, a lone one with a small gap, a compression, a table of transfer."""
    sizes = {"disk_bytes": 73_200_000, "resident_bytes": 61_000_000, "dense_disk_bytes": 269_000_000}
    papers = {"paper_bytes": 39_800_000, "paper_dense_bytes": 212_000_000}
    runs.add(
        "w3",
        {"command": "compress", "source": DENSE},
        {"name": "tiny", "level": "w3g64", "weights": W3, "method": "rtn", **sizes, **papers},
    )
    for seed, kl in ((0, 0.53), (1, 0.57)):
        runs.learned(seed)
        runs.evaluated(f"report-{seed}", **evaluation(PROMPTS[seed], recovery=recovery(0.61, kl)))
    small = recovery(None, None, gap=0.0312)
    runs.evaluated("w4", **evaluation(PROMPTS[2], W4, "w4g64", recovery=small))
    runs.add(
        "table",
        {
            "command": "transfer",
            "models": [{"level": "w3g64", "weights": W3}, {"level": "w4g64", "weights": W4}],
            "prompts": [PROMPTS[0]],
            "data": [{"data": "/a/place/c4", "split": "report", "digest": WINDOWS, "windows": 201}],
        },
        {
            "cells": [
                cell(PROMPTS[0], W3, True, 0.91),
                cell(PROMPTS[0], W4, False, 0.0421),
                cell(PROMPTS[0], W4, False, 7.77, split="select"),
            ],
            "transfer": [
                {"data": "c4", "split": "report", **told(0.777), "transferred": 0.42, "native": 0.54, "pairs": 1}
            ],
        },
    )
    return runs


def cell(prompt, weights, native, gain, split="report"):
    level = "w3g64" if weights == W3 else "w4g64"
    return {
        "prompt": "general@1",
        "digest": prompt,
        "kind": "kv",
        "learned_level": "w3g64",
        "same_weights": native,
        "level": level,
        "weights": weights,
        "data": "c4",
        "split": split,
        "dataset": WINDOWS,
        "scored_tokens": 51_234,
        "perplexity": 88.8,
        "gain": told(gain),
    }


def page(runs, store=None, **options) -> Page:
    return page_of(gather([runs.root], store), **options)


def table(page: Page, title: str) -> Table:
    return next(each for section in page.sections for each in section.tables if each.title == title)


def column(found: Table, name: str) -> list[str]:
    return [row[found.columns.index(name)] for row in found.rows]


def test_the_page_is_one_file_that_fetches_nothing(whole):
    text = html(page(whole))
    assert not re.search(r"<script|<link|@import|src\s*=|url\((?!#)", text)
    assert not re.search(r'href\s*=\s*"(?!#|data:)', text)
    assert text.count("<!doctype html>") == 1


def test_markdown_and_html_hold_the_same_cells_in_the_same_order(whole):
    found = page(whole)
    in_html = [unescape(each) for each in re.findall(r"<td[^>]*>(.*?)</td>", html(found), re.DOTALL)]
    in_markdown = [
        unescape(each)
        for line in markdown(found).splitlines()
        if line.startswith("| ") and "---" not in line
        for each in line.removeprefix("| ").removesuffix(" |").split(" | ")
    ]
    titles = [title for section in found.sections for each in section.tables if each.rows for title in each.columns]
    cells = [text for section in found.sections for each in section.tables for row in each.rows for text in row]
    assert in_html == cells
    assert len(in_markdown) == len(cells) + len(titles)
    assert [each for each in in_markdown if each in set(cells)] == [
        each
        for section in found.sections
        for one in section.tables
        if one.rows
        for each in (*(name for name in one.columns if name in set(cells)), *(text for row in one.rows for text in row))
    ]


def test_every_digest_and_every_command_is_named(whole):
    for text in (html(page(whole)), markdown(page(whole))):
        for named in (W3, W4, PROMPTS[0], PROMPTS[1], PROMPTS[2], TEXT, WINDOWS):
            assert named in text
        assert "/a/place" not in text
        for folder in ("report-0", "report-1", "w4", "table", "learn-0", "w3"):
            assert json.loads((whole.root / folder / "config.json").read_text())["digest"] in text
        assert sys.argv[0].rpartition("/")[2] in text  # the command line that made the runs


def test_runs_of_one_name_in_two_folders_are_two_sources(tmp_path):
    """Both were cited as the first."""
    folders = [Runs(tmp_path / name) for name in "ab"]
    for seed, runs in enumerate(folders):
        runs.evaluated("report", **evaluation(PROMPTS[seed], recovery=recovery(0.61, 0.53)))
    found = page_of(gather([runs.root for runs in folders], None))
    sources = table(found, "Where each figure comes from")
    assert column(sources, "source") == ["[1]", "[2]"]
    assert column(sources, "run") == ["a/report", "b/report"]
    assert set(column(table(found, "What a prompt brings back"), "source")) == {"[1]", "[2]"}


def test_the_three_measures_stand_side_by_side_and_seeds_apart(whole):
    found = table(page(whole), "What a prompt brings back")
    assert column(found, "(c) KL closed") == [
        "53.0 % [52.0, 54.0]",
        "57.0 % [56.0, 58.0]",
        "55.0 %, from 53.0 to 57.0",
        GAP,
    ]
    assert column(found, "(a) gap closed")[:2] == ["61.0 % [60.0, 62.0]"] * 2
    assert column(found, "top-1 with")[0] == "49.0 % [48.0, 50.0]"
    assert column(found, "seed") == ["0", "1", "mean of 2", "? (single seed)"]
    assert column(found, "perplexity dense / without / with")[0] == "59.83 / 402.17 / 124.21"


def test_a_small_gap_has_no_percentage(whole):
    found = table(page(whole), "What a prompt brings back")
    assert column(found, "(a) gap closed")[-1] == "none: small gap"
    assert column(found, "gap, nats")[-1] == "+0.0312 [+0.0212, +0.0412]"
    assert column(found, "not worse")[-1] == "no"


def test_a_task_is_held_against_what_dense_gains_and_not_against_dense_alone(whole):
    """The dense model alone cannot do a task: shares of its gap in thousands of percent once headed the page."""
    whole.learned(2, task="boolq")
    text = {"source": "boolq", "digest": digest("b"), "form": "completion"}
    figures = evaluation(
        PROMPTS[2], W4, "w4g64", text=text, split="report", dense_prompted_perplexity=1.39, perplexity=1.41
    )
    whole.evaluated("task", **figures, recovery={**recovery(8.5, -13.2), "kept": told(0.99)})
    found = page(whole)
    assert "boolq" not in column(table(found, "What a prompt brings back"), "data")
    assert "boolq" not in column(table(found, "By bytes"), "data")
    kept = table(found, "What compressed + prompt keeps of the gain of dense + prompt")
    assert column(kept, "data") == ["boolq"]
    assert column(kept, "kept") == ["99.0 % [98.0, 100.0]"]
    assert column(kept, "by frequency") == [GAP]
    assert column(kept, "perplexity dense / with its own / level / ours") == ["59.83 / 1.39 / 402.17 / 1.41"]


def test_a_task_that_dense_did_not_learn_either_shows_no_share(whole):
    """Yes or no in the right proportion, and nothing of the question: "99.7 % kept" stood on the page."""
    text = {"source": "boolq", "digest": digest("b"), "form": "completion"}
    for seed, floor in ((2, 1.38), (3, 1.40)):
        whole.learned(seed, task="boolq", digest=digest(f"p{seed}"))
        figures = evaluation(digest(f"p{seed}"), W4, "w4g64", text=text, split="report", dense_prompted_perplexity=1.39)
        figures |= {"recovery": {**recovery(8.5, -13.2), "kept": told(0.99)}, "by_frequency": {"perplexity": floor}}
        whole.evaluated(f"task-{seed}", **figures)
    kept = table(page(whole), "What compressed + prompt keeps of the gain of dense + prompt")
    assert dict(zip(column(kept, "by frequency"), column(kept, "kept"), strict=True)) == {
        "1.38": "none: no more than frequencies",
        "1.40": "99.0 % [98.0, 100.0]",
    }


def test_a_seed_may_be_of_the_level_as_another_machine_solved_it(whole):
    """Two seeds through weights of the same command were lone ones: last bits depend on the processor."""
    there, made = digest("w3 elsewhere"), {"command": "compress", "source": DENSE}
    whole.learned(2, weights=there)
    whole.evaluated("report-2", **evaluation(PROMPTS[2], there, recovery=recovery(0.61, 0.61)))
    assert "mean of 2" in column(table(page(whole), "What a prompt brings back"), "seed")  # how is not known
    whole.add("w3 elsewhere", made, {"name": "tiny", "level": "w3g64", "weights": there, "method": "rtn"})
    seeds = column(table(page(whole), "What a prompt brings back"), "seed")
    assert "mean of 3, the level solved on 2 machines" in seeds


def test_figures_of_other_tokens_are_no_seeds_of_one_cell(whole):
    """Two evaluations of 248 and of 744 tokens of one file were averaged, and one of two plain rows went missing."""
    whole.evaluated("report-1", **evaluation(PROMPTS[1], recovery=recovery(0.61, 0.57), scored_tokens=99))
    found = page(whole)
    assert "mean of 2" not in column(table(found, "What a prompt brings back"), "seed")
    assert "99" in column(table(found, "By bytes"), "scored tokens")


def test_what_was_not_measured_is_a_gap_that_is_seen(whole):
    found = page(whole)
    assert set(column(table(found, "What a prompt brings back"), "(b) net of dense")[:3]) == {GAP}
    assert table(found, "What models weigh").rows[0][3] == GAP  # the original file, which nobody named
    assert f'<td class="gap">{GAP}</td>' in html(found)
    assert "Nothing of this was measured." in markdown(found)  # no tasks


def test_sizes_are_those_of_the_files(whole, tmp_path):
    found = table(page(whole, original=("original.gguf", 96_600_000)), "What models weigh")
    assert found.rows[0][0] == "original.gguf"
    assert column(found, "disk, MB")[:3] == ["96.6", "269.0", "73.2"]
    assert found.rows[1][0] == f"tiny {short(DENSE)}"  # not the digest of what was made of it
    made = found.rows[2]
    assert made[3:9] == ["73.2", "61.0", "39.8", "0.76", "3.67", "5.33"]


def test_only_report_is_shown_of_transfer(whole):
    found = page(whole)
    gains = column(table(found, "Prompts on models"), "gain, nats")
    assert sorted(gains) == ["+0.0421 [+0.0321, +0.0521]", "+0.9100 [+0.9000, +0.9200]"]
    assert "7.7700" not in html(found)
    assert table(found, "Between levels").rows[0][:2] == ["c4", "77.7 % [76.7, 78.7]"]


def test_measurements_of_the_registry_are_shown_once(whole, tmp_path):
    prompt = SoftPrompt("rows", digest("1"), {"prompt_embeddings": torch.ones(2, 4)})
    with PromptStore.open(tmp_path / "store") as store:
        store.push(PromptFile(prompt, Provenance(level="w3g64", weights=W3)), "general")
        for split, value in (("report", 33.25), ("select", 44.75)):
            store.measurements.add(
                "general", 1, Measurement("perplexity", value, DENSE, split, "w4g64", W4, 999, 0.25, 0.2, 0.3)
            )
        text = markdown(page(whole, StoreRegistry(store)))
    assert text.count("33.25") == 1
    assert "44.75" not in text
    assert prompt.digest in text


def test_charts_draw_what_the_tables_hold(whole):
    pytest.importorskip("matplotlib")
    text = html(page(whole))
    assert text.count("<svg") == 5  # against bytes on disk and in memory, N and tokens; one heat map
    assert "+0.042" in text
    assert text == html(page(whole))  # the same runs, the same bytes


def test_without_matplotlib_the_tables_stand_and_the_page_says_so(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = html(page(whole))
    assert "<svg" not in text
    assert "promptstitch[lab]" in text
    assert "53.0 % [52.0, 54.0]" in text


def test_runs_that_are_not_finished_are_named_and_say_nothing(runs):
    runs.learned(0, best=None)
    with open_run(runs.root / "young", {"command": "learn"}) as run:
        run.tell(plan={"steps": 3})
    with open_run(runs.root / "younger", {"command": "transfer"}):
        pass
    (runs.root / "cut.json").write_text('{"nll_sum": ')
    found = table(page(runs), "Of these nothing is shown")
    assert [row[0] for row in found.rows] == ["cut.json", "young", "younger"]
    assert all("again" in row[1] for row in found.rows)


def test_what_evaluate_printed_is_taken_from_a_file_and_select_is_not(runs):
    runs.root.mkdir()
    (runs.root / "mine.json").write_text(json.dumps(evaluation(PROMPTS[0], recovery=recovery(0.4, 0.333))))
    chosen = evaluation(PROMPTS[0], recovery=recovery(0.9, 0.999), split="select")
    (runs.root / "chosen.json").write_text(json.dumps(chosen))
    text = markdown(page(runs))
    assert "33.3 %" in text
    assert "99.9 %" not in text
    assert "evaluate tiny --level w3g64" in text
    assert "some/where" not in text


def test_text_of_a_run_is_never_markup(runs):
    hostile = evaluation(PROMPTS[0], model="<script>x</script>|y", recovery=recovery(0.4, 0.3))
    runs.evaluated("odd", **hostile)
    found = page(runs)
    assert "<script" not in html(found)
    assert all(line.count("|") >= 3 for line in markdown(found).splitlines() if line.startswith("|"))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        gather([tmp_path / "nowhere"], None)
