"""Tasks of lm-eval: the same numbers as its own command line on the same task files, and clear words for bad data."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmq_eval import tasks
from tests.conftest import WORDS, Done, Run

# Importing lm-eval takes ten seconds.
pytestmark = pytest.mark.slow
needs_lm_eval = pytest.mark.skipif(not tasks.installed(), reason="lm-eval is not installed: pip install 'llmq[eval]'")
Row = dict[str, object]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def rows(task: str, count: int) -> list[Row]:
    """Random documents in the simple columns of each task."""
    rng = random.Random(task)
    made: list[Row] = []
    for _ in range(count):
        choices = [words(rng, rng.randint(1, 6)) for _ in range(4)]
        answer = rng.randrange(4)
        question = f"{words(rng, 6)}?"
        made.append(
            {
                "hellaswag": {
                    "activity_label": words(rng, 2),
                    "ctx": f"The {words(rng, 5)}. then {words(rng, 2)}",
                    "endings": choices,
                    "label": answer,
                },
                "piqa": {"goal": words(rng, 5), "sol1": choices[0], "sol2": choices[1], "label": answer % 2},
                "arc_easy": {"question": question, "choices": choices, "answer": answer},
                "winogrande": {
                    "sentence": f"{words(rng, 3)} _ {words(rng, 3)}",
                    "option1": "fox",
                    "option2": "dog",
                    "answer": 1 + answer % 2,
                },
                "boolq": {"passage": words(rng, 20), "question": words(rng, 4), "answer": answer < 2},
                "lambada_openai": {"text": words(rng, 9)},
            }[task]
        )
    return made


def write_rows(file: Path, of: list[Row]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in of))


FILES = {
    "hellaswag": "validation",
    "piqa": "validation",
    "arc_easy": "test",
    "winogrande": "validation",
    "boolq": "validation",
    "lambada_openai": "test",
}


def its_own_command_line(command: list[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    sys.argv = command
    # Before any thread: torch makes its pool anew in a fork, and two threads that are the first to need it may fail.
    torch.set_num_threads(1)
    cli_evaluate()


@needs_lm_eval
def test_as_its_own_command_line(tmp_path: Path, llmq: Run) -> None:
    from llmq import demo

    for task, split in FILES.items():
        write_rows(tmp_path / "data" / f"{task}_{split}.jsonl", rows(task, 12))
    names, out = ",".join(FILES), tmp_path / "out"
    options = ("--data-dir", tmp_path / "data", "--write-tasks", tmp_path / "tasks", "--limit", 8, "--out", out)
    done = llmq("eval", "demo", "--tasks", names, "--batch-size", 2, *options)
    assert done.returncode == 0, done.stderr
    (file,) = (out / "results").iterdir()
    ours = {(m["task"], m["metric"]): m for m in json.loads(file.read_text())["measures"]}
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={demo.path()},dtype=float32"]
    command += ["--tasks", names, "--include_path", str(tmp_path / "tasks"), "--limit", "8", "--batch_size", "2"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "theirs")]
    # In a fork of this process: to import lm-eval once more would take longer than all that it does here.
    theirs_of = multiprocessing.get_context("fork").Process(target=its_own_command_line, args=(command,))
    theirs_of.start()
    theirs_of.join()
    assert theirs_of.exitcode == 0
    (theirs,) = (tmp_path / "theirs").rglob("results_*.json")
    found = {
        (task, label.partition(",")[0]): value
        for task, values in json.loads(theirs.read_text())["results"].items()
        for label, value in values.items()
        if label.endswith(",none") and "stderr" not in label
    }
    assert {key: measure["value"] for key, measure in ours.items()} == pytest.approx(found, rel=1e-6)
    assert {key: m["value"] for key, m in ours.items() if "acc" in key[1]} == {
        key: value for key, value in found.items() if "acc" in key[1]
    }
    for (_, metric), measure in ours.items():
        mean = sum(measure["samples"]) / 8
        assert measure["value"] == pytest.approx(math.exp(mean) if metric == "perplexity" else mean)
        assert measure["low"] <= measure["value"] <= measure["high"]
        assert "8 documents from local files" in measure["protocol"] and "0-shot" in measure["protocol"]
        assert measure["protocol"].endswith(", float32, batch 2")


def test_only_shares_are_called_that() -> None:
    """As lm-eval gives them: a perplexity or bits per byte under 1 is no percentage, nor is an F1 of 81.2."""

    def unit(metric: str, value: float, samples: list[float] | None = None, stderr: object = "N/A") -> str:
        return tasks._measure("task", metric, value, stderr, None, "protocol", samples).unit

    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity", "brier_score", "embedding"):
        assert unit(metric, 0.7) == unit(metric, 0.7, stderr=0.1) == ""
    for metric in ("acc", "acc_norm", "exact_match (strict-match)", "em", "f1"):
        assert unit(metric, 0.7) == unit(metric, 0.7, stderr=0.1) == "share"
    assert unit("f1", 81.2) == "" and unit("pass@1", 0.5, [0.0, 1.0]) == "share"


def test_a_group_that_does_not_weigh_by_size() -> None:
    """Its interval is lm-eval's, and its protocol names what its tasks differ in."""
    rows = {"g_a": [1.0] * 100, "g_b": [0.0] * 10}
    found = {
        "groups": {"g": {}}, "results": {"g": {"acc,none": 0.5, "acc_stderr,none": 0.01}}, "versions": {"g": 1},
        "samples": {leaf: [{"acc": v, "doc_id": i} for i, v in enumerate(of)] for leaf, of in rows.items()},
        "n-samples": {leaf: {"effective": len(of)} for leaf, of in rows.items()}, "n-shot": {"g_a": 0, "g_b": 5},
        "configs": {"g_a": {"output_type": "multiple_choice"}, "g_b": {"output_type": "generate_until"}},
        "higher_is_better": {"g": {"acc": True}},
    }  # fmt: skip
    (measure,) = tasks._measures("g", found, {}, "float32")
    assert (measure.value, measure.samples) == (0.5, None)
    assert (measure.low, measure.high) == pytest.approx((0.5 - 0.0196, 0.5 + 0.0196))
    assert "0-shot or 5-shot, 110 documents, generate_until or multiple_choice" in measure.protocol


