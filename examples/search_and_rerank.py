r"""Search and rerank: a bi-encoder finds documents in a vector index (faiss), a cross-encoder puts the best in order.

Pairs of models are compared, the first is the baseline: quality by the collection's judgements, and what serves a second.

python examples/search_and_rerank.py --collection DIR --bi-encoders ORIGINAL out/search/model \
    --cross-encoders out/rank/dense out/rank/model
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

from shrp_hf.tasks import Reading, Task, load_task
from shrp_hf.tasks.ranked import per_query

DEPTH = 100  # documents that the index returns for a query
METRICS = ("ndcg@10", "mrr@10")


@dataclass(frozen=True)
class Collection:
    """Documents, queries, and which documents answer them.

    Args:
        documents: Texts.
        queries: Texts.
        grades: Index of a query -> index of a document -> how relevant it is.
    """

    documents: list[str]
    queries: list[str]
    grades: dict[int, dict[int, int]]

    @classmethod
    def of(cls, task: Task) -> "Collection":
        """Takes over the reported rows of a collection in BEIR's layout."""
        rows = task.test
        first = next(row for row, role in enumerate(rows["role"]) if role == "query")
        judged = rows["judged"][first:]
        grades = {i: dict(zip(found["relevant"], found["grades"], strict=True)) for i, found in enumerate(judged)}
        return cls(rows["text"][:first], rows["text"][first:], grades)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", required=True, help="directory in BEIR's layout")
    parser.add_argument("--bi-encoders", nargs="+", required=True, help="SentenceTransformers, the original first")
    parser.add_argument("--cross-encoders", nargs="+", required=True, help="CrossEncoders, one beside each")
    parser.add_argument("--rerank", type=int, default=20, help="documents of a query that are put in order anew")
    parser.add_argument("--max-queries", type=int, help="most queries")
    parser.add_argument("--max-length", type=int, default=256, help="longest text in tokens")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    if len(args.bi_encoders) != len(args.cross_encoders):
        parser.error(f"give as many --cross-encoders as --bi-encoders, got {args.cross_encoders} and {args.bi_encoders}")
    return args


def build_index(model: SentenceTransformer, documents: list[str], batch_size: int) -> tuple[faiss.Index, float]:
    """Embeds the documents; returns their index and documents per second."""
    model.encode_document(documents[:batch_size])  # to warm up
    started = time.perf_counter()
    vectors = model.encode_document(documents, batch_size=batch_size, normalize_embeddings=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index, len(documents) / (time.perf_counter() - started)


def search(model: SentenceTransformer, index: faiss.Index, queries: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
    """Finds documents for every query; returns scores and documents, best first, and queries per second."""
    started = time.perf_counter()
    vectors = model.encode_query(queries, normalize_embeddings=True)
    scores, found = index.search(np.ascontiguousarray(vectors, dtype=np.float32), min(DEPTH, index.ntotal))
    return scores, found, len(queries) / (time.perf_counter() - started)


def rerank(model: CrossEncoder, data: Collection, found: np.ndarray, batch_size: int) -> tuple[np.ndarray, float]:
    """Scores every query with its documents; returns the scores, shaped as `found`, and documents per second."""
    pairs = [(data.queries[query], data.documents[place]) for query, row in enumerate(found) for place in row]
    model.predict(pairs[:batch_size])
    started = time.perf_counter()
    scores = model.predict(pairs, batch_size=batch_size)
    return np.asarray(scores).reshape(found.shape), len(pairs) / (time.perf_counter() - started)


def quality(data: Collection, found: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Judges documents by their scores, averaged over queries."""
    ranked = {
        query: dict(zip(*both, strict=True)) for query, both in enumerate(zip(found.tolist(), scores.tolist(), strict=True))
    }
    grades = {query: data.grades[query] for query in ranked}
    return {name: float(values.mean()) for name, values in per_query(METRICS, grades, ranked).items()}


def main() -> None:
    """Searches and reranks with every pair of models, and prints a table."""
    args = parse()
    data = Collection.of(load_task(args.collection, reading=Reading(task="embeddings")))
    data = Collection(data.documents, data.queries[: args.max_queries], data.grades)
    print(f"{len(data.documents):,} documents, {len(data.queries):,} queries, {args.rerank} documents of each reranked\n")
    print("| bi-encoder + cross-encoder | index, docs/s | search, queries/s | nDCG@10 | rerank, docs/s | nDCG@10 reranked |")
    print("|---|---:|---:|---:|---:|---:|")
    for first, second in zip(args.bi_encoders, args.cross_encoders, strict=True):
        encoder = SentenceTransformer(first, device="cpu", trust_remote_code=True)
        ranker = CrossEncoder(second, device="cpu", trust_remote_code=True, max_length=args.max_length)
        encoder.max_seq_length = args.max_length
        index, indexed = build_index(encoder, data.documents, args.batch_size)
        scores, found, searched = search(encoder, index, data.queries)
        best = found[:, : args.rerank]
        again, reranked = rerank(ranker, data, best, args.batch_size)
        names = f"{'/'.join(Path(first).parts[-2:])} + {'/'.join(Path(second).parts[-2:])}"
        before, after = quality(data, found, scores), quality(data, best, again)
        speeds = f"{indexed:,.1f} | {searched:,.1f} | {before['ndcg@10']:.4f} | {reranked:,.1f} | {after['ndcg@10']:.4f}"
        print(f"| {names} | {speeds} |")


if __name__ == "__main__":
    main()
