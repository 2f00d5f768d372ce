"""Every reader on small files in the benchmarks' own formats, and what each says of a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.dataset import EvaluationTask
from vlmflow.evaluation.readers import ReadOptions, read_dataset


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def karpathy(num: int = 3, dataset: str = "coco") -> dict[str, Any]:
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "cocoid": number,
            "split": "test" if number < num else "restval",
            "sentences": [{"raw": f"caption {number} {at}"} for at in range(5)],
        }
        for number in range(num + 2)
    ]
    return {"images": images, "dataset": dataset}


def test_karpathy_split_of_coco(tmp_path: Path) -> None:
    data = write_json(tmp_path / "dataset_coco.json", karpathy())
    found = read_dataset("caption", data, ReadOptions(images="s3://bucket/coco"))
    rows = found.rows.to_pylist()
    assert [row["uri"] for row in rows][1] == "s3://bucket/coco/val2014/COCO_val2014_000000000001.jpg"
    assert rows[2]["captions"] == [f"caption 2 {at}" for at in range(5)]
    assert found.image_ids == {"0": 0, "1": 1, "2": 2}
    assert found.benchmark is None, "three images are not the test split"
    train = read_dataset("retrieval", data, ReadOptions(split="train"))
    assert train.rows.num_rows == 2, "restval is trained on"
    assert train.rows["uri"][0].as_py().startswith(str(tmp_path))


@pytest.mark.parametrize(("num", "dataset", "benchmark"), [(5000, "coco", "coco"), (1000, "flickr30k", "flickr30k")])
def test_whole_test_splits_are_known_as_benchmarks(tmp_path: Path, num: int, dataset: str, benchmark: str) -> None:
    data = write_json(tmp_path / "d.json", karpathy(num, dataset))
    found = read_dataset("retrieval", data)
    assert found.benchmark == benchmark
    assert found.first(10).benchmark is None
    assert found.first(10).rows.num_rows == 10


def test_coco_annotations_and_the_list_form(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "two"}],
    }
    found = read_dataset("caption", write_json(tmp_path / "captions_val2014.json", content), ReadOptions())
    assert found.rows.to_pylist() == [{"uri": str(tmp_path / "a.jpg"), "captions": ["one", "two"]}]
    assert found.image_ids == {"7": 0}
    listed = [{"image": "val2014/a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": "three"}]
    found = read_dataset("retrieval", write_json(tmp_path / "coco_karpathy_test.json", listed), ReadOptions())
    assert found.rows["captions"].to_pylist() == [["one", "two"], ["three"]]


def test_flickr_tokens_and_a_part_of_them(tmp_path: Path) -> None:
    tokens = tmp_path / "results_20130124.token"
    tokens.write_text("1.jpg#0\tA\u2028man .\n1.jpg#1\tA person .\n2.jpg#0\tA dog .\n", encoding="utf-8")
    found = read_dataset("retrieval", str(tokens), ReadOptions())
    assert found.rows["captions"].to_pylist() == [["A\u2028man .", "A person ."], ["A dog ."]]
    (tmp_path / "test.txt").write_text("2.jpg\n")
    part = read_dataset("caption", str(tokens), ReadOptions(split=str(tmp_path / "test.txt")))
    assert part.rows["uri"].to_pylist() == [str(tmp_path / "2.jpg")]


@pytest.mark.parametrize(
    ("whole", "part", "benchmark"),
    [
        (31_783, "flickr30k_test.txt", "flickr30k"),
        (31_783, "flickr30k_val.txt", None),
        (8_092, "Flickr_8k.testImages.txt", None),
    ],
)
def test_only_flickr30ks_own_test_images_are_its_benchmark(
    tmp_path: Path, whole: int, part: str, benchmark: str | None
) -> None:
    tokens, split = tmp_path / "captions.token", tmp_path / part
    tokens.write_text("".join(f"{number}.jpg#0\ta dog\n" for number in range(whole)))
    split.write_text("".join(f"{number}.jpg\n" for number in range(1_000)))
    assert read_dataset("retrieval", str(tokens), ReadOptions(split=str(split))).benchmark == benchmark


@pytest.mark.parametrize(
    ("name", "benchmark"), [("flickr30k_test.json", "flickr30k"), ("flickr30k_val.json", None), ("f8k_test.json", None)]
)
def test_a_list_is_a_benchmark_by_its_name(tmp_path: Path, name: str, benchmark: str | None) -> None:
    listed = [{"image": f"{number}.jpg", "caption": "a dog"} for number in range(1_000)]
    assert read_dataset("retrieval", write_json(tmp_path / name, listed), ReadOptions()).benchmark == benchmark


def vqa_files(folder: Path) -> str:
    questions = [
        {"question_id": 10, "image_id": 1, "question": "What is it?"},
        {"question_id": 11, "image_id": 1, "question": "How many?"},
        {"question_id": 20, "image_id": 2, "question": "Is it red?"},
    ]
    annotations = [
        {
            "question_id": item["question_id"],
            "image_id": item["image_id"],
            "question_type": "what is" if item["question_id"] == 10 else "how many",
            "answer_type": "other",
            "answers": [{"answer": f"a{item['question_id']}", "answer_id": at} for at in range(10)],
        }
        for item in questions
    ]
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    content = {"questions": questions, "data_subtype": "val2014"}
    return write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", content)


def test_vqa_finds_its_annotations_and_groups_by_image(tmp_path: Path) -> None:
    found = read_dataset("answer", vqa_files(tmp_path), ReadOptions(images="/data/val2014"))
    rows = found.rows.to_pylist()
    assert [row["uri"] for row in rows] == [f"/data/val2014/COCO_val2014_{number:012d}.jpg" for number in (1, 2)]
    assert [question["question_id"] for question in rows[0]["questions"]] == ["10", "11"]
    assert rows[0]["questions"][0]["answers"] == ["a10"] * 10
    assert rows[1]["questions"][0]["question_type"] == "how many"
    assert found.benchmark == "vqav2"


@pytest.mark.parametrize(("version", "benchmark"), [("2.0", "vqav2"), ("1.0", None)])
def test_the_first_version_of_vqa_is_another_benchmark(tmp_path: Path, version: str, benchmark: str | None) -> None:
    path = Path(vqa_files(tmp_path)).rename(tmp_path / "questions.json")
    write_json(path, json.loads(path.read_text()) | {"info": {"version": version}})
    options = ReadOptions(annotations=tmp_path / "v2_mscoco_val2014_annotations.json")
    assert read_dataset("answer", str(path), options).benchmark == benchmark


def test_a_folder_per_class(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    found = read_dataset("zeroshot", str(tmp_path), ReadOptions())
    assert found.classes == ("cat", "dog")
    assert found.rows["class"].to_pylist() == ["cat", "cat", "dog"]


def test_a_part_of_classes_is_spread_over_them(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("uri,class\n" + "".join(f"{name}{at}.png,{name}\n" for name in "abcde" for at in range(4)))
    whole = read_dataset("zeroshot", str(path), ReadOptions())
    part, one, few = (whole.first(num) for num in (12, 5, 2))
    assert sorted(part.rows["class"].to_pylist().count(name) for name in "abcde") == [2, 2, 2, 3, 3]
    assert one.rows["class"].to_pylist() == list("abcde")
    assert set(few.rows["uri"].to_pylist()) < set(one.rows["uri"].to_pylist()) < set(part.rows["uri"].to_pylist())
    assert few.rows["class"].to_pylist() != ["a", "b"]
    assert part.classes == whole.classes, "the others are to be told apart all the same"


def test_a_table_joined_with_its_truth(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,uri,title\n1,a.jpg,A cat\n2,s3://b/b.jpg,A dog\n3,a.jpg,A cow\n")
    (tmp_path / "t.csv").write_text("id,bad,labels\n3,true,\n1,false,gun;bomb\n2,no,\n")
    options = ReadOptions(truth=tmp_path / "t.csv", columns={"mismatch": "bad"})
    rows = read_dataset("match", str(tmp_path / "m.csv"), options).rows.to_pylist()
    assert {(row["uri"], row["text"], row["match"]) for row in rows} == {
        (str(tmp_path / "a.jpg"), "A cat", True),
        ("s3://b/b.jpg", "A dog", True),
        (str(tmp_path / "a.jpg"), "A cow", False),
    }
    assert len({row["key"] for row in rows}) == 3
    options = ReadOptions(truth=tmp_path / "t.csv", where="title <> 'A cow'")
    rows = read_dataset("moderate", str(tmp_path / "m.csv"), options).rows.to_pylist()
    assert [(row["labels"], row["flag"]) for row in rows] == [(["bomb", "gun"], True), ([], False)]


def test_numbers_in_a_list_and_nothing_in_a_column_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text('uri,question,answers,question_type\na.jpg,how many?,"[2, null, ""two""]",\n')
    (question,) = read_dataset("answer", str(path), ReadOptions()).rows["questions"][0].as_py()
    assert question["answers"] == ["2", "2"], "as the challenge spells them"


def test_a_text_in_brackets_is_no_list_and_labels_have_no_order(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(
        'uri,captions\na.jpg,[Sale] Red shoe\nb.jpg,"[""x"", ""y""]"\nc.jpg,[2024] Shoe\nd.jpg,[3-Pack] Shoe\n'
    )
    rows = read_dataset("caption", str(path), ReadOptions()).rows["captions"].to_pylist()
    assert rows == [["[Sale] Red shoe"], ["x", "y"], ["[2024] Shoe"], ["[3-Pack] Shoe"]]
    for broken in ('"[""x"", ""y"""', "\"['x', 'y']\"", '"[1, 2"', '"[null,"', "[", "[" * 100_000):
        path.write_text(f"uri,captions\na.jpg,{broken}\n")
        with pytest.raises(EvaluationError, match="captions is no JSON list"):
            read_dataset("caption", str(path), ReadOptions())
    path.write_text("uri,labels\na.jpg,gun;bomb\na.jpg,bomb;gun\n")
    rows = read_dataset("moderate", str(path), ReadOptions()).rows["labels"].to_pylist()
    assert rows == [["bomb", "gun"]]


