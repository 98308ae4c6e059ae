"""Identity and small talk in the words of somebody who had not seen the course's own lines.

    python benchmarks/stranger.py runs/laptop [--stage sft] [--misses]

`stranger.json` holds six questions for each topic of `static/talk.toml`'s tables "identity" and "small_talk", written from the
topics' names alone. A reply counts when it contains the topic's word; each question begins a conversation, and the likeliest
token is taken. The second column leaves out what is, but for case and punctuation, one of the course's own lines.
"""
import argparse
import itertools
import json
import re
from pathlib import Path

from nanochat_nb.checkpoint import load_model
from nanochat_nb.corpus import talk
from nanochat_nb.inference import Engine
from nanochat_nb.rl import answer_text
from nanochat_nb.runtime import start_runtime
from nanochat_nb.tasks import contains_phrase


def plain(text: str) -> str:
    """Only letters and digits, in lower case."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def ways(line: str) -> set[str]:
    """Everything that a line with [a|b] can say, in plain form."""
    parts = [p.split("|") for p in re.split(r"[\[\]]", line)]
    return {plain("".join(choice)) for choice in itertools.product(*parts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--misses", action="store_true")
    args = parser.parse_args()
    rt = start_runtime("", "")
    model, tokenizer, _ = load_model(args.run, stage=args.stage, device=rt.device, dtype=rt.dtype)
    questions = json.loads(Path(__file__).with_name("stranger.json").read_text(encoding="utf-8"))
    print("| table | all | not among the course's lines |\n|---|---:|---:|")
    for table, topics in questions.items():
        known = set().union(*(ways(line) for topic in talk()[table].values() for line in topic["asks"]))
        asked = [(topic, q) for topic, qs in topics.items() for q in qs]
        prompts = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": q}]}) for _, q in asked]
        replies = [answer_text(tokenizer, group[0].ids) for group in Engine(model, tokenizer).generate(
            prompts, max_new_tokens=60, temperature=0.0)]
        right = [contains_phrase(r, talk()[table][topic]["word"]) for (topic, _), r in zip(asked, replies)]
        new = [ok for ok, (_, q) in zip(right, asked) if plain(q) not in known]
        print(f"| {table} | {sum(right) / len(right):.1%} of {len(right)} | {sum(new) / len(new):.1%} of {len(new)} |")
        for ok, (topic, q), r in zip(right, asked, replies) if args.misses else ():
            if not ok:
                print(f"    {topic}: {q} -> {r}")


if __name__ == "__main__":
    main()
