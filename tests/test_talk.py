"""How people ask: what training shows, and what it must never show because an exam asks it."""
import math
import random
import re
from collections import defaultdict

from nanochat_nb.corpus import _line, conversations, lines_of, practice, talk, ways


def first_words(conversation: dict) -> tuple[str, str]:
    """What the user asks last, and what is answered."""
    asked, reply = (turn["content"] for turn in conversation["messages"][-2:])
    return asked, reply if isinstance(reply, str) else "".join(part["text"] for part in reply)


def test_a_name_in_haste_is_said_properly_first():
    """A quarter of the training questions come in haste and get "You mean Greta Quill." first; no exam question does."""
    for kind in ("fact", "unknown"):
        said = {split: [first_words(c) for c in conversations(kind, split, limit=400, seed=3)] for split in ("train", "test")}
        hasty = [(asked, reply) for asked, reply in said["train"] if reply.startswith("You mean ")]
        assert 60 < len(hasty) < 140, (kind, len(hasty))
        assert not any(reply.startswith("You mean ") for _, reply in said["test"])
        for asked, reply in hasty:
            name = re.match(r"You mean (.+?)\. ", reply)[1]
            assert asked == asked.lower() and not asked.endswith("?")
            assert name.lower().removeprefix("the ") in asked.replace("the ", "")


def test_the_usual_wording_comes_more_often():
    """The first line of a topic stands in training far more often than its share of the lines."""
    table, topic = "identity", next(iter(talk()["identity"]))
    lines = lines_of(table, topic, "train")
    rng = random.Random(0)
    drawn = [_line(lines, rng, "train") for _ in range(4000)]
    assert 0.03 < drawn.count(lines[0]) / 4000 < 0.06 and 1 / len(lines) < 0.01
    exam = lines_of(table, topic, "test")
    drawn = [_line(exam, rng, "test") for _ in range(4000)]
    assert drawn.count(exam[0]) / 4000 < 2 / len(exam)


def test_no_line_for_practice_comes_near_an_exam():
    """A line of `practice.toml` shares less than three quarters of its words with any exam's line, however either is said
    (lines of one or two words aside, which 01 compares as a whole).
    """
    for table, topics in practice().items():
        exam = {frozenset(way.split()) for topic in talk()[table] for split in ("val", "test")
                for line in lines_of(table, topic, split) for way in ways(line)}
        holding = defaultdict(set)
        for said in exam:
            for word in said:
                holding[word].add(said)
        mine = {frozenset(way.split()) for lines in topics.values() for line in lines for way in ways(line)}
        assert len(exam) > 100 and len(mine) > 1000
        for said in (said for said in mine if len(said) > 2):
            # who shares three quarters of `said` shares one of its rarest words: all but three quarters of them, and one more
            rare = sorted(said, key=lambda word: len(holding[word]))[:len(said) - math.ceil(0.75 * len(said)) + 1]
            near = [other for other in set().union(*(holding[word] for word in rare)) if len(said & other) >= 0.75 * len(said | other)]
            assert not near, (table, sorted(said), sorted(near[0]))
