import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch

from fastinterp.errors import OptionError, PromptError, PromptFileError
from fastinterp.prompts import PromptSet

# What readers like to lose: leading and trailing spaces, words that look missing, odd line separators.
HARD = [" Mary", "NA", "null", 'He said "hi", then', "1.50", "Ünïcode\u2028🙂 ", "tab\there"]


def test_of_takes_text_ids_arrays_and_alternatives():
    prompts = PromptSet.of(
        ["a b", [1, 2], np.array([3, 4]), torch.tensor([5])],
        answer=[" x", 7, [" x", 8], None],
        wrong=[float("nan"), np.int64(3), np.array([1, 2]), None],
        corrupt=[None, None, (1, 2), None],
    )
    assert prompts.prompts == ("a b", (1, 2), (3, 4), (5,))
    assert prompts.answer == (" x", 7, (" x", 8), None)
    assert prompts.wrong == (None, 3, (1, 2), None)
    assert prompts.corrupt == (None, None, (1, 2), None)
    assert prompts.ids == ("0", "1", "2", "3")
    assert len(prompts) == 4


def test_a_column_of_missing_values_is_no_column():
    assert PromptSet.of(["a", "b"], answer=[None, None]).answer is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "a b"}, r"give a list.*\['a b'\]"),
        ({"prompts": ["a"], "answer": " x"}, "answer is the text ' x'"),
        ({"prompts": ["a", None]}, "row 1 has no prompt"),
        ({"prompts": ["a", 3]}, "prompts of row 1 must be text or a list of token ids, got 3"),
        ({"prompts": [[1, "a"]]}, "prompts of row 0 must be"),
        ({"prompts": [[1, True]]}, "prompts of row 0 must be"),
        ({"prompts": [[1.0]]}, "prompts of row 0 must be"),
        ({"prompts": ["a"], "answer": [1.5]}, "answer of row 0 must be"),
        ({"prompts": ["a"], "wrong": [[]]}, "wrong of row 0 must be"),
        ({"prompts": ["a"], "wrong": [[" x", None]]}, "wrong of row 0 must be"),
        ({"prompts": ["a"], "answer": [True]}, "answer of row 0 must be"),
        ({"prompts": ["a", "b"], "answer": [" x"]}, "answer has 1 values for 2 prompts"),
        ({"prompts": ["a"], "corrupt": [None, None]}, "corrupt has 2 values for 1 prompts"),
        ({"prompts": ["a", "b", "c"], "ids": ["u", "v", "u"]}, "more than once: 'u'"),
        ({"prompts": ["a", "b"], "ids": ["1", None]}, "more than once: '1'"),
    ],
)
def test_of_refuses(arguments, message):
    with pytest.raises(PromptError, match=message):
        PromptSet.of(**arguments)


def test_txt_keeps_every_line_as_it_is(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(("\ufeff" + "\r\n".join(HARD) + "\r\n").encode())
    assert PromptSet.read(path).prompts == tuple(HARD)


def test_txt_names_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n  \n")
    with pytest.raises(PromptFileError, match="lines 2, 4"):
        PromptSet.read(path)


def test_jsonl_reads_ids_alternatives_and_missing_values(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": " Mary", "answer": [" a", 5], "id": 17},
        {"prompt": [1, 2], "wrong": 4, "extra": {"x": 1}},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    prompts = PromptSet.read(path)
    assert prompts.prompts == (" Mary", (1, 2))
    assert prompts.answer == ((" a", 5), None)
    assert prompts.wrong == (None, 4)
    assert prompts.ids == ("17", "1")
    assert prompts.other_columns == ("extra",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 'a'}", "line 2: not JSON"),
        ('"a"', "line 2: expected .* got str"),
        ("{}", "row 1 has no prompt"),
    ],
)
def test_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(PromptError, match=message) as caught:
        PromptSet.read(path)
    assert str(path) in str(caught.value)


def test_csv_keeps_text_as_it_is(tmp_path):
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "answer", "note"], *([text, " 12", ""] for text in HARD), ["", "", ""]])
    prompts = PromptSet.read(path)
    assert prompts.prompts == (*HARD, "")
    assert prompts.answer == (*[" 12"] * len(HARD), None)
    assert prompts.other_columns == ("note",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer\na,b\nHello, world, x\n", "line 3: 3 cells, the header has 2"),
        ("prompt,answer\nonly\n", "line 2: 1 cells"),
        ('prompt\n"open', "line 2: "),
        ("prompt,prompt\na,b\n", "two columns 'prompt'"),
        ("prompt,answer\n", "holds no prompts"),
        ("", "holds no prompts"),
    ],
)
def test_csv_refuses(tmp_path, text, message):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(PromptFileError, match=message):
        PromptSet.read(path)


