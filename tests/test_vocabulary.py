"""A trimmed vocabulary reads its corpus as before, by the same embeddings, whatever kind of tokenizer it is of."""

import copy
import json
import re

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)
from typer.testing import CliRunner

from shrp_hf import cli
from shrp_hf.export.sentences import SENTENCES
from shrp_hf.workflows.vocabulary import TrimOptions, copy_sentence_modules, trim, trim_vocabulary
from shrp_hf.workflows.vocabulary.tokens import Vocabulary
from tests.tiny import randomize_, same_state, tiny_bert

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TRAINING = [*SENTENCES, *(f"{text} {text.upper()} 12{i} ünïcödé" for i, text in enumerate(SENTENCES))]
CORPUS = [*SENTENCES[:6], "xyzzy ☃ a quiet film", "Zürich, the village"]
NOTHING_MORE = TrimOptions(floor=0, alphabet=False)


def wordpiece():
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)


def bytes_bpe():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)


def suffix_bpe():
    made = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False)


def prefix_bpe():
    made = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, continuing_subword_prefix="##", show_progress=False
    )


def unigram():
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)


KINDS = {"wordpiece": wordpiece, "bytes": bytes_bpe, "suffix": suffix_bpe, "prefix": prefix_bpe, "unigram": unigram}


def trained(kind):
    made, trainer = KINDS[kind]()
    made.train_from_iterator(TRAINING, trainer)
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names)


def encoder(tokenizer, head=BertModel, **fields):
    return tiny_bert(head, vocab_size=len(tokenizer), max_position_embeddings=64, num_hidden_layers=1, **fields)


