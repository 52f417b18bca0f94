"""Rows of files: read as far as they are asked for, with the line of each; what typed storage adds is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmq.data.files import ENDINGS, Row, csv_rows, json_rows, rows_of, stored
from tests.llmq.refusal import refused


def test_an_array_is_read_as_far_as_needed_and_its_lines_are_known(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    rows = [{"text": "see\nnoon " * 400, "id": i} for i in range(200)]
    file.write_text("[\n" + ",\n".join(json.dumps(row, indent=1) for row in rows) + ",\n{broken")
    found = json_rows(file)
    for i, row in enumerate(rows):
        assert next(found) == Row(f"{file}:{2 + 4 * i}", row)
    refused(lambda: next(found), f"{file}:802 is not JSON")


def test_a_fault_early_in_a_large_file_is_found_early(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"text": see},\n' + '{"text": "noon"},\n' * 100_000)
    reads = []
    refused(lambda: reads.append(next(json_rows(file))), f"{file}:1 is not JSON (Expecting value)")


def test_the_object_around_rows_names_its_list(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"data": [{"x": 1}, {"x": 2}], "meta": {"y": 3}}))
    assert [*json_rows(file)] == [Row(f"{file} data[0]", {"x": 1}), Row(f"{file} data[1]", {"x": 2})]
    row = {"text": "see", "tags": [{"x": 1}]}
    file.write_text(json.dumps(row))
    assert [*json_rows(file)] == [Row(f"{file}:1", row)]


def test_the_line_of_a_row_of_csv_is_that_of_its_start(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'text,n\n"a\nb",1\n\nc,2\n')
    assert [*csv_rows(file, ",")] == [
        Row(f"{file}:2", {"text": "a\nb", "n": "1"}),
        Row(f"{file}:5", {"text": "c", "n": "2"}),
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_has_a_reader_that_says_what_it_reads(tmp_path: Path, ending: str) -> None:
    missing = tmp_path / f"none{ending}"
    refused(lambda: next(rows_of(missing, ending, "rows")), f"rows {missing} cannot be read")


def test_nulls_that_fill_typed_objects_are_left_out_and_exact_values_stay() -> None:
    from datasets import List, Value

    row = {"role": "user", "content": None, "name": None, "calls": [{"a": 1, "b": None}]}
    assert stored(row) == {"role": "user", "content": None, "calls": [{"a": 1}]}
    assert stored({"from": "gpt", "value": None, "id": None}) == {"from": "gpt", "value": None}

    class Exact:
        """As datasets.Json, which its older versions do not have."""

    types = {"role": Value("string"), "calls": List({"a": Value("int64"), "b": Value("int64")})}
    assert stored(row, types, (Exact,)) == {"role": "user", "content": None, "calls": [{"a": 1}]}
    assert stored([row], [Exact()], (Exact,)) == [row]
    assert stored({"talk": [row]}, {"talk": [{"calls": Exact()}]}, (Exact,))["talk"][0]["calls"] == row["calls"]