@pytest.mark.parametrize(
    ("data", "truth"),
    [
        ("numbers.parquet", "ids.csv"),
        ("ids.csv", "numbers.parquet"),
        ("lists.jsonl", "ids.csv"),
        ("ids.csv", "lists.jsonl"),
    ],
)
def test_a_truth_is_joined_whatever_the_types_of_its_columns(tmp_path: Path, data: str, truth: str) -> None:
    captions, ids = [["x", "y"], ["z"], ["w"]], [3, 1, 2]
    said = pa.table({"id": ids, "uri": ["3.png", "1.png", "2.png"], "captions": captions})
    pq.write_table(said, tmp_path / "numbers.parquet")
    lines = [json.dumps({**row, "id": str(row["id"])}) for row in said.to_pylist()]
    (tmp_path / "lists.jsonl").write_text("\n".join(lines))
    (tmp_path / "ids.csv").write_text("id,more\n1,a\n2,b\n3,c\n")
    options = ReadOptions(truth=tmp_path / truth, where="more <> 'b'")
    rows = read_dataset("caption", str(tmp_path / data), options).rows.to_pylist()
    expected = [("3.png", ["x", "y"]), ("1.png", ["z"])]  # in the order of the data
    assert [(Path(row["uri"]).name, row["captions"]) for row in rows] == expected[:: -1 if data == "ids.csv" else 1]


