"""Makes Transformer encoders smaller and faster by attention head; what it writes is a model anyone can load.

Importing registers the Shrp configs with AutoConfig; the first config that is built registers the models. Each public name is
imported when it is first used: see `__init__.pyi` for where it comes from.
"""

import importlib
from typing import Any

import transformers

from shrp_hf._version import __version__
from shrp_hf.models.configuration_shrp import ShrpConfigFields as _ConfigFields

_HEADS = "ForMaskedLM ForMultipleChoice ForQuestionAnswering ForSequenceClassification ForTokenClassification"
_FAMILIES = {  # class names are Shrp<family>Config, Shrp<family>Model, Shrp<family><head>
    "Bert": _HEADS,
    "DebertaV2": _HEADS,
    "DistilBert": _HEADS,
    "Electra": f"{_HEADS} ForPreTraining",
    "MPNet": _HEADS,
    "ModernBert": _HEADS,
    "NomicBert": "ForMaskedLM ForSequenceClassification ForTokenClassification",
    "Roberta": _HEADS,
    "ViT": "ForImageClassification",
}
_NAMES = {
    "families": "register_family",
    "models.layer_map": "LayerMap Part",
    "plans.budget": "Budget Serving",
    "plans.keep_plan": "KeepPlan",
    "pruning": "masked_heads prune_heads to_shrp to_stock",
    "selectors": "CahpDirectSelector CahpSelector EntropySelector HiesSelector HisSelector MagnitudeSelector "
    "RandomSelector UsageSelector",
    "selectors.dsp": "DspCallback",
    "training.arguments": "ShrpTrainingArguments recovery_arguments",
    "training.trainer": "ShrpTrainer",
}
for _family, _heads in _FAMILIES.items():
    _NAMES[f"models.configuration_shrp_{_family.lower()}"] = f"Shrp{_family}Config"
    _NAMES[f"models.modeling_shrp_{_family.lower()}"] = " ".join(f"Shrp{_family}{head}" for head in ["Model", *_heads.split()])
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_models() -> None:
    for family in _FAMILIES:
        base = __getattr__(f"Shrp{family}Model")
        for auto, path in base.auto_classes.items():
            if auto != "AutoConfig":
                model_class = __getattr__(path.rpartition(".")[2])
                getattr(transformers, auto).register(base.config_class, model_class, exist_ok=True)


for _family in _FAMILIES:
    _config = __getattr__(f"Shrp{_family}Config")
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
_ConfigFields.before_first.append(_register_models)
del _family, _heads, _config
