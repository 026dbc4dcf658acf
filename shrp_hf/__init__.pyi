"""The public names, for type checkers: `__init__.py` imports each when it is first used."""

from shrp_hf._version import __version__ as __version__
from shrp_hf.families import register_family as register_family
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig as ShrpBertConfig
from shrp_hf.models.configuration_shrp_debertav2 import ShrpDebertaV2Config as ShrpDebertaV2Config
from shrp_hf.models.configuration_shrp_distilbert import ShrpDistilBertConfig as ShrpDistilBertConfig
from shrp_hf.models.configuration_shrp_electra import ShrpElectraConfig as ShrpElectraConfig
from shrp_hf.models.configuration_shrp_modernbert import ShrpModernBertConfig as ShrpModernBertConfig
from shrp_hf.models.configuration_shrp_mpnet import ShrpMPNetConfig as ShrpMPNetConfig
from shrp_hf.models.configuration_shrp_nomicbert import ShrpNomicBertConfig as ShrpNomicBertConfig
from shrp_hf.models.configuration_shrp_roberta import ShrpRobertaConfig as ShrpRobertaConfig
from shrp_hf.models.configuration_shrp_vit import ShrpViTConfig as ShrpViTConfig
from shrp_hf.models.layer_map import (
    LayerMap as LayerMap,
)
from shrp_hf.models.layer_map import (
    Part as Part,
)
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertForMaskedLM as ShrpBertForMaskedLM,
)
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertForMultipleChoice as ShrpBertForMultipleChoice,
)
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertForQuestionAnswering as ShrpBertForQuestionAnswering,
)
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertForSequenceClassification as ShrpBertForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertForTokenClassification as ShrpBertForTokenClassification,
)
from shrp_hf.models.modeling_shrp_bert import (
    ShrpBertModel as ShrpBertModel,
)
from shrp_hf.models.modeling_shrp_debertav2 import (
    ShrpDebertaV2ForMaskedLM as ShrpDebertaV2ForMaskedLM,
)
from shrp_hf.models.modeling_shrp_debertav2 import (
    ShrpDebertaV2ForMultipleChoice as ShrpDebertaV2ForMultipleChoice,
)
from shrp_hf.models.modeling_shrp_debertav2 import (
    ShrpDebertaV2ForQuestionAnswering as ShrpDebertaV2ForQuestionAnswering,
)
from shrp_hf.models.modeling_shrp_debertav2 import (
    ShrpDebertaV2ForSequenceClassification as ShrpDebertaV2ForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_debertav2 import (
    ShrpDebertaV2ForTokenClassification as ShrpDebertaV2ForTokenClassification,
)
from shrp_hf.models.modeling_shrp_debertav2 import (
    ShrpDebertaV2Model as ShrpDebertaV2Model,
)
from shrp_hf.models.modeling_shrp_distilbert import (
    ShrpDistilBertForMaskedLM as ShrpDistilBertForMaskedLM,
)
from shrp_hf.models.modeling_shrp_distilbert import (
    ShrpDistilBertForMultipleChoice as ShrpDistilBertForMultipleChoice,
)
from shrp_hf.models.modeling_shrp_distilbert import (
    ShrpDistilBertForQuestionAnswering as ShrpDistilBertForQuestionAnswering,
)
from shrp_hf.models.modeling_shrp_distilbert import (
    ShrpDistilBertForSequenceClassification as ShrpDistilBertForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_distilbert import (
    ShrpDistilBertForTokenClassification as ShrpDistilBertForTokenClassification,
)
from shrp_hf.models.modeling_shrp_distilbert import (
    ShrpDistilBertModel as ShrpDistilBertModel,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraForMaskedLM as ShrpElectraForMaskedLM,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraForMultipleChoice as ShrpElectraForMultipleChoice,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraForPreTraining as ShrpElectraForPreTraining,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraForQuestionAnswering as ShrpElectraForQuestionAnswering,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraForSequenceClassification as ShrpElectraForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraForTokenClassification as ShrpElectraForTokenClassification,
)
from shrp_hf.models.modeling_shrp_electra import (
    ShrpElectraModel as ShrpElectraModel,
)
from shrp_hf.models.modeling_shrp_modernbert import (
    ShrpModernBertForMaskedLM as ShrpModernBertForMaskedLM,
)
from shrp_hf.models.modeling_shrp_modernbert import (
    ShrpModernBertForMultipleChoice as ShrpModernBertForMultipleChoice,
)
from shrp_hf.models.modeling_shrp_modernbert import (
    ShrpModernBertForQuestionAnswering as ShrpModernBertForQuestionAnswering,
)
from shrp_hf.models.modeling_shrp_modernbert import (
    ShrpModernBertForSequenceClassification as ShrpModernBertForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_modernbert import (
    ShrpModernBertForTokenClassification as ShrpModernBertForTokenClassification,
)
from shrp_hf.models.modeling_shrp_modernbert import (
    ShrpModernBertModel as ShrpModernBertModel,
)
from shrp_hf.models.modeling_shrp_mpnet import (
    ShrpMPNetForMaskedLM as ShrpMPNetForMaskedLM,
)
from shrp_hf.models.modeling_shrp_mpnet import (
    ShrpMPNetForMultipleChoice as ShrpMPNetForMultipleChoice,
)
from shrp_hf.models.modeling_shrp_mpnet import (
    ShrpMPNetForQuestionAnswering as ShrpMPNetForQuestionAnswering,
)
from shrp_hf.models.modeling_shrp_mpnet import (
    ShrpMPNetForSequenceClassification as ShrpMPNetForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_mpnet import (
    ShrpMPNetForTokenClassification as ShrpMPNetForTokenClassification,
)
from shrp_hf.models.modeling_shrp_mpnet import (
    ShrpMPNetModel as ShrpMPNetModel,
)
from shrp_hf.models.modeling_shrp_nomicbert import (
    ShrpNomicBertForMaskedLM as ShrpNomicBertForMaskedLM,
)
from shrp_hf.models.modeling_shrp_nomicbert import (
    ShrpNomicBertForSequenceClassification as ShrpNomicBertForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_nomicbert import (
    ShrpNomicBertForTokenClassification as ShrpNomicBertForTokenClassification,
)
from shrp_hf.models.modeling_shrp_nomicbert import (
    ShrpNomicBertModel as ShrpNomicBertModel,
)
from shrp_hf.models.modeling_shrp_roberta import (
    ShrpRobertaForMaskedLM as ShrpRobertaForMaskedLM,
)
from shrp_hf.models.modeling_shrp_roberta import (
    ShrpRobertaForMultipleChoice as ShrpRobertaForMultipleChoice,
)
from shrp_hf.models.modeling_shrp_roberta import (
    ShrpRobertaForQuestionAnswering as ShrpRobertaForQuestionAnswering,
)
from shrp_hf.models.modeling_shrp_roberta import (
    ShrpRobertaForSequenceClassification as ShrpRobertaForSequenceClassification,
)
from shrp_hf.models.modeling_shrp_roberta import (
    ShrpRobertaForTokenClassification as ShrpRobertaForTokenClassification,
)
from shrp_hf.models.modeling_shrp_roberta import (
    ShrpRobertaModel as ShrpRobertaModel,
)
from shrp_hf.models.modeling_shrp_vit import (
    ShrpViTForImageClassification as ShrpViTForImageClassification,
)
from shrp_hf.models.modeling_shrp_vit import (
    ShrpViTModel as ShrpViTModel,
)
from shrp_hf.plans.budget import (
    Budget as Budget,
)
from shrp_hf.plans.budget import (
    Serving as Serving,
)
from shrp_hf.plans.keep_plan import KeepPlan as KeepPlan
from shrp_hf.pruning import (
    masked_heads as masked_heads,
)
from shrp_hf.pruning import (
    prune_heads as prune_heads,
)
from shrp_hf.pruning import (
    to_shrp as to_shrp,
)
from shrp_hf.pruning import (
    to_stock as to_stock,
)
from shrp_hf.selectors import (
    CahpDirectSelector as CahpDirectSelector,
)
from shrp_hf.selectors import (
    CahpSelector as CahpSelector,
)
from shrp_hf.selectors import (
    EntropySelector as EntropySelector,
)
from shrp_hf.selectors import (
    HiesSelector as HiesSelector,
)
from shrp_hf.selectors import (
    HisSelector as HisSelector,
)
from shrp_hf.selectors import (
    MagnitudeSelector as MagnitudeSelector,
)
from shrp_hf.selectors import (
    RandomSelector as RandomSelector,
)
from shrp_hf.selectors import (
    UsageSelector as UsageSelector,
)
from shrp_hf.selectors.dsp import DspCallback as DspCallback
from shrp_hf.training.arguments import (
    ShrpTrainingArguments as ShrpTrainingArguments,
)
from shrp_hf.training.arguments import (
    recovery_arguments as recovery_arguments,
)
from shrp_hf.training.trainer import ShrpTrainer as ShrpTrainer
