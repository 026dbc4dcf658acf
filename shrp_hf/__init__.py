"""Makes Transformer encoders smaller and faster by attention head; what it writes is a model anyone can load.

Importing registers the Shrp classes with Transformers' Auto classes, and tells PEFT where LoRA goes; it does nothing else.
"""

import transformers
from peft.utils import constants as _peft

from shrp_hf._version import __version__
from shrp_hf.families import register_family
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.configuration_shrp_debertav2 import ShrpDebertaV2Config
from shrp_hf.models.configuration_shrp_distilbert import ShrpDistilBertConfig
from shrp_hf.models.configuration_shrp_electra import ShrpElectraConfig
from shrp_hf.models.configuration_shrp_modernbert import ShrpModernBertConfig
from shrp_hf.models.configuration_shrp_mpnet import ShrpMPNetConfig
from shrp_hf.models.configuration_shrp_nomicbert import ShrpNomicBertConfig
from shrp_hf.models.configuration_shrp_roberta import ShrpRobertaConfig
from shrp_hf.models.configuration_shrp_vit import ShrpViTConfig
from shrp_hf.models.layer_map import LayerMap, Part
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertForMaskedLM,
    ShrpBertForMultipleChoice,
    ShrpBertForQuestionAnswering,
    ShrpBertForSequenceClassification,
    ShrpBertForTokenClassification,
    ShrpBertModel,
)
from shrp_hf.models.modeling_shrp_debertav2 import (
    ShrpDebertaV2ForMaskedLM,
    ShrpDebertaV2ForMultipleChoice,
    ShrpDebertaV2ForQuestionAnswering,
    ShrpDebertaV2ForSequenceClassification,
    ShrpDebertaV2ForTokenClassification,
    ShrpDebertaV2Model,
)
from shrp_hf.models.modeling_shrp_distilbert import (
    ShrpDistilBertForMaskedLM,
    ShrpDistilBertForMultipleChoice,
    ShrpDistilBertForQuestionAnswering,
    ShrpDistilBertForSequenceClassification,
    ShrpDistilBertForTokenClassification,
    ShrpDistilBertModel,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraForMaskedLM,
    ShrpElectraForMultipleChoice,
    ShrpElectraForPreTraining,
    ShrpElectraForQuestionAnswering,
    ShrpElectraForSequenceClassification,
    ShrpElectraForTokenClassification,
    ShrpElectraModel,
)
from shrp_hf.models.modeling_shrp_modernbert import (
    ShrpModernBertForMaskedLM,
    ShrpModernBertForMultipleChoice,
    ShrpModernBertForQuestionAnswering,
    ShrpModernBertForSequenceClassification,
    ShrpModernBertForTokenClassification,
    ShrpModernBertModel,
)
from shrp_hf.models.modeling_shrp_mpnet import (
    ShrpMPNetForMaskedLM,
    ShrpMPNetForMultipleChoice,
    ShrpMPNetForQuestionAnswering,
    ShrpMPNetForSequenceClassification,
    ShrpMPNetForTokenClassification,
    ShrpMPNetModel,
)
from shrp_hf.models.modeling_shrp_nomicbert import (
    ShrpNomicBertForMaskedLM,
    ShrpNomicBertForSequenceClassification,
    ShrpNomicBertForTokenClassification,
    ShrpNomicBertModel,
)
from shrp_hf.models.modeling_shrp_roberta import (
    ShrpRobertaForMaskedLM,
    ShrpRobertaForMultipleChoice,
    ShrpRobertaForQuestionAnswering,
    ShrpRobertaForSequenceClassification,
    ShrpRobertaForTokenClassification,
    ShrpRobertaModel,
)
from shrp_hf.models.modeling_shrp_vit import ShrpViTForImageClassification, ShrpViTModel
from shrp_hf.plans.budget import Budget, Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import masked_heads, prune_heads, to_shrp, to_stock
from shrp_hf.selectors import (
    CahpDirectSelector,
    CahpSelector,
    EntropySelector,
    HiesSelector,
    HisSelector,
    MagnitudeSelector,
    NeuronImportanceSelector,
    NeuronMagnitudeSelector,
    NeuronRandomSelector,
    RandomSelector,
    UsageSelector,
)
from shrp_hf.selectors.dsp import DspCallback
from shrp_hf.training.arguments import ShrpTrainingArguments, recovery_arguments
from shrp_hf.training.trainer import ShrpTrainer

