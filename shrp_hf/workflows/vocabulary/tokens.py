"""Which tokens stay, and a tokenizer that has only those: WordPiece, Unigram and BPE, by their `tokenizer.json`."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

KINDS = ("WordPiece", "Unigram", "BPE")
CHUNK = 1000  # texts that are encoded at once
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PLACEHOLDER = re.compile(r"[\[<]unused_?\d+[\]>]|madeupword\d+")

Encodings = Iterator[tokenizers.Encoding]


class Vocabulary:
    """The tokens of a fast tokenizer, and what keeping some of them takes.

    Args:
        tokenizer: A tokenizer of Transformers.

    Raises:
        ValueError: It is no fast tokenizer, or of a kind that cannot be trimmed.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"`{type(tokenizer).__name__}` cannot be trimmed: it is no fast tokenizer, so it has no `tokenizer.json`. "
                "Convert it to one first."
            )
        self.content: dict[str, Any] = json.loads(backend.to_str())
        self.model: dict[str, Any] = self.content["model"]
        kind = self.model.get("type") or "one without a type"
        if kind not in KINDS:
            raise ValueError(f"A tokenizer of {', '.join(KINDS)} can be trimmed, and this one is {kind}.")
        if self.model.get("dropout"):
            raise ValueError(f"The tokenizer splits at random (`dropout` {self.model['dropout']}): set it to null first.")
        self.kind: str = kind
        self.backend = unlimited(self.content)
        pieces = self.model["vocab"]
        self.ids: dict[str, int] = {piece: i for i, (piece, _) in enumerate(pieces)} if kind == "Unigram" else dict(pieces)
        self.added: dict[int, str] = {token["id"]: token["content"] for token in self.content["added_tokens"]}
        self.tokens: dict[int, str] = {i: token for token, i in self.ids.items()} | self.added

    @property
    def special(self) -> set[int]:
        """Tokens that stay whatever is read: added and special ones, and the unknown token."""
        found = set(self.added)
        if self.kind == "Unigram":
            found |= {self.model["unk_id"]} - {None}
        elif self.model.get("unk_token") in self.ids:
            found.add(self.ids[self.model["unk_token"]])

        def note(i: int) -> int:
            found.add(i)
            return i

        _each_id(copy.deepcopy(self.content.get("post_processor")), note)
        return found

    @property
    def unknown(self) -> int | None:
        """The unknown token; None where there is none, as in vocabularies of bytes."""
        return self.model["unk_id"] if self.kind == "Unigram" else self.ids.get(self.model.get("unk_token"))

    @property
    def alphabet(self) -> set[int]:
        """Single characters and bytes, of which any word that was read before can still be spelled."""
        strip = len(self.model.get("continuing_subword_prefix") or ""), len(self.model.get("end_of_word_suffix") or "")
        return {i for token, i in self.ids.items() if len(self._bare(token, *strip)) == 1 or _BYTE.fullmatch(token)}

    def used_by(self, texts: Sequence[str]) -> set[int]:
        """Tokens that must stay for the texts to be read as before.

        That is more than comes out: parts of a word that WordPiece gave up on, or a shorter match would succeed; the piece
        with the lowest score in Unigram, of which unknown characters get theirs; all that BPE merges on the way is added by
        `closed`.
        """
        used: set[int] = set()
        prefix = self.model.get("continuing_subword_prefix") or ""
        for text, encoding in zip(texts, encode(self.backend, texts), strict=True):
            used.update(encoding.ids)
            if self.kind == "WordPiece" and self.unknown in encoding.ids:
                used.update(piece for word in self._words(text) for piece in self._matched(word, prefix))
        if self.kind == "Unigram":
            scores = [score for _, score in self.model["vocab"]]
            used.add(scores.index(min(scores)))
        return used

    def filled(self, kept: set[int], floor: int) -> set[int]:
        """Adds the commonest tokens, which come first in every vocabulary, until there are `floor`."""
        found = set(kept)
        for i in sorted(self.ids.values()):
            if len(found) >= floor:
                break
            if not _PLACEHOLDER.fullmatch(self.tokens[i]):
                found.add(i)
        return found

    def closed(self, kept: set[int]) -> tuple[set[int], set[tuple[str, str]]]:
        """Adds what BPE makes each token of; returns the tokens, and the merges on the way (none for the other kinds)."""
        if self.kind != "BPE":
            return kept, set()
        ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        merges: set[tuple[str, str]] = set()
        for i in kept & set(self.ids.values()):
            merges.update(self._merged(self.tokens[i], ranks))
        prefix = len(self.model.get("continuing_subword_prefix") or "")
        pieces = {piece for a, b in merges for piece in (a, b, a + b[prefix:])}
        return kept | {self.ids[piece] for piece in pieces}, merges

    def trimmed(self, kept: Sequence[int], merges: set[tuple[str, str]]) -> dict[str, Any]:
        """Returns a `tokenizer.json` of the tokens that stay.

        Args:
            kept: Their ids in ascending order; each becomes its position.
            merges: Of BPE, from `closed`.
        """
        new = {old: position for position, old in enumerate(kept)}
        content = copy.deepcopy(self.content)
        model = content["model"]
        if self.kind == "Unigram":
            model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in new]
            model["unk_id"] = new.get(model["unk_id"])
        else:
            model["vocab"] = {token: new[i] for token, i in sorted(self.ids.items(), key=lambda item: item[1]) if i in new}
        if self.kind == "BPE":
            model["merges"] = [list(pair) for pair in self._merges if pair in merges]
        for token in content["added_tokens"]:
            token["id"] = new[token["id"]]
        _each_id(content.get("post_processor"), new.__getitem__)
        if content.get("padding"):
            content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
        return content

    @property
    def _merges(self) -> list[tuple[str, str]]:
        return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in self.model["merges"]]

    @staticmethod
    def _bare(token: str, prefix: int, suffix: int) -> str:
        """A token longer than one character without its mark of being in a word, or at its end."""
        bare = token[prefix:] if prefix and len(token) > prefix else token
        return bare[:-suffix] if suffix and len(bare) > suffix else bare

    def _words(self, text: str) -> list[str]:
        normalizer, splitter = self.backend.normalizer, self.backend.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]

    def _matched(self, word: str, prefix: str) -> list[int]:
        """The longest matches in a word, from its beginning until there is none."""
        found, start = [], 0
        while start < len(word) <= self.model["max_input_chars_per_word"]:
            ends = range(len(word), start, -1)
            pieces = (prefix * (start > 0) + word[start:end] for end in ends)
            piece = next((piece for piece in pieces if piece in self.ids), None)
            if piece is None:
                break
            found.append(self.ids[piece])
            start += len(piece) - len(prefix) * (start > 0)
        return found

    def _merged(self, token: str, ranks: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
        """The merges that make a token of its characters.

        In a longer word they are the same, in the same order: what BPE merges across the border of what comes out as a
        token would have made another one.
        """
        prefix, suffix = self.model.get("continuing_subword_prefix") or "", self.model.get("end_of_word_suffix") or ""
        inside = bool(prefix) and token.startswith(prefix)
        bare = token[len(prefix) :] if inside else token
        at_end = bool(suffix) and bare.endswith(suffix)
        bare = bare[: -len(suffix)] if at_end else bare
        parts = [prefix * (inside or i > 0) + character for i, character in enumerate(bare)]
        if at_end and parts:
            parts[-1] += suffix
        applied = []
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            if pairs[best] not in ranks:
                break  # a token that is looked up whole, not merged
            applied.append(pairs[best])
            parts[best : best + 2] = [parts[best] + parts[best + 1][len(prefix) :]]
        return applied


def unlimited(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Makes a tokenizer that neither truncates nor pads.

    Args:
        content: What `tokenizer.json` holds.
    """
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> Encodings:
    """Encodes texts one after the other, special tokens included."""
    for start in range(0, len(texts), CHUNK):
        yield from backend.encode_batch(list(texts[start : start + CHUNK]))


def _each_id(node: Any, change: Callable[[int], int]) -> None:
    """Changes every id of a post-processor in place: `{"ids": [101]}`, `{"sep": ["[SEP]", 102]}`, at any depth."""
    children: Iterable[Any] = node if isinstance(node, list) else ()
    if isinstance(node, dict):
        children = node.values()
        if isinstance(node.get("ids"), list):
            node["ids"] = [change(i) for i in node["ids"]]
        for name in ("sep", "cls"):
            if isinstance(node.get(name), list):
                node[name] = [node[name][0], change(node[name][1])]
    for child in children:
        _each_id(child, change)
