"""Child process: prepares the rows of a kind, then gives the same texts to the bare tokenizer.

Prints a JSON object: seconds of ``ours`` and of ``raw``, and the number of ``tokens``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

KINDS = ("text", "chat", "template")
"""Plain text; conversations by the prompt template chatml; the same by the tokenizer's own chat template."""
TURN = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


@dataclass(frozen=True)
class Request:
    """What a child does."""

    kind: str
    workers: int
    folder: str
    model: str

    @property
    def words(self) -> list[str]:
        """Its command line."""
        return [self.kind, str(self.workers), self.folder, self.model]

    @property
    def environment(self) -> dict[str, str]:
        """As many threads as workers; one for everything beside the tokenizer."""
        own = {"RAYON_NUM_THREADS": str(self.workers), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        return {**os.environ, **own}


def write_rows(source: Path, folder: Path, count: int) -> None:
    """``text.jsonl`` and ``chat.jsonl``: the rows of ``source`` again and again, no two of them the same.

    The texts that the tokenizer is to see by itself stand in ``text_raw.jsonl`` and ``chat_raw.jsonl``.
    """
    rows = json.loads(source.read_text(encoding="utf-8"))
    with contextlib.ExitStack() as files:
        plain, plain_raw, chat, chat_raw = (
            files.enter_context((folder / f"{name}.jsonl").open("w"))
            for name in ("text", "text_raw", "chat", "chat_raw")
        )
        for number, row in enumerate(itertools.islice(itertools.cycle(rows), count)):
            question = f"{number}. " + "\n".join(part for part in (row["instruction"], row["input"]) if part)
            turn = {"question": question, "answer": row["output"]}
            text = f"{question}\n{row['output']}"
            plain.write(json.dumps({"text": text}) + "\n")
            plain_raw.write(json.dumps(text) + "\n")
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": row["output"]},
            ]
            chat.write(json.dumps({"messages": messages}) + "\n")
            chat_raw.write(json.dumps(TURN.format(**turn)) + "\n")


def main() -> None:
    """Prepare, encode, tell."""
    request = Request(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
    rows = Path(request.folder) / f"{'text' if request.kind == 'text' else 'chat'}.jsonl"
    ours, tokens = _prepare(request, rows)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{request.model}/tokenizer.json")
    texts = _rendered(request.model, rows) if request.kind == "template" else _raw(rows)
    started = time.perf_counter()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    raw = time.perf_counter() - started
    encoded = sum(len(encoding.ids) for encoding in encodings)
    # The template's last line feed is not of any turn's answer, and may be left out.
    assert abs(encoded - tokens) <= 2 * len(texts), f"{encoded} tokens, but {tokens} were prepared"
    print(json.dumps({"ours": ours, "raw": raw * tokens / encoded, "tokens": tokens}))


def _raw(rows: Path) -> list[str]:
    raw_rows = rows.with_name(f"{rows.stem}_raw.jsonl")
    return [json.loads(line) for line in raw_rows.read_text(encoding="utf-8").splitlines()]


def _rendered(model: str, rows: Path) -> list[str]:
    """The conversations as the tokenizer's own chat template writes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    conversations = (json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines())
    return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]


def _prepare(request: Request, rows: Path) -> tuple[float, int]:
    """Seconds, as the command itself tells them, and tokens."""
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.data.preprocess import preprocess

    handler = "GeneralPretrainHandler" if request.kind == "text" else "OpenAIInstructionHandler"
    words = [
        *("--input", str(rows), "--output-prefix", f"{request.folder}/made_{request.kind}_{request.workers}"),
        *("--tokenizer-name-or-path", request.model, "--handler-name", handler),
        *("--workers", str(request.workers), "--overwrite"),
        *{"text": [], "chat": ["--prompt-type", "chatml"], "template": ["--hf-chat-template"]}[request.kind],
    ]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        summary = preprocess(parse("preprocess", words))
    line = next(line for line in told.getvalue().splitlines() if line.startswith("time"))
    rate = float(line.split()[2].replace(",", ""))
    return summary.tokens / rate, summary.tokens


if __name__ == "__main__":
    main()