@pytest.mark.parametrize(
    "options", [NOTHING_MORE, TrimOptions(floor=0), TrimOptions(floor=250)], ids=["bare", "alphabet", "floor"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_is_read_as_before_and_outputs_are_equal(kind, options, tmp_path):
    tokenizer = trained(kind)
    model = encoder(tokenizer)
    before = copy.deepcopy(model)
    result = trim_vocabulary(model, tokenizer, CORPUS, tmp_path, options)
    assert same_state(model, before)
    read, small = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).double()
    assert options.floor <= result.tokens[1] == len(read) == small.config.vocab_size < len(tokenizer)
    for text in CORPUS:
        assert read.tokenize(text) == tokenizer.tokenize(text)
        with torch.no_grad():
            ours = small(**read(text, return_tensors="pt")).last_hidden_state
            theirs = copy.deepcopy(before).double()(**tokenizer(text, return_tensors="pt")).last_hidden_state
        assert torch.equal(ours, theirs)
    assert [read.convert_ids_to_tokens(read.all_special_ids)] == [read.all_special_tokens]
    if options.alphabet:  # a word of nothing but known letters is still spelled
        assert tokenizer.unk_token not in tokenizer.tokenize("mopes") + read.tokenize("mopes")
    record = json.loads((tmp_path / "vocabulary.json").read_text(encoding="utf-8"))
    assert record["tokens"] == [len(tokenizer), len(read)]
    assert result.largest_difference <= trim.SAME


def test_a_word_that_wordpiece_gave_up_on_is_still_unknown():
    """Without `un`, `u` and `##nx` would make a word of what was none."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "un", "u", "##nx", "a"])}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=20))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made))
    corpus = ["unx a", "u", "unx"]
    assert made.encode("unx").tokens == ["[UNK]"]
    kept, content = trim._keep(vocabulary, [*corpus, "u ##nx"], {0, 1, 7}, NOTHING_MORE)
    assert 5 in kept
    trim._check_reading(vocabulary, content, kept, corpus)


def test_the_unknown_of_unigram_costs_what_it_did():
    """Its score is that of the least likely piece less ten, so that piece stays."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -40.0), ("c", -3.0)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    kept, content = trim._keep(vocabulary, ["a b"], set(), NOTHING_MORE)
    assert [piece for piece, _ in content["model"]["vocab"]] == ["<unk>", "a", "b", "ab"]
    assert content["model"]["unk_id"] == 0
    trim._check_reading(vocabulary, content, kept, ["a b", "aé"])


def test_what_bpe_merges_on_the_way_stays():
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd", "bc"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c")]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges))
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made))
    kept, content = trim._keep(vocabulary, ["abcd"], set(), NOTHING_MORE)
    assert [vocabulary.tokens[i] for i in kept] == ["a", "b", "c", "d", "ab", "cd", "abcd"]
    assert content["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]
    trim._check_reading(vocabulary, content, kept, ["abcd"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_loses_the_same_rows(tied, tmp_path):
    tokenizer = trained("wordpiece")
    model = encoder(tokenizer, BertForMaskedLM, tie_word_embeddings=tied)
    result = trim_vocabulary(model, tokenizer, CORPUS, tmp_path, NOTHING_MORE)
    small, read = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied
    assert small.get_output_embeddings().out_features == small.get_output_embeddings().bias.shape[0] == result.tokens[1]
    kept = [tokenizer.convert_tokens_to_ids(token) for token in read.convert_ids_to_tokens(range(len(read)))]
    text = CORPUS[3]
    with torch.no_grad():
        ours = small.double()(**read(text, return_tensors="pt")).logits
        theirs = model.double()(**tokenizer(text, return_tensors="pt")).logits[..., kept]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_positions_are_still_counted_from_the_padding_token(tmp_path):
    """RoBERTa's begin behind it, so what comes before it stays."""
    tokenizer = trained("bytes")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    order = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    new = {token: i for i, token in enumerate([*order, "[MASK]"])}
    for token in content["added_tokens"]:
        content["model"]["vocab"][token["content"]] = token["id"] = new[token["content"]]
    for part in content["post_processor"]["special_tokens"].values():
        part["ids"] = [new[part["id"]]]
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=32, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=3, **sizes)
    model = RobertaForMaskedLM(config).eval()
    randomize_(model)
    assert trim_vocabulary(model, tokenizer, CORPUS, tmp_path, NOTHING_MORE).largest_difference <= trim.SAME
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.pad_token_id == 3


def test_rows_that_no_token_reads_go(tmp_path):
    tokenizer = trained("wordpiece")
    model = tiny_bert(BertModel, vocab_size=len(tokenizer) + 50, max_position_embeddings=64, num_hidden_layers=1)
    result = trim_vocabulary(model, tokenizer, CORPUS, tmp_path, TrimOptions(floor=10_000))
    assert result.tokens == (len(tokenizer), len(tokenizer))
    assert AutoModel.from_pretrained(tmp_path).config.vocab_size == len(tokenizer)


def test_held_out_texts_are_reported_on(tmp_path):
    tokenizer = trained("wordpiece")
    model = encoder(tokenizer)
    result = trim_vocabulary(model, tokenizer, CORPUS[:2], tmp_path, NOTHING_MORE, held_out=["☃ film", CORPUS[0]])
    assert (result.held_out, result.held_out_texts, result.same) == ("texts that were given", 2, 0.5)
    tokens = [token for text in ("☃ film", CORPUS[0]) for token in tokenizer.tokenize(text, add_special_tokens=True)]
    assert result.unknown[0] == tokens.count("[UNK]") / len(tokens) > 0  # the snowman
    assert result.unknown[1] > result.unknown[0]
    own = trim_vocabulary(model, tokenizer, CORPUS, tmp_path, NOTHING_MORE)
    assert own.held_out_texts == 1


def test_what_sentence_transformers_saved_is_copied(tmp_path):
    source, output = tmp_path / "model", tmp_path / "out"
    (source / "1_Pooling").mkdir(parents=True)
    output.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}", encoding="utf-8")
    (source / "sentence_bert_config.json").write_text("{}", encoding="utf-8")
    copy_sentence_modules(source, output)
    assert not list(output.iterdir())
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Normalize", "../elsewhere")]
    (source / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    copy_sentence_modules(source, output)
    found = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert found == ["1_Pooling/config.json", "modules.json", "sentence_bert_config.json"]
    assert len(list(tmp_path.iterdir())) == 3


# --- refusals ---


class Slow:
    pass


def test_tokenizers_that_cannot_be_trimmed_are_refused_by_name():
    with pytest.raises(ValueError, match="^`Slow` cannot be trimmed: it is no fast tokenizer"):
        Vocabulary(Slow())
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(
        ValueError, match=r"^A tokenizer of WordPiece, Unigram, BPE can be trimmed, and this one is WordLevel\.$"
    ):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=words))
    chance = tokenizers.Tokenizer(models.BPE({"a": 0}, [], dropout=0.5))
    with pytest.raises(ValueError, match=r"^The tokenizer splits at random \(`dropout` 0.5\): set it to null first\.$"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=chance))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": []}, "`corpus` must be a list of texts, at least one, got []."),
        ({"corpus": "a text"}, "`corpus` must be a list of texts, at least one, got 'a text'."),
        ({"corpus": [("a", "b")]}, "`corpus` must be a list of texts, at least one, got [('a', 'b')]."),
        ({"held_out": []}, "`held_out` must be a list of texts, at least one, got []."),
    ],
)
def test_a_corpus_that_is_none_is_refused(change, message, tmp_path):
    tokenizer = trained("wordpiece")
    arguments = {"corpus": CORPUS, "held_out": None} | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trim_vocabulary(encoder(tokenizer), tokenizer, output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"^`floor` must be at least 0 tokens, got -1\.$"):
        TrimOptions(floor=-1)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokenizer = trained("wordpiece")
    model = tiny_bert(BertModel, vocab_size=50, num_hidden_layers=1)
    with pytest.raises(ValueError, match=f"^The tokenizer has {len(tokenizer)} tokens, but the model embeds 50"):
        trim_vocabulary(model, tokenizer, CORPUS, tmp_path / "out")


def test_nothing_is_written_when_outputs_or_reading_would_differ(tmp_path, monkeypatch):
    tokenizer = trained("wordpiece")
    model = encoder(tokenizer)
    monkeypatch.setattr(trim, "difference", lambda *args: 1e-3)
    with pytest.raises(RuntimeError, match=r"^The trimmed model's outputs differ by 1\.0e-03 of the largest: nothing was"):
        trim_vocabulary(model, tokenizer, CORPUS, tmp_path)
    monkeypatch.setattr(Vocabulary, "used_by", lambda self, texts: set())
    with pytest.raises(RuntimeError, match=r"^The trimmed tokenizer reads 'Yes\.' as .* instead of .*: nothing was written\."):
        trim_vocabulary(model, tokenizer, CORPUS, tmp_path, NOTHING_MORE)
    assert list(tmp_path.iterdir()) == []


def test_command_writes_a_model_and_says_what_it_reads(tmp_path):
    tokenizer = trained("unigram")
    encoder(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    words = ["trim-vocabulary", str(tmp_path / "model"), "--corpus", str(tmp_path / "corpus.txt")]
    result = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "out"), "--floor", "0"])
    assert result.exit_code == 0, result.output
    assert "All 8 texts of the corpus are read as before" in " ".join(result.output.split())
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocabulary.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    result = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "model")])
    assert "would overwrite the model" in str(result.exception)
    (tmp_path / "corpus.txt").write_text("\n", encoding="utf-8")
    result = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "new")])
    assert str(result.exception) == f"`--corpus {tmp_path / 'corpus.txt'}` holds no text."