def test_a_parquet_table_of_questions_and_one_of_captions(tmp_path: Path) -> None:
    table = pa.table({"uri": ["a.jpg", "a.jpg"], "question": ["q1", "q2"], "answers": [["yes", "no"], ["2"]]})
    pq.write_table(table, tmp_path / "q.parquet")
    found = read_dataset("answer", str(tmp_path / "q.parquet"), ReadOptions())
    assert found.rows.num_rows == 1
    assert [question["answers"] for question in found.rows["questions"][0].as_py()] == [["yes", "no"], ["2"]]
    (tmp_path / "c.jsonl").write_text('{"picture": "a.jpg", "said": ["x", "y"]}\n{"picture": "a.jpg", "said": ["z"]}\n')
    options = ReadOptions(columns={"uri": "picture", "captions": "said"}, images="s3://bucket/images")
    found = read_dataset("caption", str(tmp_path / "c.jsonl"), options)
    assert found.rows.to_pylist() == [{"uri": "s3://bucket/images/a.jpg", "captions": ["x", "y", "z"]}]


BROKEN: list[tuple[EvaluationTask, str, str, dict[str, Any], list[str]]] = [
    ("caption", "x.json", "{", {}, ["x.json is not JSON"]),
    ("caption", "x.json", '{"a": 1}', {}, ["no list of objects named images"]),
    ("caption", "x.json", json.dumps(karpathy()), {"split": "dev"}, ["no split dev", "restval, test"]),
    ("caption", "x.json", '{"images": [{"split": "test", "sentences": []}]}', {}, ["image 0: filename is absent"]),
    ("caption", "x.json", '[{"image": "a.jpg", "caption": 3}]', {}, ["entry 0: caption is '3'"]),
    ("caption", "x.json", '[{"image": "a.jpg", "caption": [{"raw": "x"}]}]', {}, ["entry 0: caption is"]),
    ("caption", "x.json", '[{"image": "a.jpg", "caption": []}]', {}, ["a.jpg has no caption"]),
    (
        "caption",
        "x.json",
        '{"images": [{"split": "test", "filename": "a.jpg", "filepath": 5, "sentences": [{"raw": "x"}]}]}',
        {},
        ["image 0: filepath is '5'"],
    ),
    ("zeroshot", "x.json", "[]", {}, ["holds captions, and zeroshot cannot be measured"]),
    ("retrieval", "x.json", "[]", {}, ["x.json holds no image"]),
    ("answer", "x.json", '{"questions": []}', {}, ["no annotations at", "--annotations"]),
    ("caption", "x.token", "1.jpg A man\n", {}, ["line 1", "1.jpg A man"]),
    ("caption", "x.token", "1.jpg#0\tA man\n", {"split": "dev.txt"}, ["--split dev.txt: no such file"]),
    ("caption", "x.csv", "uri,said\na.jpg,x\n", {}, ["no column for captions; it has uri, said", "captions=NAME"]),
    ("caption", "x.csv", "uri,title\n,x\n", {}, ["row 1: uri is empty"]),
    ("caption", "x.csv", "uri,title\na.jpg,\n", {}, ["row 1: title is empty"]),
    ("match", "x.csv", "uri,text,match\na.jpg,x,maybe\n", {}, ["row 1: match is neither true nor false: 'maybe'"]),
    ("match", "x.csv", "uri,text,match\na.jpg,x,true\na.jpg,x,false\n", {}, ["row 2", "contradicts"]),
    ("zeroshot", "x.csv", "uri,class\na.jpg,cat\na.jpg,dog\n", {}, ["row 2: class was 'cat' further up"]),
    ("moderate", "x.csv", "uri,flag\na.jpg,true\n", {"where": "nothing = 1"}, ["condition in SQL", "uri, flag"]),
    ("moderate", "x.csv", "uri,flag\na.jpg,true\n", {"where": "flag = 'x'"}, ["x.csv holds no image"]),
    ("moderate", "x.csv", "uri,flag\na.jpg,true\n", {"columns": {"colour": "x"}}, ["--column colour", "labels"]),
    ("moderate", "x.csv", "uri,flag\na.jpg,true\n", {"columns": {"flag": "x"}}, ["no column x; it has uri, flag"]),
    ("answer", "x.csv", "uri,question,answers\na.jpg,q,\n", {}, ["row 1: answers is empty"]),
    (
        "answer",
        "x.jsonl",
        '{"uri":"a","question":"q","answers":[{"answer":"x"}]}',
        {},
        ["row 1: answers holds no texts"],
    ),
    ("answer", "x.jsonl", '{"uri":"a","question":"q","answers":{"answer":"x"}}', {}, ["row 1: answers holds no texts"]),
    ("answer", "x.jsonl", '{"uri":"a","question":{"en":"q"},"answers":"x"}', {}, ["row 1: question is no text"]),
    ("caption", "x.jsonl", '{"uri":"a","captions":[["x"]]}', {}, ["row 1: captions holds no texts"]),
    ("caption", "x.csv", 'uri,captions\na,"[true]"\n', {}, ["row 1: captions holds no texts"]),
    ("caption", "x.pdf", "", {}, [".pdf is none of the files"]),
]


