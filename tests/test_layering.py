"""Who may import whom, what the public names are, and what no file of the package may do."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import steerbook
import steerbook.trainers
from steerbook.trainers import lofit

ROOT = Path(__file__).parents[1]
PARTS = ("trainers", "data_builders", "eval")
FILES = {
    part: sorted(path for path in (ROOT / part).rglob("*.py") if "__pycache__" not in path.parts)
    for part in (*PARTS, "recipes")
}
FILES["steerbook"] = sorted((ROOT / "src" / "steerbook").glob("*.py"))  # not through the links
EVERY = [path for files in FILES.values() for path in files]


def imports(path: Path, module: str, everywhere: bool = True) -> set[str]:
    """Absolute names of what a file imports; relative imports are resolved. `everywhere`: in functions too."""
    tree = ast.parse(path.read_text())
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names} | {name}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {n.value for n in node.args if isinstance(n, ast.Constant) and not n.value.startswith(".")}
    return found


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = list(relative.parts)
    parts = ["steerbook", *parts] if parts[0] in PARTS else [p for p in parts if p != "src"]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def reaches(found: set[str], *packages: str) -> set[str]:
    return {n for n in found if any(n == package or n.startswith(package + ".") for package in packages)}


FORBIDDEN = {
    "trainers": ["steerbook.data_builders", "steerbook.eval", "recipes"],
    "data_builders": ["steerbook.trainers", "steerbook.eval", "recipes", "torch", "peft", "trl"],
    "eval": ["steerbook.trainers", "recipes"],
    "steerbook": ["steerbook.data_builders", "steerbook.eval", "recipes"],
}


@pytest.mark.parametrize(("part", "path"), [(p, f) for p in FORBIDDEN for f in FILES[p]], ids=lambda x: Path(x).stem)
def test_who_imports_whom(part, path):
    assert not reaches(imports(path, module_name(path)), *FORBIDDEN[part])


def test_the_check_sees_every_form_of_import(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "y.py").write_text(
        "from ...eval import report\nfrom .. import data_builders\ndef f():\n    import torch.nn\n"
        "    importlib.import_module('steerbook.trainers.lofit')\n"
    )
    found = imports(folder / "y.py", "steerbook.trainers.lofit.y")
    assert reaches(found, "steerbook.eval") == {"steerbook.eval", "steerbook.eval.report"}
    assert reaches(found, "torch") == {"torch.nn"} and "steerbook.trainers.lofit" in found
    assert "steerbook.trainers.data_builders" in found  # `..` of trainers.lofit is trainers


def test_files_are_found():
    for part, least in (("trainers", 15), ("data_builders", 8), ("eval", 8), ("recipes", 1), ("steerbook", 3)):
        assert len(FILES[part]) >= least, part
    assert module_name(ROOT / "trainers" / "lofit" / "__init__.py") == "steerbook.trainers.lofit"
    assert module_name(ROOT / "src" / "steerbook" / "files.py") == "steerbook.files"


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_our_folders_are_never_imported_under_a_bare_name(path):
    assert not reaches(imports(path, module_name(path)), *PARTS, "recipes")


@pytest.mark.parametrize("path", [f for part in PARTS for f in FILES[part]], ids=name)
def test_inside_the_package_imports_are_relative(path):
    tree = ast.parse(path.read_text())
    absolute = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    assert not [n.module for n in absolute if (n.module or "").startswith("steerbook")]


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_nothing_is_executed_or_unpickled(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "os.system"), called
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert keywords.get("trust_remote_code", "False") == "False"
            assert keywords.get("shell", "False") == "False"
    assert not reaches(imports(path, module_name(path)), "pickle", "dill", "joblib", "cloudpickle", "requests")


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_house_style(path):
    text = path.read_text()
    tree = ast.parse(text)
    body_only = [n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in body_only), "a bare except"
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", text), "a path of some machine"
    assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= 300
    for node in tree.body:  # public functions
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and path not in FILES["recipes"]:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.returns is not None and all(a.annotation for a in arguments), node.name


# Public names


def test_public_names_of_the_trainers():
    assert set(steerbook.trainers.__all__) >= {
        "AtlasConfig", "AtlasTrainer", "Composer", "LowRankComposer", "TaskVector",
        "HeadSelection", "HintingConfig", "HintingTrainer",
        "LofitConfig", "LofitDPOConfig", "LofitDPOTrainer", "LofitSFTConfig", "LofitSFTTrainer",
        "export_merged", "newest_complete_checkpoint",
    }  # fmt: skip
    assert set(lofit.__all__) == {
        "HeadSelection", "LofitConfig", "LofitDPOConfig", "LofitDPOTrainer", "LofitLayer", "LofitModel",
        "LofitSFTConfig", "LofitSFTTrainer", "export_merged",
    }  # fmt: skip
    for package in (steerbook.trainers, lofit):
        for public in package.__all__:
            assert getattr(package, public).__name__ == public
        with pytest.raises(AttributeError, match="no_such_name"):
            package.no_such_name  # noqa: B018
    assert steerbook.trainers.LofitConfig is lofit.LofitConfig
    assert re.fullmatch(r"\d+\.\d+\.\d+", steerbook.__version__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("trainers.lofit.arguments", ["ARMS", "ArmArguments", "arm_key", "lora_targets"]),
        ("trainers.lofit.arms", ["Arm", "train_arms"]),
        ("trainers.lofit.iti", ["ItiProbe", "iti_adapter", "iti_probe"]),
        ("trainers.lofit.red", ["red_model"]),
        ("trainers.lofit.selection", ["grid", "layer_matched_heads", "learned_scores", "random_heads", "top_heads"]),
        ("trainers.lofit.stages", ["Fit", "fit", "fit_scales"]),
        ("trainers.atlas", ["BLOCKS", "Composer", "LowRank", "TaskVector", "split_blocks"]),
        ("trainers.atlas.arguments", ["ARMS", "SECTIONS", "ArmArguments", "arm_key"]),
        ("trainers.atlas.bench", ["Arm", "Bench"]),
        ("trainers.atlas.coefficients", ["apply_coefficients", "load_coefficients", "save_coefficients"]),
        ("trainers.atlas.export", ["export_adapter", "export_folded", "mergekit_yaml"]),
        ("trainers.atlas.extract", ["task_vector"]),
        ("trainers.atlas.linearized", ["linearized_step"]),
        ("trainers.atlas.selection", ["blockwise_vectors", "gradient_scores", "vectors_by_feature"]),
        (
            "trainers.task_hinting",
            [
                "LengthSoftmax",
                "ScratchConfig",
                "length_softmax",
                "load",
                "named_tokenizer",
                "save",
                "scratch_model",
                "use_length_softmax",
            ],
        ),
        ("data_builders.task_hinting", ["HintingDataArguments", "build", "make_stream", "test_sets"]),
        ("eval.task_hinting", ["area", "by_length", "error_shares", "falls_under", "generated", "teacher_forced"]),
        ("trainers.multitask", ["MultiTaskConfig", "MultiTaskTrainer"]),
        ("trainers.tiny_lm", ["TinyConfig", "tiny_lm"]),
        ("trainers.training", ["FiniteTrainer", "HouseArguments", "NonFiniteError"]),
        ("trainers.checkpoints", ["newest_complete_checkpoint"]),
        ("trainers.fingerprint", ["model_fingerprint"]),
        ("trainers.seeds", ["run_seeds"]),
        ("trainers.base_model", ["load_base"]),
        ("data_builders.lofit", ["LofitDataArguments", "build"]),
        ("eval.lofit", ["evaluate", "exact_match", "head_overlap", "multiple_choice"]),
        ("data_builders.atlas", ["AtlasDataArguments", "build"]),
        ("eval.atlas", ["accuracy", "classify", "disentanglement", "evaluate", "normalised", "predicted"]),
        ("eval.self_interpretability", ["agreement", "fit_weights", "gain", "linearity", "permuted"]),
        ("eval.choices", ["choice_logprobs"]),
    ],
)
def test_public_names_of_the_modules(module, names):
    loaded = importlib.import_module(f"steerbook.{module}")
    assert all(callable(vars(loaded)[n]) or n.isupper() for n in names)


def test_version_is_the_distributions():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared and declared.group(1) == steerbook.__version__


def test_the_links_point_at_the_top_level_folders():
    for part in PARTS:
        link = ROOT / "src" / "steerbook" / part
        assert link.is_symlink() and link.resolve() == ROOT / part
