"""A chat in the words of somebody who had not seen the course's own lines.

    python benchmarks/stranger.py runs/laptop [--stage sft] [--misses]

`stranger.json` holds six questions for each topic of `static/talk.toml`'s tables "identity" and "small_talk", written from the
topics' names alone; 90 questions about our world, 40 requests and 30 lines of noise, to which the right answer is that it does
not know, cannot do it, or did not understand; 30 introductions ("Hi! I am Tom and I live in Berlin"), of which something is
asked in the next turn; 40 each of bare sums, problems in words and spelling questions; and 48 requests for a small program,
written from a description of what such programs can do. A reply counts when it contains the topic's word, ends with the right
number or letters, or its function, whatever its name, passes three tests; the likeliest token is taken. The second column leaves out what is, but
for spelling, one of the course's own lines. The last rows ask the held-out questions of the evaluation twice: as they are
written, and as somebody in haste types them.
"""
import argparse
import json
import random
from pathlib import Path

from nanochat_nb.checkpoint import load_model
from nanochat_nb.corpus import in_haste, talk, turns, ways
from nanochat_nb.inference import Engine
from nanochat_nb.rl import answer_text
from nanochat_nb.runtime import start_runtime
from nanochat_nb.tasks import contains_phrase, embedded_task, judge_letters, judge_number, judge_program


def word_of(table: str, topic: str) -> str:
    """The word that a right reply contains; to noise we answer as to somebody who did not understand."""
    table, topic = ("small_talk", "unclear") if topic == "noise" else (table, topic)
    return talk()[table][topic]["word"]


def ask(engine: Engine, tokenizer, conversations: list[list[str]], max_new_tokens: int = 60) -> list[str]:
    """The likeliest reply to each conversation, which is a list of turns ending with the user's."""
    prompts = [tokenizer.render_for_completion({"messages": turns(*c)}) for c in conversations]
    groups = engine.generate(prompts, max_new_tokens=max_new_tokens, temperature=0.0)
    return [answer_text(tokenizer, group[0].ids) for group in groups]


def skills(engine: Engine, tokenizer, questions: dict[str, list[dict]], misses: bool) -> None:
    """Sums, problems in words, spelling and programs, in a stranger's words."""
    for kind, judge in (("sum", judge_number), ("problem", judge_number), ("letters", judge_letters), ("program", judge_program)):
        asked = [q | {"messages": turns(q["ask"], ""), "entry_point": "f", "unnamed": True} for q in questions[kind]]
        replies = ask(engine, tokenizer, [[q["ask"]] for q in asked], max_new_tokens=160)
        right = [judge(q, r) for q, r in zip(asked, replies)]
        print(f"| {kind} | {sum(right) / len(right):.1%} of {len(right)} | |")
        for ok, q, r in zip(right, asked, replies) if misses else ():
            if not ok:
                print(f"    {q['ask']} -> {r!r}")
def haste(engine: Engine, tokenizer) -> None:
    """The evaluation's own questions, as they are and in haste."""
    for kind in ("fact", "unknown", "letters", "word_problem"):
        task, scores = embedded_task(kind, "test", limit=100), []
        for typed in (lambda text: text, lambda text: in_haste(text, random.Random(text))):
            asked = [[typed(m["content"]) if m["role"] == "user" else m["content"] for m in c["messages"][:-1]]
                     for c in task]
            right = [task.evaluate(c, r) for c, r in zip(task, ask(engine, tokenizer, asked, max_new_tokens=160))]
            scores.append(sum(right) / len(right))
        print(f"| {kind}: as written, in haste | {scores[0]:.1%}, {scores[1]:.1%} of {len(task)} | |")


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
    of_skill = {kind: questions.pop(kind) for kind in ("sum", "problem", "letters", "program")}
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
    skills(engine, tokenizer, of_skill, args.misses)
    haste(engine, tokenizer)


if __name__ == "__main__":
    main()
