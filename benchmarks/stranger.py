"""A chat in the words of somebody who had not seen the course's own lines.

    python benchmarks/stranger.py runs/laptop [--stage sft] [--misses]

`stranger.json` holds six questions for each topic of `static/talk.toml`'s tables "identity" and "small_talk", written from the
topics' names alone; 90 questions about our world, 40 requests and 30 lines of noise, to which the right answer is that it does
not know, cannot do it, or did not understand; and 30 introductions ("Hi! I am Tom and I live in Berlin"), of which something is
asked in the next turn. A reply counts when it contains the topic's word; the likeliest token is taken. The second column
leaves out what is, but for spelling, one of the course's own lines.
"""
import argparse
import json
from pathlib import Path

from nanochat_nb.checkpoint import load_model
from nanochat_nb.corpus import talk, turns, ways
from nanochat_nb.inference import Engine
from nanochat_nb.rl import answer_text
from nanochat_nb.runtime import start_runtime
from nanochat_nb.tasks import contains_phrase


def word_of(table: str, topic: str) -> str:
    """The word that a right reply contains; to noise we answer as to somebody who did not understand."""
    table, topic = ("small_talk", "unclear") if topic == "noise" else (table, topic)
    return talk()[table][topic]["word"]


def ask(engine: Engine, tokenizer, conversations: list[list[str]]) -> list[str]:
    """The likeliest reply to each conversation, which is a list of turns ending with the user's."""
    prompts = [tokenizer.render_for_completion({"messages": turns(*c)}) for c in conversations]
    groups = engine.generate(prompts, max_new_tokens=60, temperature=0.0)
    return [answer_text(tokenizer, group[0].ids) for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--misses", action="store_true")
    args = parser.parse_args()
    rt = start_runtime("", "")
    model, tokenizer, _ = load_model(args.run, stage=args.stage, device=rt.device, dtype=rt.dtype)
    engine = Engine(model, tokenizer)
    questions = json.loads(Path(__file__).with_name("stranger.json").read_text(encoding="utf-8"))
    introductions = questions.pop("introduction")
    print("| table | all | not among the course's lines |\n|---|---:|---:|")
    for table, topics in questions.items():
        known = set().union(*(ways(line) for topic in talk()[table].values() for line in topic["asks"]))
        asked = [(topic, q) for topic, qs in topics.items() for q in qs]
        replies = ask(engine, tokenizer, [[q] for _, q in asked])
        right = [contains_phrase(r, word_of(table, topic)) for (topic, _), r in zip(asked, replies)]
        new = [ok for ok, (_, q) in zip(right, asked) if not ways(q) & known]
        print(f"| {table} | {sum(right) / len(right):.1%} of {len(right)} | {sum(new) / len(new):.1%} of {len(new)} |")
        for ok, (topic, q), r in zip(right, asked, replies) if args.misses else ():
            if not ok:
                print(f"    {topic}: {q} -> {r}")
    first = ask(engine, tokenizer, [[i["tell"]] for i in introductions])
    replies = ask(engine, tokenizer, [[i["tell"], r, i["ask"]] for i, r in zip(introductions, first)])
    right = [contains_phrase(r, i["answer"]) for i, r in zip(introductions, replies)]
    print(f"| introductions | {sum(right) / len(right):.1%} of {len(right)} | |")
    for ok, i, f, r in zip(right, introductions, first, replies) if args.misses else ():
        if not ok:
            print(f"    {i['tell']} -> {f} / {i['ask']} -> {r}")


if __name__ == "__main__":
    main()