def test_parquet_keeps_text_ids_and_alternatives(tmp_path):
    path = tmp_path / "prompts.parquet"
    size = len(HARD)
    frame = pd.DataFrame({"prompt": HARD, "answer": [5] * size, "wrong": [[1, 2]] * size})
    frame["corrupt"] = [[1, 2, 3]] * (size - 1) + [None]
    frame.to_parquet(path)
    prompts = PromptSet.read(path)
    assert prompts.prompts == tuple(HARD)
    assert prompts.answer == (5,) * size
    assert prompts.wrong == ((1, 2),) * size
    assert prompts.corrupt == (*[(1, 2, 3)] * (size - 1), None)


def test_columns_can_be_remapped(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("text,target,prompt\na, x,unused\n")
    prompts = PromptSet.read(path, columns={"prompt": "text", "answer": "target"})
    assert (prompts.prompts, prompts.answer, prompts.other_columns) == (("a",), (" x",), ("prompt",))


def test_a_missing_column_lists_the_columns_and_how_to_remap(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("promt,answer\na, x\n")
    with pytest.raises(PromptFileError, match=r"only 'promt', 'answer'; did you mean 'promt'\?.*columns=\{\"prompt\""):
        PromptSet.read(path)
    with pytest.raises(PromptFileError, match="no column 'target'"):
        PromptSet.read(path, columns={"prompt": "promt", "answer": "target"})
    with pytest.raises(OptionError, match=r"'anser' is not known.*did you mean 'answer'"):
        PromptSet.read(path, columns={"anser": "answer"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "there is no prompt file"),
        ("empty.txt", b"", "holds no prompts"),
        ("blank.txt", b"\n\n", "holds no prompts"),
        ("empty.jsonl", b"", "holds no prompts"),
        ("p.xlsx", b"x", r"'.xlsx' files are not read, only .txt, .jsonl, .csv, .parquet"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("latin.csv", b"prompt\n" + "é".encode("latin-1"), "not UTF-8"),
        ("broken.parquet", b"not parquet", "cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptFileError, match=message):
        PromptSet.read(path)


def test_a_folder_is_not_a_prompt_file(tmp_path):
    with pytest.raises(PromptFileError, match="is a folder"):
        PromptSet.read(tmp_path)


def test_write_and_read_give_an_equal_set(tmp_path):
    size = len(HARD)
    prompts = PromptSet.of(
        [*HARD, [1, 2]],
        answer=[*[" x"] * size, [" y", 3]],
        corrupt=[*[None] * size, [2, 1]],
        ids=[f"p{row}" for row in range(size + 1)],
    )
    prompts.write(tmp_path / "prompts.jsonl")
    again = PromptSet.read(tmp_path / "prompts.jsonl")
    assert again == prompts
    assert again.content_hash() == prompts.content_hash()
    with pytest.raises(PromptFileError, match=r"prompts\.jsonl"):
        prompts.write(tmp_path / "prompts.csv")


def test_content_hash_sees_every_column():
    base = {"prompts": ["a", "b"], "answer": [" x", " y"], "wrong": [" y", " x"], "corrupt": ["c", "d"]}
    variants = [
        base,
        base | {"prompts": ["a", "c"]},
        base | {"answer": [" x", " z"]},
        base | {"wrong": [" y", None]},
        base | {"corrupt": ["c", "e"]},
        base | {"ids": ["p", "q"]},
        base | {"answer": None, "wrong": [" x", " y"]},
    ]
    assert len({PromptSet.of(**variant).content_hash() for variant in variants}) == len(variants)
    assert PromptSet.of(**base).content_hash() == PromptSet.of(**base).content_hash()


def test_head_keeps_the_columns_together():
    prompts = PromptSet.of(["a", "b", "c"], answer=[" x", " y", " z"], corrupt=["d", "e", "f"], ids=[5, 6, 7])
    assert list(prompts.head(2).rows()) == list(prompts.rows())[:2]
    assert list(prompts.rows())[1] == {"id": "6", "prompt": "b", "answer": " y", "corrupt": "e"}
    assert len(prompts.head(9)) == 3
    with pytest.raises(OptionError, match="n=0"):
        prompts.head(0)


@pytest.mark.parametrize("column", ["prompts", "answer", "ids"])
def test_half_a_surrogate_pair_is_refused(column):
    columns = {"prompts": ["a", "b"], "answer": [" x", " y"], "ids": ["one", "two"]}
    columns[column] = [columns[column][0], "broken \ud800"]
    with pytest.raises(PromptError, match="row 1 is not valid Unicode"):
        PromptSet.of(**columns)


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(PromptFileError, match=r"line 1"):
        PromptSet.read(path)
