"""Makes Transformer encoders smaller and faster by attention head; what it writes is a model anyone can load.

Importing registers the Shrp classes with Transformers' Auto classes, and does nothing else.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from shrp_hf._version import __version__
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertForMaskedLM,
    ShrpBertForMultipleChoice,
    ShrpBertForQuestionAnswering,
    ShrpBertForSequenceClassification,
    ShrpBertForTokenClassification,
    ShrpBertModel,
)
from shrp_hf.plan import KeepPlan

AutoConfig.register("shrp_bert", ShrpBertConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, ShrpBertModel),
    (AutoModelForMaskedLM, ShrpBertForMaskedLM),
    (AutoModelForMultipleChoice, ShrpBertForMultipleChoice),
    (AutoModelForQuestionAnswering, ShrpBertForQuestionAnswering),
    (AutoModelForSequenceClassification, ShrpBertForSequenceClassification),
    (AutoModelForTokenClassification, ShrpBertForTokenClassification),
):
    _auto.register(ShrpBertConfig, _model, exist_ok=True)
del _auto, _model

__all__ = [
    "KeepPlan",
    "ShrpBertConfig",
    "ShrpBertForMaskedLM",
    "ShrpBertForMultipleChoice",
    "ShrpBertForQuestionAnswering",
    "ShrpBertForSequenceClassification",
    "ShrpBertForTokenClassification",
    "ShrpBertModel",
    "__version__",
]