@needs_lm_eval
def test_groups(tmp_path: Path, llmq: Run) -> None:
    """The subjects of mmlu come from one file; what it lacks of them is named."""
    subjects = [name.removeprefix("mmlu_") for name in tasks.leaves(tasks.Tasks([]).manager, "mmlu")]
    assert len(subjects) == 57
    file = tmp_path / "data" / "mmlu_test.jsonl"
    of: list[Row] = [
        {"subject": subject, "question": f"{i}?", "choices": ["a", "b", "c", "d"], "answer": (i + len(subject)) % 4}
        for subject in subjects
        for i in range(2)
    ]
    write_rows(file, of)
    options = ("--tasks", "mmlu", "--data-dir", file.parent, "--limit", 1, "--out", tmp_path / "out")
    done = llmq("eval", "demo", *options)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out" / "results").iterdir()
    (measure,) = json.loads(results.read_text())["measures"]
    assert (measure["task"], measure["metric"], len(measure["samples"])) == ("mmlu", "acc", 57)
    assert measure["higher_is_better"] is True
    assert measure["value"] == pytest.approx(sum(measure["samples"]) / 57)
    write_rows(file, of[4:])
    refused(llmq("eval", "demo", *options), subjects[0], "mmlu needs", "mmlu_test.jsonl")


