"""Make one `--conversations` file out of a folder of public instruction data.

    python benchmarks/real_conversations.py DATA OUT.jsonl

DATA holds (each optional, a missing one is named):
  sft/sgd_dialogues_4500.jsonl     {"messages": [...]} a line (Schema-Guided Dialogue)
  sft/instruction-data.json        rows of instruction, input, output (LLMs-from-scratch)
  sft/gpteacher_*.json             rows of instruction, input, response (GPTeacher)
  gsm8k/train.jsonl                question, answer with <<calculator=marks>> (grade-school-math)
"""
import json
import sys
from collections import Counter
from pathlib import Path

from nanochat_nb.tasks import gsm8k_conversation


def instruction(row: dict) -> dict:
    """One instruction row as a conversation: the input, when there is one, follows the instruction."""
    question = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part.strip())
    answer = row.get("output", row.get("response", ""))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(path: Path) -> list[dict]:
    """The rows of a jsonl file, read by "\\n" only (U+2028 may stand inside a string)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def conversations(data: Path):
    """Yield (source, conversation) for every row of every file that is there."""
    sources = {
        "sft/sgd_dialogues_4500.jsonl": lambda p: lines(p),
        "sft/instruction-data.json": lambda p: map(instruction, json.loads(p.read_text(encoding="utf-8"))),
        "sft/gpteacher_roleplay.json": lambda p: map(instruction, json.loads(p.read_text(encoding="utf-8"))),
        "sft/gpteacher_codegen.json": lambda p: map(instruction, json.loads(p.read_text(encoding="utf-8"))),
        "gsm8k/train.jsonl": lambda p: map(gsm8k_conversation, lines(p)),
    }
    for name, read in sources.items():
        if not (data / name).exists():
            print(f"missing, left out: {name}", file=sys.stderr)
            continue
        for conversation in read(data / name):
            yield name, conversation["messages"]


def main() -> None:
    """Write the file and print how many conversations each source gave."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    counts = Counter()
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        for name, messages in conversations(Path(sys.argv[1])):
            if not all(m["content"] for m in messages) or messages[-1]["role"] != "assistant":
                counts[f"{name}: left out (an empty turn, or no answer)"] += 1
                continue
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            counts[name] += 1
    for name, count in counts.items():
        print(f"{count:7,} {name}")


if __name__ == "__main__":
    main()
