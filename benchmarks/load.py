"""Many chats at once on a running server: nothing fails, nothing is mixed up, and how fast it is.

    python benchmarks/load.py RUN [--chats 32] [--seconds 180] [--max-tokens 128]

Starts the server on RUN, computing in float32 so that an answer does not depend on who else is answered, then asks each of
CHATS questions with a seed of its own, one at a time. After that CHATS clients ask theirs again and again, streaming, all at the
same time, for SECONDS. Every answer must be the one that its question got alone: a stream with another's tokens in it would
differ. Clients run in this process, on the same cores as the server. Exits with 1 when any request failed or any answer differed.
"""
import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent.parent
NAMES = ("Ada", "Ben", "Cem", "Dia", "Eli", "Fay", "Gus", "Hal")
TOPICS = ("a lighthouse", "a sum: 12*37", "the word butter", "an owl")


async def one_chat(client: httpx.AsyncClient, number: int, max_tokens: int) -> dict:
    """Ask question `number`, streaming: its text, tokens, and the seconds to the first token and to the end."""
    question = f"I am {NAMES[number % len(NAMES)]}{number}. Tell me about {TOPICS[number % len(TOPICS)]}."
    body = {"messages": [{"role": "user", "content": question}], "seed": number, "max_tokens": max_tokens, "stream": True,
            "stream_options": {"include_usage": True}}
    start, first, parts, last = time.perf_counter(), None, [], {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return {"text": "".join(parts), "tokens": last["usage"]["completion_tokens"],
                        "first": first or time.perf_counter() - start, "seconds": time.perf_counter() - start}
            if line.startswith("data: "):
                last = json.loads(line[6:])
                for delta in (choice["delta"] for choice in last.get("choices", []) if "role" not in choice["delta"]):
                    first = first or time.perf_counter() - start
                    parts.append(delta.get("content", "") + str(delta.get("nanochat", "")))
    raise RuntimeError(f"the stream ended early: {last}")


async def alone(client: httpx.AsyncClient, args) -> list[dict]:
    """Every question once, one at a time."""
    return [await one_chat(client, number, args.max_tokens) for number in range(args.chats)]


async def together(client: httpx.AsyncClient, args, expected: list[dict]) -> tuple[list[dict], list[str]]:
    """All chats at once until the time is over; the answers, and what went wrong."""
    answers, trouble, end = [], [], time.perf_counter() + args.seconds

    async def keep_asking(number: int) -> None:
        while time.perf_counter() < end:
            try:
                answers.append(await one_chat(client, number, args.max_tokens))
                if answers[-1]["text"] != expected[number]["text"]:
                    trouble.append(f"question {number} got another answer than alone")
            except Exception as error:
                trouble.append(f"question {number}: {type(error).__name__}: {error}")

    await asyncio.gather(*(keep_asking(number) for number in range(args.chats)))
    return answers, trouble


async def measure(address: str, args) -> int:
    limits = httpx.Limits(max_connections=args.chats + 1)
    async with httpx.AsyncClient(base_url=address, timeout=600, trust_env=False, limits=limits) as client:
        await one_chat(client, 0, args.max_tokens)           # the first request warms things up
        start = time.perf_counter()
        expected = await alone(client, args)
        one = sum(a["tokens"] for a in expected) / (time.perf_counter() - start)
        start = time.perf_counter()
        answers, trouble = await together(client, args, expected)
        all_at_once = sum(a["tokens"] for a in answers) / (time.perf_counter() - start)
    waits = sorted(a["first"] for a in answers) or [float("nan")]
    print(f"one chat at a time: {one:,.0f} tokens/s, first token {statistics.median(a['first'] for a in expected):.3f} s (median)")
    print(f"{args.chats} at once for {args.seconds} s: {all_at_once:,.0f} tokens/s, {all_at_once / one:.1f} times as many; "
          f"{len(answers)} answers; first token {statistics.median(waits):.3f} s (median), {waits[int(0.95 * (len(waits) - 1))]:.3f} s (p95)")
    print(f"failed or different: {len(trouble)}", *trouble[:5], sep="\n  ")
    return 1 if trouble or not answers else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "nanochat_nb.server", "--run", args.run, "--port", str(port)],
                              env=os.environ | {"PYTHONPATH": str(HERE), "NANOCHAT_NB_DTYPE": "float32"},
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        server.stdout.readline()                             # the models' names
        if "listening" not in server.stdout.readline():
            sys.exit(f"the server did not start: python -m nanochat_nb.server --run {args.run}")
        address = f"http://127.0.0.1:{port}"
        while True:                                          # the line comes a moment before the socket
            try:
                httpx.get(f"{address}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        status = asyncio.run(measure(address, args))
    finally:
        server.terminate()
        server.wait(30)
    sys.exit(status)


if __name__ == "__main__":
    main()