@needs_lm_eval
def test_tags(tmp_path: Path, llmq: Run) -> None:
    """A tag takes the files of its tasks, and each has the numbers that it has alone."""
    data = tmp_path / "data"
    write_rows(data / "arc_easy_test.jsonl", rows("arc_easy", 4))
    options = ("--data-dir", data, "--out", tmp_path / "out")
    refused(llmq("eval", "demo", "--tasks", "ai2_arc", *options), "has no arc_challenge_validation.jsonl")
    write_rows(data / "arc_challenge_test.jsonl", rows("arc_easy", 6))
    done = llmq("eval", "demo", "--tasks", "ai2_arc,arc_easy", *options)
    assert done.returncode == 0 and "fatal" not in done.stderr, done.stderr
    (results,) = (tmp_path / "out" / "results").iterdir()
    measures = json.loads(results.read_text())["measures"]
    assert sorted((m["task"], len(m["samples"])) for m in measures) == 2 * [("arc_challenge", 6)] + 2 * [
        ("arc_easy", 4)
    ]
    write_rows(data / "ai2_arc_test.jsonl", rows("arc_easy", 2))
    refused(llmq("eval", "demo", "--tasks", "ai2_arc", *options), "group of arc_challenge, arc_easy", "ai2_arc_test")
    refused(llmq("eval", "demo", "--tasks", "fda", *options), "Python code", "leave out --data-dir")


