"""Smaller vocabularies: what a corpus never uses leaves the tokenizer and the embeddings."""

from shrp_hf.workflows.vocabulary.trim import TrimOptions, TrimResult, copy_sentence_modules, trim_vocabulary

__all__ = ["TrimOptions", "TrimResult", "copy_sentence_modules", "trim_vocabulary"]
