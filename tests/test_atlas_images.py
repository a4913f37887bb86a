"""Image tasks of the aTLAS row: the embedded digits, image folders and parquet files, few-shot sampling, errors."""

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from sklearn.datasets import load_digits

from steerbook.data_builders.atlas import SPLITS, digits, image_tasks, images
from steerbook.data_builders.atlas.images import AtlasImageArguments
from steerbook.data_builders.rows import RowError, fingerprint


@pytest.fixture(scope="module")
def data():
    return images.build(AtlasImageArguments(rows_seed=3))


# The embedded digits


def test_no_image_is_in_two_splits_of_whatever_task(data):
    groups = {split: set(data[split]["group"]) for split in (*SPLITS, "base", "control")}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not groups[one] & groups[other]
    assert groups["base"] == groups["train"] and groups["control"] == groups["test"]
    for split in SPLITS:  # every task has the same images
        tasks = {}
        for task, group in zip(data[split]["task"], data[split]["group"], strict=True):
            tasks.setdefault(task, set()).add(group)
        assert set(tasks) == set(digits.CHANGES) and len(digits.CHANGES) >= 6
        assert all(own == groups[split] for own in tasks.values())


def test_images_are_the_real_ones_changed_as_named(data):
    pixels, labels = load_digits(return_X_y=True)
    real = np.rint(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    expected = {
        "upright": lambda x: x, "left": lambda x: x.T[::-1], "turned": lambda x: x[::-1, ::-1],
        "mirrored": lambda x: x[:, ::-1], "inverted": lambda x: 255 - x,
        "shifted": lambda x: np.hstack([np.zeros((8, 1)), x[:, :-1]]),
    }  # fmt: skip
    seen = set()
    for row in [*data["control"], *data["dev"]]:
        place = int(row["id"].split("-")[1])
        assert row["label"] == labels[place]
        if row["task"] in expected:
            np.testing.assert_array_equal(np.array(row["image"]), expected[row["task"]](real[place]))
            seen.add(row["task"])
    assert seen == set(expected)


def test_noise_belongs_to_the_image_and_hits_every_pixel_alike(data):
    again = images.build(AtlasImageArguments(rows_seed=4))
    one, two = ({r["group"]: np.array(r["image"]) for r in d["train"] if r["task"] == "noisy"} for d in (data, again))
    shared = one.keys() & two.keys()
    assert len(shared) > 100 and all((one[group] == two[group]).all() for group in shared)


def test_build_is_pure_and_limits_hold(data):
    args = AtlasImageArguments(rows_seed=3, max_train_rows=20, max_fit_rows=9, max_eval_rows=5, world="smoke")
    small = images.build(args)
    assert {split: len(small[split]) for split in SPLITS} == {"train": 60, "fit": 27, "dev": 15, "test": 15}
    whole = fingerprint(images.without_images(data))
    assert fingerprint(images.without_images(images.build(AtlasImageArguments(rows_seed=3)))) == whole
    assert fingerprint(images.without_images(images.build(AtlasImageArguments(rows_seed=4)))) != whole
    assert images.of_seed(args, 7).rows_seed == 7


def test_prompts_are_those_of_the_classes(data):
    prompts = images.prompts(data["classes"])
    assert set(prompts) == {*digits.CHANGES, "upright"}
    assert prompts["left"][4] == ["a photo of the digit four.", "a scan of a four.", "the number four."]


def test_flags_of_real_data_are_refused_for_the_digits():
    with pytest.raises(ValueError, match="--label_column fine has no meaning for the embedded digits"):
        images.build(AtlasImageArguments(label_column="fine"))


# Few shots


def test_few_shot_takes_so_many_of_each_class_and_grows():
    labels = [0, 1, 2] * 10 + [2]
    four, one = images.few_shot(labels, 4, seed=1), images.few_shot(labels, 1, seed=1)
    assert sorted(labels[place] for place in four) == [0] * 4 + [1] * 4 + [2] * 4
    assert set(one) < set(four) and one != images.few_shot(labels, 1, seed=2)
    assert len(images.few_shot(labels, 100)) == len(labels)
    with pytest.raises(ValueError, match="0 shots"):
        images.few_shot(labels, 0)


# One's own tasks


def picture(seed, size=(6, 5)):
    return Picture.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """An image folder with train (2 x 15 images) and test (2 x 2), one test image in train, too."""
    for number in range(15):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / "train" / name).mkdir(parents=True, exist_ok=True)
            picture(2 * number + label).save(tmp_path / "pets" / "train" / name / f"{number}.png")
    for number, name in ((0, "cat"), (1000, "cat"), (1001, "dog"), (1002, "dog")):
        (tmp_path / "pets" / "test" / name).mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "pets" / "test" / name / f"{number}.png")
    return tmp_path / "pets"


