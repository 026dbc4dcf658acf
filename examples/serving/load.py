"""Puts a load on the server of this folder, which it starts itself: p50, p99 and texts a second at several numbers of clients.

Every client keeps a connection and posts the next text when the last one is answered. All models are served by one process
and take turns, so ratios hold on a machine that slows down. Let it do nothing else meanwhile.

python examples/serving/load.py out/onnx-dense out/onnx --texts queries.txt --clients 1 8 64 --seconds 10 --threads 2
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

SENTENCES = [
    "Yes.",
    "Returns the largest value along the given axis.",
    "a quietly moving film about people who have run out of things to say",
    "Shares fell 3.4% on Tuesday after the company cut its forecast for the second time this year.",
    "The second half is slower, and better for it: the camera waits, the actors breathe, and what looked like an ordinary "
    "thriller turns into a patient study of two sisters who can neither forgive each other nor stay away.",
]


async def client(port: int, name: str, texts: list[str], start: int, until: float) -> list[float]:
    """Posts text after text until the time is over; returns the seconds of each answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds = []
    try:
        while time.perf_counter() < until:
            body = json.dumps({"texts": [texts[(start + len(seconds)) % len(texts)]]}).encode()
            head = f"POST /{name} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            begun = time.perf_counter()
            writer.write(head.encode() + body)
            header = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in header.split(b"\r\n")[1:] if b": " in line)
            answer = await reader.readexactly(int(fields[b"content-length"]))
            seconds.append(time.perf_counter() - begun)
            if b" 200 " not in header.split(b"\r\n")[0]:
                raise RuntimeError(f"The server says {answer[:200]!r}.")
    finally:
        writer.close()
    return seconds


async def load(port: int, name: str, texts: list[str], clients: int, seconds: float) -> list[float]:
    """Returns the seconds of every answer to so many clients."""
    until = time.perf_counter() + seconds
    runs = (client(port, name, texts, i * len(texts) // clients, until) for i in range(clients))
    return [time for run in await asyncio.gather(*runs) for time in run]


def wait_for(port: int, server: subprocess.Popen) -> dict:
    """Waits until the server answers, and returns what it says of itself."""
    while True:
        if server.poll() is not None:
            raise RuntimeError("The server ended before it answered: see above.")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.1)


def processor() -> str:
    """Names the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(words: argparse.Namespace, texts: list[str]) -> list[dict]:
    """Returns a row a model and number of clients; the models take turns in every round."""
    names = [folder.name for folder in words.models]
    rows = []
    for clients in words.clients:
        found: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            asyncio.run(load(words.port, name, texts, clients, words.seconds / 10))  # warms up
        for _ in range(words.rounds):
            for name in names:
                found[name] += asyncio.run(load(words.port, name, texts, clients, words.seconds / words.rounds))
        for name, times in found.items():
            ordered = sorted(times)
            rows.append(
                {
                    "model": name,
                    "clients": clients,
                    "p50_ms": 1e3 * statistics.median(ordered),
                    "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
                    "texts_per_second": len(ordered) / words.seconds,
                }
            )
    return rows


def main() -> None:
    """Starts the server, loads it, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", type=Path, help="directories that `shrp-hf export` wrote; the first is compared with"
    )
    parser.add_argument("--texts", type=Path, help="text file, a text a line; default: five sentences")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each model and number of clients")
    parser.add_argument("--rounds", type=int, default=5, help="in which the models take turns")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the runtime")
    parser.add_argument("--port", type=int, default=8123)
    words = parser.parse_args()
    texts = SENTENCES
    if words.texts is not None:
        texts = [line for line in words.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            parser.error(f"{words.texts} holds no text")
    command = [sys.executable, str(Path(__file__).with_name("server.py")), *map(str, words.models)]
    server = subprocess.Popen([*command, "--port", str(words.port), "--threads", str(words.threads)])
    try:
        about = wait_for(words.port, server)
        rows = measure(words, texts)
    finally:
        server.terminate()
        server.wait()
    print(f"{os.cpu_count()} x {processor()}, {words.threads} threads, {datetime.now(UTC).date()}, {len(texts)} texts,")
    print(f"server without torch: {not about['imported']}; load and server share the processor.\n")
    print("| model | clients | p50 (ms) | p99 (ms) | texts/s | |\n|---|---:|---:|---:|---:|---:|")
    first = {row["clients"]: row["texts_per_second"] for row in rows if row["model"] == words.models[0].name}
    for row in rows:
        ratio = row["texts_per_second"] / first[row["clients"]] if first[row["clients"]] else float("nan")
        figures = f"{row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['texts_per_second']:.0f} | {ratio:.2f}x"
        print(f"| {row['model']} | {row['clients']} | {figures} |")


if __name__ == "__main__":
    main()
