"""The terms of distillation against values by hand, and in the trainer's loss."""

import copy
import math
import re

import pytest
import torch
import transformers
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForPreTraining,
    TrainingArguments,
)

from shrp_hf.models.modeling_shrp_bert import ShrpBertForQuestionAnswering
from shrp_hf.pruning import to_shrp
from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.distillation import (
    hidden_states_loss,
    logits_loss,
    recorded_values,
    student_logits,
    taught_by,
    value_relations_loss,
)
from shrp_hf.training.trainer import ShrpTrainer
from tests.tiny import NO_DROPOUT, SIZES, batch, randomize_, tiny_bert, tiny_routed


@pytest.fixture(autouse=True)
def _in_double():
    """What is drawn or written here is float64; models have a type of their own."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_loss_by_hand(temperature):
    student, teacher = [0.5, -1.0, 2.0], [1.0, 0.0, -0.5]

    def softmax(logits):
        powers = [math.exp(x / temperature) for x in logits]
        return [power / sum(powers) for power in powers]

    p, q = softmax(student), softmax(teacher)
    expected = temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    one = logits_loss(torch.tensor([student]), torch.tensor([teacher]), temperature)
    assert one.item() == pytest.approx(expected, abs=1e-6)
    two = logits_loss(torch.tensor([[student, teacher]]), torch.tensor([[teacher, teacher]]), temperature)
    assert two.item() == pytest.approx(expected / 2, abs=1e-6)  # the mean over tokens, of which one agrees


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_logits_loss_of_a_regression_is_the_squared_error(num_outputs):
    student, teacher = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    student, teacher = (x.expand(2, num_outputs) for x in (student, teacher))
    assert logits_loss(student, teacher, 2.0, "regression").item() == 2.5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_loss_of_several_labels_by_hand(temperature):
    student, teacher = [0.5, -1.0, 2.0], [1.0, 0.0, -0.5]

    def sigmoid(logit):
        return 1 / (1 + math.exp(-logit / temperature))

    terms = [
        -sigmoid(t) * math.log(sigmoid(s)) - (1 - sigmoid(t)) * math.log(1 - sigmoid(s))
        for s, t in zip(student, teacher, strict=True)
    ]
    logits = (torch.tensor([x], dtype=torch.float64) for x in (student, teacher))
    loss = logits_loss(*logits, temperature, "multi_label_classification")
    assert loss.item() == pytest.approx(temperature**2 * sum(terms) / 3, abs=1e-10)


@pytest.mark.parametrize("kind", ["regression", "single_label_classification", "multi_label_classification"])
def test_logits_that_do_not_count_are_as_if_they_were_not_there(kind):
    student, teacher = torch.randn(2, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    alone = logits_loss(student[mask == 1], teacher[mask == 1], 2.0, kind)
    assert logits_loss(student, teacher, 2.0, kind, mask).item() == pytest.approx(alone.item(), abs=1e-10)
    assert logits_loss(student, teacher, 2.0, kind, torch.zeros(2, 4)).item() == 0


def test_classes_that_may_not_be_chosen_are_as_if_they_were_not_there():
    student, teacher = torch.randn(2, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_(True)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    loss = logits_loss(student, teacher, 0.5, mask=mask)
    alone = logits_loss(student[:, :3], teacher[:, :3], 0.5)
    assert loss.item() == pytest.approx(alone.item(), abs=1e-10)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    assert (gradient[:, 3:] == 0).all()


def test_hidden_states_loss_by_hand():
    student = [torch.full((1, 3, 2), 9.0), torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])]
    teacher = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)]
    assert hidden_states_loss(student, teacher, torch.tensor([[1, 1, 0]])).item() == (1 + 4 + 9 + 16) / 4
    assert hidden_states_loss(student, teacher, None).item() == (1 + 4 + 9 + 16 + 81 + 81) / 6


def test_value_relations_loss_by_hand():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    lengths, total, count = (3, 2), 0.0, 0
    for row, length in enumerate(lengths):
        s, t = student[row, :length], teacher[row, :length]
        p, q = (s @ s.T / 2).softmax(dim=-1), (t @ t.T / 6**0.5).softmax(dim=-1)
        total += (q * (q / p).log()).sum().item()
        count += length
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert value_relations_loss([student], [teacher], mask).item() == pytest.approx(total / count, abs=1e-5)
    assert value_relations_loss([student, teacher], [teacher, teacher], mask).item() == pytest.approx(
        total / count / 2, abs=1e-5
    )
    assert value_relations_loss([teacher], [teacher], None).item() == pytest.approx(0, abs=1e-6)
    message = (
        "The teacher has 1 layers, the student 2: set `distillation_value_relations=0`, or take a teacher with as many or "
        "more."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        value_relations_loss([student] * 2, [teacher], mask)


@pytest.mark.parametrize(
    ("num_layers", "followed"), [(1, [6]), (2, [3, 6]), (3, [2, 4, 6]), (4, [2, 3, 5, 6]), (6, [1, 2, 3, 4, 5, 6])]
)
def test_a_student_with_fewer_layers_follows_evenly_spaced_ones(num_layers, followed):
    embeddings, layers = torch.zeros(1, 2, 3), [torch.full((1, 2, 3), float(i)) for i in range(1, 7)]
    assert [layer[0, 0, 0].item() for layer in taught_by(layers, num_layers)] == followed
    student = [embeddings] * (num_layers + 1)
    expected = sum(i**2 for i in followed) / num_layers
    assert hidden_states_loss(student, [embeddings, *layers], None).item() == pytest.approx(expected)
    values = [torch.randn(1, 2, 3) for _ in range(6)]
    taught = [values[i - 1] for i in followed]
    assert value_relations_loss(taught, values, None).item() == pytest.approx(0, abs=1e-6)


def test_values_are_recorded_while_the_block_lasts():
    model = tiny_routed(2)
    with recorded_values(model) as values:
        model(**batch())
    assert [v.shape[-1] for v in values] == [32, 8, 8]  # all four heads of the ordinary layer, the one expert chosen
    model(**batch())
    assert len(values) == 3


def test_logits_of_every_task_head():
    start, end = torch.ones(1, 3), torch.zeros(1, 3)
    assert student_logits({"logits": start, "hidden_states": None}) == [start]
    assert student_logits({"start_logits": start, "end_logits": end}) == [start, end]


def test_shapes_that_differ_are_refused():
    message = (
        "The teacher's logits have the shape (2, 4), the student's (2, 3): teacher and student must have the same labels."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        logits_loss(torch.zeros(2, 3), torch.zeros(2, 4), 2.0)
    message = (
        "The teacher has 2 layers of width 8, the student 1 of 4: set `distillation_hidden_states=0`, or take a teacher of "
        "the same width, with as many layers or more."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        hidden_states_loss([torch.zeros(1, 2, 4)] * 2, [torch.zeros(1, 2, 8)] * 3, None)
    with pytest.raises(ValueError, match="^The teacher has 1 layers of width 4, the student 2 of 4: "):
        hidden_states_loss([torch.zeros(1, 2, 4)] * 3, [torch.zeros(1, 2, 4)] * 2, None)


def distilling(tmp_path, student, teacher, **options):
    args = ShrpTrainingArguments(tmp_path, use_cpu=True, report_to="none", **options)
    return ShrpTrainer(student.train(), args, teacher=teacher)


WEIGHTS = {
    "distillation_logits": 0.5,
    "distillation_hidden_states": 0.25,
    "distillation_value_relations": 0.75,
    "distillation_temperature": 3.0,
}


@pytest.mark.parametrize(
    "build", [lambda: tiny_routed(2, **NO_DROPOUT), lambda: to_shrp(tiny_bert(**NO_DROPOUT))], ids=["routed", "dense"]
)
def test_training_loss_is_the_sum_of_its_terms(build, tmp_path):
    student, teacher = build(), tiny_bert(num_labels=3, seed=5)
    inputs = batch() | {"labels": torch.arange(5) % 3}
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss = distilling(tmp_path, student, teacher.train(), **WEIGHTS).compute_loss(student, dict(inputs))
    with recorded_values(student) as values:
        output = student(**inputs, output_hidden_states=True)
    with torch.no_grad(), recorded_values(teacher) as taught_values:
        taught = teacher.eval()(**batch(), output_hidden_states=True)
    expected = (
        output.loss
        + 0.5 * logits_loss(output.logits, taught.logits, 3.0)
        + 0.25 * hidden_states_loss(output.hidden_states, taught.hidden_states, inputs["attention_mask"])
        + 0.75 * value_relations_loss(values, taught_values, inputs["attention_mask"])
    )
    torch.testing.assert_close(loss, expected)
    assert (loss - output.loss).abs() > 0.01
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("build", [lambda: tiny_routed(2, **NO_DROPOUT), lambda: tiny_bert(**NO_DROPOUT)])
def test_task_weighs_as_much_as_it_says(build, weight, tmp_path):
    student, teacher = build(), tiny_bert(num_labels=3, seed=5)
    inputs = batch() | {"labels": torch.arange(5) % 3}
    whole = distilling(tmp_path, student, teacher, **WEIGHTS).compute_loss(student, dict(inputs))
    part = distilling(tmp_path, student, teacher, task_weight=weight, **WEIGHTS).compute_loss(student, dict(inputs))
    output = student(**inputs)
    task = output.get("task_loss", output.loss)  # the balance loss keeps its weight
    torch.testing.assert_close(part, whole - (1 - weight) * task)


def test_nothing_to_learn_from_is_refused(tmp_path):
    message = "^`task_weight=0` leaves nothing to learn from: give a `teacher` and weights of its terms.$"
    with pytest.raises(ValueError, match=message):
        distilling(tmp_path, tiny_routed(2), None, task_weight=0)
    with pytest.raises(ValueError, match=message):
        distilling(tmp_path, tiny_routed(2), tiny_bert(), task_weight=0, distillation_logits=0, distillation_hidden_states=0)


def test_terms_are_for_training_only(tmp_path):
    student = tiny_routed(2)
    trainer = distilling(tmp_path, student, tiny_bert(seed=5))
    inputs = batch() | {"labels": torch.arange(5) % 3}
    loss = trainer.compute_loss(student.eval(), dict(inputs))
    torch.testing.assert_close(loss, student(**inputs).loss)


def test_spans_are_distilled_at_both_ends(tmp_path):
    student = tiny_routed(2, head=ShrpBertForQuestionAnswering, **NO_DROPOUT)
    teacher = tiny_bert(BertForQuestionAnswering, seed=5)
    trainer = distilling(tmp_path, student, teacher, distillation_hidden_states=0)
    inputs = batch() | {"start_positions": torch.arange(5), "end_positions": torch.arange(5)}
    loss, output = trainer.compute_loss(student, dict(inputs), return_outputs=True)
    with torch.no_grad():
        taught = teacher(**batch())
    ends = [logits_loss(output[n], taught[n], 2.0, mask=inputs["attention_mask"]) for n in ("start_logits", "end_logits")]
    torch.testing.assert_close(loss, output.loss + sum(ends))


def with_other_padding(inputs):
    """The same sentences with other token ids where nothing is read."""
    return inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 5)}


TASKS = {
    "several labels": (BertForSequenceClassification, "multi_label_classification", (torch.arange(15) % 2).view(5, 3).float()),
    "three numbers": (BertForSequenceClassification, "regression", torch.arange(15.0).view(5, 3)),
    "classes": (BertForSequenceClassification, "single_label_classification", torch.arange(5) % 3),
    "number": (BertForSequenceClassification, "regression", torch.arange(5.0)),
    "choices": (BertForMultipleChoice, "single_label_classification", torch.arange(5) % 2),
}


@pytest.mark.parametrize(
    ("name", "is_stated"),
    # Transformers, too, takes labels of floats for several labels at once where its config does not say.
    [(name, is_stated) for name in TASKS for is_stated in (True, False) if is_stated or name != "three numbers"],
)
def test_kind_of_task_decides_the_logits_term(name, is_stated, tmp_path):
    head, kind, labels = TASKS[name]
    size = {"num_labels": 1} if labels.dtype == torch.float and labels.dim() == 1 else {}
    is_classifier = head is BertForSequenceClassification
    student, teacher = (tiny_bert(head, seed=s, dtype=torch.float64, **size, **NO_DROPOUT) for s in (7, 5))
    if is_stated and is_classifier:
        student.config.problem_type = kind
    inputs = batch()
    if not is_classifier:
        inputs = {name: torch.stack([value, value.flip(0)], dim=1) for name, value in inputs.items()}
    labels = labels.double() if labels.is_floating_point() else labels
    trainer = distilling(tmp_path, student, teacher, distillation_hidden_states=0.0)
    loss = trainer.compute_loss(student, inputs | {"labels": labels})
    output = student(**inputs, labels=labels)
    expected = output.loss + logits_loss(output.logits, teacher(**inputs).logits, 2.0, kind)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForMaskedLM", "ElectraForPreTraining"])
def test_padding_and_ignored_tokens_are_left_out_of_distillation(name, tmp_path):
    if name == "ElectraForPreTraining":
        config = ElectraConfig(**SIZES, embedding_size=16)
        student, teacher = (ElectraForPreTraining._from_config(config).double() for _ in range(2))
        for model, seed in ((student, 7), (teacher, 5)):
            randomize_(model, seed=seed)
    else:
        head = getattr(transformers, name)
        student, teacher = (tiny_bert(head, seed=seed, dtype=torch.float64, **NO_DROPOUT) for seed in (7, 5))
    student.config.update(dict.fromkeys(NO_DROPOUT, 0.0))
    inputs = batch()
    labels = torch.arange(45).view(5, 9) % (2 if name.startswith("Electra") else 3)
    if not name.startswith("Electra"):  # whose own loss does not know of -100
        labels[inputs["attention_mask"] == 0] = -100
        labels[:, 0] = -100  # a special token
        labels[3, 3:5] = -100
    trainer = distilling(tmp_path, student, teacher, distillation_hidden_states=0.5, distillation_value_relations=0.5)
    student.eval()  # dropout off; `compute_loss` adds its terms in training only
    student.training = True
    given, other = inputs | {"labels": labels}, with_other_padding(inputs) | {"labels": labels}
    loss = trainer.compute_loss(student, dict(given))
    torch.testing.assert_close(loss, trainer.compute_loss(student, other), rtol=0, atol=1e-10)
    counts = (labels != -100) & (inputs["attention_mask"] == 1)
    with torch.no_grad():
        (s, t) = (model(**inputs)["logits"] for model in (student, teacher))
    kind = "single_label_classification"
    if name.startswith("Electra"):
        s, t, kind = s.unsqueeze(-1), t.unsqueeze(-1), "multi_label_classification"
    weights = {"distillation_hidden_states": 0.0, "distillation_value_relations": 0.0}
    alone = distilling(tmp_path, student, teacher, **weights)
    student.eval()
    student.training = True
    term = alone.compute_loss(student, dict(given)) - student(**given).loss
    torch.testing.assert_close(term, logits_loss(s[counts], t[counts], 2.0, kind), rtol=0, atol=1e-10)


def test_relations_of_choices_are_those_of_their_sequences(tmp_path):
    student, teacher = (tiny_bert(BertForMultipleChoice, seed=seed, **NO_DROPOUT) for seed in (7, 5))
    inputs = {name: torch.stack([value, value.flip(0)], dim=1) for name, value in batch().items()}
    trainer = distilling(tmp_path, student, teacher, distillation_value_relations=1.0)
    loss = trainer.compute_loss(student, inputs | {"labels": torch.zeros(5, dtype=torch.long)})
    assert loss.isfinite()


@pytest.mark.parametrize("build", [tiny_bert, tiny_routed, lambda: to_shrp(tiny_bert())], ids=["stock", "routed", "shrp"])
@pytest.mark.parametrize("shares", [lambda m: m, copy.copy], ids=["the model itself", "its weights"])
def test_teacher_that_is_the_model_is_copied(build, shares, tmp_path):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = distilling(tmp_path, model, shares(model), num_expert_layers=2)
    ours, taught = trainer.model.state_dict(), trainer.teacher.state_dict()
    assert not {v.data_ptr() for v in ours.values()} & {v.data_ptr() for v in taught.values()}
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert before.keys() == taught.keys()
    assert all(torch.equal(before[name], taught[name]) for name in before)


def test_teacher_that_shares_weights_with_what_model_init_makes_is_copied(tmp_path):
    model = tiny_bert()
    args = ShrpTrainingArguments(tmp_path, use_cpu=True, report_to="none")
    trainer = ShrpTrainer(model_init=lambda: model, args=args, teacher=model)
    assert trainer.teacher is not model
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_teacher_of_its_own_is_not_copied(tmp_path):
    teacher = tiny_bert(seed=5)
    assert distilling(tmp_path, tiny_routed(2), teacher).teacher is teacher


def test_teacher_with_other_labels_or_another_problem_is_refused(tmp_path):
    student, teacher = tiny_bert(), tiny_bert(seed=5)
    student.config.id2label, teacher.config.id2label = ({i: n for i, n in enumerate(names)} for names in ("abc", "cba"))
    with pytest.raises(ValueError, match=r"^`teacher` has the labels \{0: 'c'.* the same in another order: load the model"):
        distilling(tmp_path, student, teacher)
    teacher.config.id2label = student.config.id2label
    student.config.problem_type, teacher.config.problem_type = "regression", "multi_label_classification"
    message = "^`teacher` has the `problem_type` 'multi_label_classification', the model 'regression': they must be the same.$"
    with pytest.raises(ValueError, match=message):
        distilling(tmp_path, student, teacher)


def test_teacher_of_another_head_is_refused(tmp_path):
    student, inputs = tiny_routed(2), batch() | {"labels": torch.arange(5) % 3}
    trainer = distilling(tmp_path, student, tiny_bert(BertForQuestionAnswering, seed=5))
    with pytest.raises(ValueError, match=r"^The teacher gives \['start_logits', .* they must have the same task head\.$"):
        trainer.compute_loss(student, inputs)


def test_teacher_of_another_task_is_refused(tmp_path):
    student, inputs = tiny_routed(2), batch() | {"labels": torch.arange(5) % 3}
    trainer = distilling(tmp_path, student, tiny_bert(num_labels=4, seed=5))
    with pytest.raises(ValueError, match=r"^The teacher's logits have the shape \(5, 4\), the student's \(5, 3\): "):
        trainer.compute_loss(student, inputs)


def test_smaller_teacher_teaches_by_logits_alone(tmp_path):
    student, inputs = tiny_routed(2), batch() | {"labels": torch.arange(5) % 3}
    teacher = tiny_bert(seed=5, num_hidden_layers=1, hidden_size=SIZES["hidden_size"] // 2)
    with pytest.raises(ValueError, match="The teacher has 1 layers of width 16, the student 3 of 32"):
        distilling(tmp_path, student, teacher).compute_loss(student, dict(inputs))
    trainer = distilling(tmp_path, student, teacher, distillation_hidden_states=0)
    assert trainer.compute_loss(student, dict(inputs)).isfinite()


def test_defaults_hold_under_plain_arguments(tmp_path):
    student, teacher, inputs = tiny_routed(2, **NO_DROPOUT), tiny_bert(seed=5), batch() | {"labels": torch.arange(5) % 3}
    plain = ShrpTrainer(student.train(), TrainingArguments(tmp_path, use_cpu=True, report_to="none"), teacher=teacher)
    ours = distilling(tmp_path, student, teacher)
    torch.testing.assert_close(plain.compute_loss(student, dict(inputs)), ours.compute_loss(student, dict(inputs)))