def test_image_folder(folder, caplog):
    args = AtlasImageArguments(tasks=[f"pets={folder}"], templates=["a picture of a {}.", "one {}"])
    with caplog.at_level("WARNING"):
        data = images.build(args)
    assert "dropped 1 images" in caplog.text and "fit, dev cut from train" in caplog.text
    counts = {split: len(data[split]) for split in SPLITS}
    assert counts["test"] == 4 and counts["fit"] == counts["dev"] == 3 and sum(counts.values()) == 33
    assert images.prompts(data["classes"]) == {
        "pets": [["a picture of a cat.", "one cat"], ["a picture of a dog.", "one dog"]]
    }
    for row in data["train"]:  # label and pixels still belong together
        found = next(n for n in range(30) if np.array_equal(np.array(picture(n)), np.array(row["image"])))
        assert row["label"] == found % 2 and row["task"] == "pets"
    assert not set(data["train"]["group"]) & set(data["test"]["group"])


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_parquet_with_other_column_names_and_names_for_labels(tmp_path):
    rows = [{"img": encoded(picture(n)), "kind": ("red", "blue")[n % 2]} for n in range(40)]
    Dataset.from_list(rows, Features({"img": Image(), "kind": Value("string")})).to_parquet(tmp_path / "a.parquet")
    args = AtlasImageArguments(tasks=[f"colours={tmp_path / 'a.parquet'}"], image_column="img", label_column="kind",
                               templates=["colours=something {}"], max_train_rows=7)  # fmt: skip
    data = images.build(args)
    assert len(data["train"]) == 7 and len(data["fit"]) == len(data["dev"]) == len(data["test"]) == 4
    assert images.prompts(data["classes"]) == {"colours": [["something blue"], ["something red"]]}
    for row in data["test"]:
        found = next(n for n in range(40) if np.array_equal(np.array(picture(n)), np.array(row["image"])))
        assert row["label"] == (found + 1) % 2


def test_an_image_of_two_tasks_stays_held_out_in_both(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y"])})
    for name, first in (("one", 0), ("two", 35)):  # images 35 to 39 are in both
        rows = [{"image": encoded(picture(n)), "label": n % 2} for n in range(first, first + 40)]
        Dataset.from_list(rows, features).to_parquet(tmp_path / f"{name}.parquet")
    args = AtlasImageArguments(tasks=[f"one={tmp_path / 'one.parquet'}", f"two={tmp_path / 'two.parquet'}"])
    data = images.build(args)
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not set(data[one]["group"]) & set(data[other]["group"])
    assert sum(len(data[split]) for split in SPLITS) <= 80


def test_bad_rows_are_listed(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y"])})
    rows = [{"image": encoded(picture(n)), "label": n % 2} for n in range(20)]
    rows[4]["image"], rows[6]["label"] = {"bytes": b"not a picture", "path": None}, -1
    rows[9]["image"] = None
    Dataset.from_list(rows, features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RowError) as error:
        images.build(AtlasImageArguments(tasks=[f"t={tmp_path / 'a.parquet'}"]))
    text = str(error.value)
    assert "3 problem(s)" in text and "row 5, column 'image': found a file that does not open" in text
    assert "row 7, column 'label': found" in text and "expected one of 2 classes" in text
    assert "row 10, column 'image': found nothing (None)" in text


def test_clear_errors(tmp_path, folder):
    def build(**values):
        return images.build(AtlasImageArguments(**values))

    with pytest.raises(ValueError, match="'pets' is not name=PATH_OR_HUB_ID"):
        build(tasks=["pets"])
    with pytest.raises(ValueError, match="'pets' is given twice"):
        build(tasks=[f"pets={folder}", f"pets={folder}"])
    with pytest.raises(
        RowError, match="missing column 'img'; there are 'image', 'label' .--image_column names another"
    ):
        build(tasks=[f"pets={folder}"], image_column="img")
    with pytest.raises(ValueError, match="needs {} once, where the class name goes"):
        build(tasks=[f"pets={folder}"], templates=["a photo"])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        build(tasks=[f"pets={tmp_path}/absent/x"])
    with pytest.raises(ValueError, match="a limit of 0 rows"):
        build(tasks=[f"pets={folder}"], max_fit_rows=0)
    numbers = Dataset.from_list([{"image": encoded(picture(n)), "label": 1} for n in range(9)],
                                Features({"image": Image(), "label": Value("int64")}))  # fmt: skip
    numbers.to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(RowError, match="expected class names or a ClassLabel, which has them"):
        build(tasks=[f"t={tmp_path / 'numbers.parquet'}"])
    texts = Dataset.from_list([{"image": "a", "label": "b"}])
    texts.to_parquet(tmp_path / "texts.parquet")
    with pytest.raises(RowError, match="expected images"):
        build(tasks=[f"t={tmp_path / 'texts.parquet'}"])
    features = Features({"image": Image(), "label": Value("string")})
    few = Dataset.from_list([{"image": encoded(picture(n)), "label": "a"} for n in range(3)], features)
    few.to_parquet(tmp_path / "few.parquet")
    with pytest.raises(ValueError, match="3 different train images; fit, dev, test cannot be cut from so few"):
        build(tasks=[f"t={tmp_path / 'few.parquet'}"])


def test_templates_of_one_task_and_of_all():
    found = image_tasks.named_templates(["all {}", "b=only {}", "x=y {}"], ["a", "b"])
    assert found == {"a": ["all {}", "x=y {}"], "b": ["only {}"]}
    assert image_tasks.named_templates(None, ["a"]) == {"a": ["a photo of a {}."]}
