"""Tokens lost or added by packing, ours beside nanochat's own loader, on the same tokens.

    python benchmarks/packing.py NANOCHAT_CHECKOUT TEXT...      (checkout at 92d63d4; TEXT as for --text)

nanochat's loader runs as it is, fed with our token lists instead of parquet files, for two epochs' worth of tokens.
"""
import sys
import tempfile

import numpy as np

from nanochat_nb.corpus import open_text
from nanochat_nb.loader import plans, write_shards
from nanochat_nb.tokenizer import Tokenizer


class PeerTokenizer:
    """What nanochat's loader asks of a tokenizer; a "text" is a document's number in `shards`."""

    def __init__(self, shards):
        self.shards = shards

    def get_bos_token_id(self):
        return self.shards.bos

    def encode(self, batch, prepend=None, num_threads=1):
        return [self.shards.document(i).tolist() for i in batch]


def nanochat_batches(shards, rows, sequence_len, seed=0, note=lambda tokens: None):
    """The batches that nanochat's own loader makes of these documents, shuffled every epoch; `note` hears what it has read."""
    from nanochat import dataloader

    def document_batches(split, resume, batch_size):
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(shards.num_documents).tolist()
            for i in range(0, len(order), batch_size):
                note(int(shards.lengths[order[i:i + batch_size]].sum()))
                yield order[i:i + batch_size], (0, 0, 1)

    dataloader._document_batches = document_batches
    return dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit(
        PeerTokenizer(shards), rows, sequence_len, "train", device="cpu")


def cropped_by_nanochat(shards, sequence_len):
    """Fraction of the tokens it took from its buffer that nanochat's loader threw away."""
    read = []
    batches = nanochat_batches(shards, 1, sequence_len, note=read.append)
    rows = 2 * shards.num_tokens // (sequence_len + 1)
    for _ in range(rows):
        next(batches)
    used = sum(read) - sum(map(len, batches.gi_frame.f_locals["doc_buffer"]))
    return 1 - rows * (sequence_len + 1) / used


def added_by_ours(shards, sequence_len):
    """Fraction of the tokens trained on that are a bos put before the rest of a cut document."""
    _, plan = next(plans(shards, sequence_len=sequence_len, seed=0))
    return float((plan.pieces[:, 1] > 1).sum() / (len(plan) * (sequence_len + 1)))


def main(checkout, *text):
    sys.path.insert(0, checkout)
    source = open_text(list(text))
    texts = [d.text for d in source.documents("train")]
    tokenizer = Tokenizer.train(texts, 4096)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(texts, tokenizer, folder, show=False)
        print(f"{shards.num_documents:,} documents, {shards.num_tokens:,} tokens, vocabulary 4096\n")
        print("| T | nanochat: cropped away | ours: lost | ours: bos added |\n|---|---|---|---|")
        for T in (256, 1024, 2048):
            print(f"| {T} | {cropped_by_nanochat(shards, T):.1%} | 0% | {added_by_ours(shards, T):.2%} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
