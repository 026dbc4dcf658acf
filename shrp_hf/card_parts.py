"""What the cards of trainings and of commands share: how a model opens, and the license that it inherits."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel

from shrp_hf.files import written_whole

PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
"""Auto class -> the Hub's name of what it does; multiple choice is "multiple-choice"."""
_WITHOUT_PIPELINE = {"AutoModelForMultipleChoice", "AutoModelForQuestionAnswering", "AutoModelForPreTraining"}


def auto_class_of(model: PreTrainedModel) -> str:
    """Returns the name of the Auto class that opens a Shrp model."""
    names = (name for name, path in model.auto_classes.items() if path.endswith(f".{type(model).__name__}"))
    return next(names, "AutoModel")


def loading_section(auto_class: str, *, has_code: bool, embeds: bool = False, name: str = "PATH_OR_REPO") -> str:
    """Writes how a model is opened, as a section of a card.

    Args:
        auto_class: Name of the Auto class that opens it.
        has_code: Whether its code lies beside the weights.
        embeds: Whether sentence-transformers opens it.
        name: Where it is.
    """

    def snippet(ours: bool) -> str:
        imports, trust = ("import shrp_hf  # registers its classes\n", "") if ours else ("", ", trust_remote_code=True")
        if embeds:
            imports += "from sentence_transformers import SentenceTransformer\n"
            call = f'SentenceTransformer("{name}"{trust})'
        elif auto_class not in _WITHOUT_PIPELINE:
            imports += "from transformers import pipeline\n"
            call = f'pipeline("{PIPELINES[auto_class]}", model="{name}"{trust})'
        else:
            imports += f"from transformers import {auto_class}\n"
            call = f'{auto_class}.from_pretrained("{name}"{trust})'
        return f"```python\n{imports}\nmodel = {call}\n```"

    text = f"## Load it\n\nWith `shrp_hf` installed:\n\n{snippet(True)}"
    if has_code:
        text += f"\n\nWithout it, by the code that lies beside the weights:\n\n{snippet(False)}"
    return text


def insert_loading_section(path: Path, model: PreTrainedModel, name: str) -> None:
    """Puts `loading_section` into a card that Trainer has written.

    Args:
        path: The card.
        model: The Shrp model that lies beside it, with its code.
        name: Where it is.
    """
    section = loading_section(auto_class_of(model), has_code=True, name=name)
    head, mark, rest = path.read_text(encoding="utf-8").partition("\n## Model description")
    with written_whole(path) as partial:
        partial.write_text(f"{head}\n{section}\n{mark}{rest}", encoding="utf-8")


def license_of(model_name: str) -> str | None:
    """Returns the license in the card of a model, which what is made from it inherits; None where there is none to read.

    Args:
        model_name: Hub id or directory.
    """
    path = Path(model_name) / "README.md"
    if not model_name or (Path(model_name).is_dir() and not path.is_file()):
        return None
    try:
        found = ModelCard.load(path if path.is_file() else model_name).data.get("license")
    except (OSError, ValueError, HfHubHTTPError, yaml.YAMLError):  # no network, no such repository, no card, a damaged one
        return None
    return found if isinstance(found, str) else None
