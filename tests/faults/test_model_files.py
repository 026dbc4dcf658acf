"""A thousand damaged models: each is refused by a clear error, or opens with exactly the encoder weights of its files."""

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from shrp_hf.models.modeling_shrp import ShrpModelMixin
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from tests.faults.fuzzing import CONFIG, INDEX, MUTATIONS
from tests.faults.isolation import in_children
from tests.test_families import stock
from tests.tiny import tiny_bert, tiny_routed

SEEDS_EACH = int(os.environ.get("SEEDS", 3))
CLEAR = (ValueError, OSError, ImportError, RuntimeError, StrictDataclassError)
CUT = KeepPlan(((0, 3), (), (1,)), 4, (range(9), range(64), ()), 64)
STATIC = KeepPlan(((1, 2), (2,), (0, 3)), 4)


def pending() -> PreTrainedModel:
    model = to_shrp(tiny_bert())
    model.convert_layers_(2, pending=True)
    model.activate_layer_(2)
    return model


BASES = {
    "dense": lambda: to_shrp(tiny_bert()),
    "cut": lambda: prune_heads(tiny_bert(), CUT),
    "routed": lambda: tiny_routed([0, 2]),
    "pending": pending,
    "static": lambda: prune_heads(tiny_routed(2), STATIC),
    "sharded": lambda: prune_heads(tiny_routed(2), STATIC),
    "roberta": lambda: prune_heads(stock("roberta", dtype=torch.float32), CUT),
    "electra": lambda: prune_heads(stock("electra", dtype=torch.float32), CUT),
    "distilbert": lambda: prune_heads(stock("distilbert", dtype=torch.float32), CUT),
    "vit": lambda: prune_heads(stock("vit", dtype=torch.float32), CUT),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name, build in BASES.items():
        build().save_pretrained(root / name, max_shard_size="20KB" if name == "sharded" else "1GB")
    return {name: root / name for name in BASES}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """What the files of a folder hold, read by safetensors alone."""
    names = ["model.safetensors"]
    if not (folder / names[0]).exists():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return {key: value for name in names for key, value in load_file(folder / name).items()}


def is_encoder(name: str, model: PreTrainedModel) -> bool:
    """Whether a name is one of the base model's, without its pooler."""
    return name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name


def is_pruned(model: PreTrainedModel) -> bool:
    return bool(model.config.kept_heads or model.config.expert_layers or model.config.pending_layers)


def altered(model: PreTrainedModel, folder: Path) -> str | None:
    """The first encoder weight of an opened model that is not as in its files, or that is left over there."""
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        ours = load_file(f"{saved}/model.safetensors")
    theirs = tensors_in(folder)
    for name in sorted(name for name in ours.keys() | theirs.keys() if is_encoder(name, model)):
        if name not in theirs or (name not in ours and is_pruned(model) and {"layer", "layers"} & set(name.split("."))):
            return f"{name} is only in the {'model' if name in ours else 'file'}"
        if name not in ours:
            continue  # a dense model may be given fewer layers than its files have, as in Transformers
        if not torch.equal(ours[name].nan_to_num(), theirs[name].to(ours[name].dtype).nan_to_num()):
            return f"{name} has other values than the file"
    return None


def try_case(case: tuple[Path, str, int]) -> tuple[str, str]:
    """Damages a copy of a base and opens it: ("refused" | "equal" | "survived" | "lost", why)."""
    base, mutation, seed = case
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "model")
        shutil.copytree(base, folder)
        shutil.copytree(base.parent / "static", Path(root, "outside"))
        MUTATIONS[mutation](folder, random.Random(f"{base.name} {mutation} {seed}"))
        outcome = open_model(folder, base)
        return ("lost", "a pickle or a module was executed") if (folder / "canary").exists() else outcome


def open_model(folder: Path, base: Path) -> tuple[str, str]:
    config = json.loads((base / CONFIG).read_text())
    opener = next(cls for cls in subclasses(ShrpModelMixin) if cls.__name__ == config["architectures"][0])
    if f'"model_type": "{config["model_type"]}"' in _text(folder / CONFIG):
        opener = AutoModelForSequenceClassification if "vit" not in base.name else opener
    try:
        model = opener.from_pretrained(folder)
    except CLEAR as error:
        kind = f"{type(error).__name__}: {error}"
        if "allocate memory" in kind or not str(error).strip():
            return "lost", kind
        return "refused", kind
    except Exception as error:  # the point: whatever else comes out is no clear refusal
        return "lost", f"{type(error).__name__}: {error}"
    try:
        problem = altered(model, folder)
    except Exception as error:
        return "lost", f"opened, but: {type(error).__name__}: {error}"
    if problem:
        return "lost", problem
    same = _text(folder / CONFIG) == _text(base / CONFIG) and all(
        torch.equal(value, tensors_in(folder).get(name, torch.empty(0))) for name, value in tensors_in(base).items()
    )
    return "equal" if same else "survived", ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


@pytest.mark.faults
@pytest.mark.parametrize("name", BASES)
def test_damaged_models_are_refused_or_whole(name, bases, count):
    cases = [(bases[name], mutation, seed) for mutation in MUTATIONS for seed in range(SEEDS_EACH)]
    outcomes = [outcome or ("lost", what) for outcome, what in in_children(try_case, cases)]
    counts = Counter(kind for kind, _ in outcomes)
    figures = {kind: counts[kind] for kind in ("refused", "survived", "equal", "lost")}
    count("model files", tried=len(cases), **figures)
    lost = [f"{case[1]}, seed {case[2]}: {why}" for case, (kind, why) in zip(cases, outcomes, strict=True) if kind == "lost"]
    assert not lost, "\n".join(lost)
    assert counts["refused"] > len(cases) / 3
    assert counts["survived"]