@needs_lm_eval
def test_a_tokenizer_without_a_beginning(tmp_path: Path, llmq: Run) -> None:
    import shutil

    from llmq import demo

    folder = shutil.copytree(demo.path(), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None, "eos_token": None}))
    write_rows(tmp_path / "data" / "piqa_validation.jsonl", rows("piqa", 2))
    options = ("--tasks", "piqa", "--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    refused(llmq("eval", folder, *options), "neither a BOS nor an EOS token", "tokenizer_config.json")


def refused(done: Done, *named: str) -> None:
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "Traceback" not in said, said
    assert said.count("error:") == 1
    for word in named:
        assert word in said, said


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "change", "named"),
    [
        ("piqa", lambda row: row.pop("sol2"), ("'sol2' is missing", "goal, sol1, label")),
        ("piqa", lambda row: row.update(label=2), ("'label' must be a number from 0 to 1, not 2",)),
        ("piqa", lambda row: row.update(goal=7), ("'goal' holds no text",)),
        ("hellaswag", lambda row: row.update(endings="one"), ("'endings' must be a list", "'one'")),
        ("arc_easy", lambda row: row.update(answer="B"), ("'answer' must be a number from 0 to 3, not 'B'",)),
        (
            "arc_easy",
            lambda row: row.update(answerKey="A"),
            ("with 'answerKey', column 'choices' must hold lists 'text' and 'label'",),
        ),
        (
            "arc_easy",
            lambda row: row.update(answerKey="Z", choices={"text": ["a", "b"], "label": ["A", "B"]}),
            ("'answerKey' must be one of ['A', 'B'], not 'Z'",),
        ),
        ("piqa", lambda row: row.update(label="²"), ("'label' must be a number from 0 to 1, not '²'",)),
        ("winogrande", lambda row: row.update(sentence="no gap"), ("has no '_'",)),
        ("boolq", lambda row: row.update(answer="yes"), ("0 (no) or 1 (yes)",)),
    ],
)
def test_malformed_rows(
    task: str, change: Callable[[Row], object], named: tuple[str, ...], tmp_path: Path, llmq: Run
) -> None:
    of = rows(task, 3)
    change(of[1])
    write_rows(tmp_path / "data" / f"{task}_{FILES[task]}.jsonl", of)
    done = llmq("eval", "demo", "--tasks", task, "--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    refused(done, f"{task}_{FILES[task]}.jsonl:2", *named)


@needs_lm_eval
def test_other_refusals(tmp_path: Path, llmq: Run) -> None:
    data = tmp_path / "data"
    write_rows(data / "piqa_validation.jsonl", rows("piqa", 2))
    options = ("--out", tmp_path / "out", "--data-dir", data)
    refused(llmq("eval", "demo", "--tasks", "helaswag", *options), "unknown task 'helaswag'", "hellaswag")
    refused(llmq("eval", "demo", "--tasks", "perplexty", *options), "did you mean perplexity")
    refused(llmq("eval", "demo", "--tasks", "boolq", *options), "has no boolq_validation.jsonl", "piqa_validation")
    refused(llmq("eval", "demo", "--tasks", "piqa", "--num-fewshot", 5, *options), "lower --num-fewshot")
    with (data / "piqa_validation.jsonl").open("a") as file:
        file.write("{broken\n")
    refused(llmq("eval", "demo", "--tasks", "piqa", *options), "piqa_validation.jsonl:3", "not JSON")
    (data / "piqa_validation.jsonl").write_text("\n")
    refused(llmq("eval", "demo", "--tasks", "piqa", *options), "piqa_validation.jsonl is empty")
    (data / "piqa_validation.jsonl").rename(data / "piqa_test.jsonl")
    write_rows(data / "piqa_test.jsonl", rows("piqa", 2))
    refused(llmq("eval", "demo", "--tasks", "piqa", *options), "the validation split", "only test")
    done = llmq("eval", "demo", "--tasks", "piqa", "--out", tmp_path / "out")
    refused(done, "piqa", "--data-dir")


@needs_lm_eval
def test_an_answer_longer_than_the_model_takes(tmp_path: Path, llmq: Run) -> None:
    long = " ".join(["word"] * 4000)
    write_rows(
        tmp_path / "data" / "piqa_validation.jsonl", [{"goal": "say it", "sol1": long, "sol2": "no", "label": 0}]
    )
    done = llmq("eval", "demo", "--tasks", "piqa", "--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "piqa: one of its answers has more tokens than the model takes" in " ".join(done.stderr.split())


def test_without_lm_eval(tmp_path: Path, llmq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "installed", lambda: False)
    refused(llmq("eval", "demo", "--tasks", "hellaswag"), "hellaswag", "pip install 'llmq[eval]'")
    refused(llmq("eval", "demo", "--tasks", "perplexty"), "did you mean perplexity")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--tasks", ","), "--tasks is empty"),
        (("--tasks", "speed:demo"), "speed takes no text"),
        (("--text", "wikitext2"), "--data-dir"),
        (("--text", "wikitext2", "--data-dir", "{tmp}"), "neither wikitext2.txt nor wikitext2.jsonl"),
        (("--text", "c4", "--data-dir", "{tmp}"), "c4.jsonl:2 has no text in column 'text'"),
        (("--text", "nowhere.txt"), "one of 'demo', 'wikitext2'"),
        (("--data-dir", "{tmp}/gone"), "no such folder"),
        (("--limit", 0), "--limit"),
        (("--text", ""), "--text is empty"),
        (("--device", "meta"), "nothing is computed there; there are cpu, cuda, auto"),
        (("--device", "gpu"), "torch knows no such device; there are cpu, cuda, auto"),
        (("--batch-size", "²"), "'auto'"),
        (("--batch-size", "many"), "'auto'"),
        (("--write-tasks", "{tmp}/tasks"), "--tasks"),
        (("--out", "{tmp}/c4.jsonl"), "--out"),
    ],
)
def test_bad_options(options: tuple[str, ...], named: str, tmp_path: Path, llmq: Run) -> None:
    (tmp_path / "c4.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    short = () if "--text" in options else ("--window", 16, "--max-windows", 1)
    refused(llmq("eval", "demo", *short, *(str(one).format(tmp=tmp_path) for one in options)), named)


def test_named_texts_from_a_folder(tmp_path: Path) -> None:
    from llmq_eval.windows import read_text

    (tmp_path / "ptb_test.jsonl").write_text('{"sentence": "one two"}\n{"sentence": "three"}\n')
    (tmp_path / "wikitext2.txt").write_text("whole\n\ntext")
    write_rows(tmp_path / "c4.jsonl", [{"text": f"row {i}"} for i in range(1105)])
    assert read_text("ptb", tmp_path).content == "one two three"
    assert read_text("wikitext2", tmp_path).content == "whole\n\ntext"
    c4 = read_text("c4", tmp_path)
    assert c4.content.endswith("row 1098 row 1099") and "first 1100 rows" in c4.name
    (tmp_path / "wikitext2.txt").unlink()
    write_rows(tmp_path / "wikitext2.jsonl", [{"text": ""}, {"text": " = A = \n"}, {"text": "b"}])
    assert read_text("wikitext2", tmp_path).content == "\n\n = A = \n\n\nb"