for _base in (
    ShrpBertModel,
    ShrpDebertaV2Model,
    ShrpDistilBertModel,
    ShrpElectraModel,
    ShrpMPNetModel,
    ShrpModernBertModel,
    ShrpNomicBertModel,
    ShrpRobertaModel,
    ShrpViTModel,
):
    _config = _base.config_class
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _path in _base.auto_classes.items():
        if _auto != "AutoConfig":
            getattr(transformers, _auto).register(_config, globals()[_path.rpartition(".")[2]], exist_ok=True)
    _lora = list(dict.fromkeys(_config.layer_map.heads_in[i].path.rpartition(".")[2] for i in (0, 2)))
    _peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(_config.model_type, _lora)
del _base, _config, _auto, _path, _lora

__all__ = [
    "Budget",
    "CahpDirectSelector",
    "CahpSelector",
    "DspCallback",
    "EntropySelector",
    "HiesSelector",
    "HisSelector",
    "KeepPlan",
    "LayerMap",
    "MagnitudeSelector",
    "NeuronImportanceSelector",
    "NeuronMagnitudeSelector",
    "NeuronRandomSelector",
    "Part",
    "RandomSelector",
    "Serving",
    "ShrpBertConfig",
    "ShrpBertForMaskedLM",
    "ShrpBertForMultipleChoice",
    "ShrpBertForQuestionAnswering",
    "ShrpBertForSequenceClassification",
    "ShrpBertForTokenClassification",
    "ShrpBertModel",
    "ShrpDebertaV2Config",
    "ShrpDebertaV2ForMaskedLM",
    "ShrpDebertaV2ForMultipleChoice",
    "ShrpDebertaV2ForQuestionAnswering",
    "ShrpDebertaV2ForSequenceClassification",
    "ShrpDebertaV2ForTokenClassification",
    "ShrpDebertaV2Model",
    "ShrpDistilBertConfig",
    "ShrpDistilBertForMaskedLM",
    "ShrpDistilBertForMultipleChoice",
    "ShrpDistilBertForQuestionAnswering",
    "ShrpDistilBertForSequenceClassification",
    "ShrpDistilBertForTokenClassification",
    "ShrpDistilBertModel",
    "ShrpElectraConfig",
    "ShrpElectraForMaskedLM",
    "ShrpElectraForMultipleChoice",
    "ShrpElectraForPreTraining",
    "ShrpElectraForQuestionAnswering",
    "ShrpElectraForSequenceClassification",
    "ShrpElectraForTokenClassification",
    "ShrpElectraModel",
    "ShrpMPNetConfig",
    "ShrpMPNetForMaskedLM",
    "ShrpMPNetForMultipleChoice",
    "ShrpMPNetForQuestionAnswering",
    "ShrpMPNetForSequenceClassification",
    "ShrpMPNetForTokenClassification",
    "ShrpMPNetModel",
    "ShrpModernBertConfig",
    "ShrpModernBertForMaskedLM",
    "ShrpModernBertForMultipleChoice",
    "ShrpModernBertForQuestionAnswering",
    "ShrpModernBertForSequenceClassification",
    "ShrpModernBertForTokenClassification",
    "ShrpModernBertModel",
    "ShrpNomicBertConfig",
    "ShrpNomicBertForMaskedLM",
    "ShrpNomicBertForSequenceClassification",
    "ShrpNomicBertForTokenClassification",
    "ShrpNomicBertModel",
    "ShrpRobertaConfig",
    "ShrpRobertaForMaskedLM",
    "ShrpRobertaForMultipleChoice",
    "ShrpRobertaForQuestionAnswering",
    "ShrpRobertaForSequenceClassification",
    "ShrpRobertaForTokenClassification",
    "ShrpRobertaModel",
    "ShrpTrainer",
    "ShrpTrainingArguments",
    "ShrpViTConfig",
    "ShrpViTForImageClassification",
    "ShrpViTModel",
    "UsageSelector",
    "__version__",
    "masked_heads",
    "prune_heads",
    "recovery_arguments",
    "register_family",
    "to_shrp",
    "to_stock",
]
