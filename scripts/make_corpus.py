"""Make a text corpus and a byte-level BPE tokenizer from files that this machine already has, without a download.

    python scripts/make_corpus.py outputs/demo                              # from Python's standard library
    python scripts/make_corpus.py /data/code --source /usr/lib/python3 --limit 120_000_000

writes DEST/corpus/data.jsonl, one `{"text": ...}` a line, for `training.dataset = "c4_test"` with
`training.dataset_path = "DEST/corpus"`, and DEST/tokenizer for `model.hf_assets_path`. The same sources give the same bytes.
"""

import argparse
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
VOCABULARY_SIZE = 2048  # of torchtitan's debug models
DEFAULT_LIMIT = 12_000_000
TOKENIZER_SAMPLE = 2_000_000
SUFFIXES = {".py", ".pyi", ".rst", ".txt", ".md"}
# Tests, tables and third-party trees: large, and hardly text.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
SHORTEST, LONGEST = 500, 1_000_000
PIECE = 500


def files(source: Path) -> list[Path]:
    """The text files under a folder, in an order that is random but depends on their names alone."""
    paths = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix in SUFFIXES
        and not SKIPPED_FOLDERS.intersection(path.relative_to(source).parts)
        and path.is_file()
    ]
    random.Random(0).shuffle(paths)
    return paths


def pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces that end with the line in which they reach 500 characters."""
    piece, length = [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= PIECE:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def make_corpus(dest: Path, source: Path, limit: int) -> int:
    """Write the texts under `source`, in shuffled pieces, to DEST/corpus/data.jsonl.

    Pieces of many files in each batch keep the loss curve smooth.

    Args:
        source: a folder, searched recursively; files shorter than 500 or longer than 1,000,000 characters are left out.
        limit: number of characters at which no further file is read.
    Returns:
        The number of characters written.
    Raises:
        ValueError: there is no text under `source`.
    """
    corpus, total = [], 0
    for path in files(source):
        if total >= limit:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        if SHORTEST <= len(text) <= LONGEST:
            corpus.extend(pieces(text))
            total += len(text)
    if not corpus:
        raise ValueError(
            f"source = {str(source)!r}, limit = {limit}: found no text; name a folder with files of {SHORTEST:,} to "
            f"{LONGEST:,} characters that end in {', '.join(sorted(SUFFIXES))}, and a limit above 0"
        )
    random.Random(0).shuffle(corpus)
    path = dest / "corpus" / "data.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for text in corpus:
            out.write(json.dumps({"text": text}) + "\n")
    return total


def make_tokenizer(dest: Path) -> None:
    """Train a byte-level BPE tokenizer of 2,048 tokens on the head of DEST/corpus/data.jsonl; write DEST/tokenizer."""
    sample, taken = [], 0
    with (dest / "corpus" / "data.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            sample.append(json.loads(line)["text"])
            taken += len(sample[-1])
            if taken >= TOKENIZER_SAMPLE:
                break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    folder = dest / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make(dest: Path, source: Path | None = None, limit: int = DEFAULT_LIMIT) -> int:
    """Write corpus and tokenizer under `dest`; returns the number of characters.

    Args:
        source: folder to take the texts from; None is the running Python's standard library.
        limit: see `make_corpus`.
    """
    total = make_corpus(dest, source or Path(sysconfig.get_path("stdlib")), limit)
    make_tokenizer(dest)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder that receives corpus/ and tokenizer/")
    parser.add_argument("--source", type=Path, help="folder to take texts from (default: Python's standard library)")
    parser.add_argument("--limit", type=int, default=DEFAULT_LIMIT, help="characters, roughly (default: %(default)s)")
    args = parser.parse_args()
    try:
        print(f"{args.dest}: {make(args.dest, args.source, args.limit):,} characters")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