@pytest.mark.parametrize(("task", "name", "text", "options", "named"), BROKEN)
def test_broken_files_name_place_value_and_remedy(
    task: EvaluationTask, name: str, text: str, options: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError) as error:
        read_dataset(task, str(tmp_path / name), ReadOptions(**options))
    assert error.value.remedy
    for word in named:
        assert word in f"{error.value} {error.value.remedy}"


_COCO = json.dumps({"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "caption": "one"}]})
_TABLE = "uri,title,flag\na.jpg,x,true\n"


@pytest.mark.parametrize(
    ("task", "name", "text", "options", "named"),
    [
        ("caption", "c.json", _COCO, {"where": "id = 7"}, "--where is not for COCO files"),
        ("caption", "c.json", _COCO, {"truth": Path("t.csv")}, "--truth is not for COCO files"),
        ("caption", "c.json", _COCO, {"columns": {"captions": "x"}}, "--column is not for COCO files"),
        ("caption", "c.json", _COCO, {"split": "val"}, "--split is not for COCO files"),
        ("caption", "c.json", '[{"image": "a", "caption": "x"}]', {"split": "val"}, "--split is not for lists of"),
        ("caption", "c.json", json.dumps(karpathy()), {"where": "id = 7"}, "--where is not for Karpathy files"),
        ("caption", "c.token", "1.jpg#0\tA man\n", {"on": "id"}, "--on is not for token files"),
        ("answer", "c.json", '{"questions": []}', {"split": "val"}, "--split is not for VQA files"),
        ("caption", "c.csv", _TABLE, {"split": "val"}, "--split is not for tables"),
        ("caption", "c.csv", _TABLE, {"annotations": Path("a.json")}, "--annotations is not for tables"),
        ("moderate", "c.csv", _TABLE, {"on": "uri"}, "--on uri without --truth"),
        ("zeroshot", "", "", {"images": "s3://bucket"}, "--images is not for folders of classes"),
    ],
)
def test_what_a_reader_does_not_look_at_is_refused(
    task: EvaluationTask, name: str, text: str, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """Left out of account, it would make another figure than was meant."""
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "1.png")
    if name:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=named) as error:
        read_dataset(task, str(tmp_path / name), ReadOptions(**options))
    assert error.value.remedy.startswith("Leave it out") or "leave it out" in error.value.remedy


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist"):
        read_dataset("caption", str(tmp_path / "absent.json"), ReadOptions())
    with pytest.raises(EvaluationError, match="has no folders"):
        read_dataset("zeroshot", str(tmp_path), ReadOptions())
    with pytest.raises(EvaluationError, match="folder of images"):
        read_dataset("caption", str(tmp_path), ReadOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="empty holds no image"):
        read_dataset("zeroshot", str(tmp_path), ReadOptions())


def test_a_truth_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,uri\n1,a.jpg\n2,b.jpg\n")
    data, truth = str(tmp_path / "m.csv"), tmp_path / "t.csv"
    for text, options, message in (
        ("id,flag\n1,true\n", {}, "says nothing of id 2"),
        ("id,flag\n1,true\n1,true\n2,true\n", {}, "holds one value of id twice"),
        ("number,flag\n1,true\n", {}, "share no column"),
        ("id,uri,flag\n1,a.jpg,true\n", {}, "share the columns id, uri"),
        ("id,flag\n1,true\n", {"on": "flag"}, "not a column of both"),
    ):
        truth.write_text(text)
        with pytest.raises(EvaluationError, match=message):
            read_dataset("moderate", data, ReadOptions(truth=truth, **options))


def test_a_column_that_data_and_truth_hold_differently_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,uri,flag,note\n1,a.jpg,false,x\n2,b.jpg,true,y\n")
    data, truth = str(tmp_path / "m.csv"), tmp_path / "t.csv"
    truth.write_text("id,uri,flag,note\n2,far/b.jpg,true,z\n1,far/a.jpg,true,z\n")
    with pytest.raises(EvaluationError, match=r"m.csv and .*t.csv differ in their columns flag: 'false', 'true'"):
        read_dataset("moderate", data, ReadOptions(truth=truth, on="id"))
    truth.write_text("id,uri,flag,note\n2,far/b.jpg,true,z\n1,far/a.jpg,false,z\n")
    rows = read_dataset("moderate", data, ReadOptions(truth=truth, on="id")).rows
    assert [Path(uri).name for uri in rows["uri"].to_pylist()] == ["a.jpg", "b.jpg"], "images are those of the data"
    assert rows["flag"].to_pylist() == [False, True]


def test_a_question_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("uri,question_id,question,answers\na.jpg,1,who,me\nb.jpg,1,who,you\n")
    with pytest.raises(EvaluationError, match="stands twice"):
        read_dataset("answer", str(path), ReadOptions())
