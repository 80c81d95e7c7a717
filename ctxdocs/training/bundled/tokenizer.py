"""The bundled model's tokenizer: byte-level BPE, trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ctxdocs.prompts import PromptFormat

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

DOCUMENT = "<|document|>"
QUESTION = "<|question|>"
ANSWER = "<|answer|>"
END = "<|end|>"
PADDING = "<|padding|>"
#: Their ids are 0 to 4, in this order.
SPECIAL_TOKENS = (DOCUMENT, QUESTION, ANSWER, END, PADDING)

#: How a library asks the bundled model: a source that is read as text is closed by the end token.
PROMPT_FORMAT = PromptFormat(
    template=f"{{sources}}{QUESTION} {{question}}{ANSWER}",
    text=f"{{source}}{END}",
    stop=(DOCUMENT, QUESTION),
    answer_end=END,
)
#: Summary vectors run through the layers like text, and are closed like text.
VECTORS_PROMPT_FORMAT = replace(PROMPT_FORMAT, memory=f"{{source}}{END}")


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train byte-level BPE; digits stand alone, so that numbers can be copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Wrap ``tokenizer.json`` for transformers."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        eos_token=END,
        pad_token=PADDING,
        extra_special_tokens=[DOCUMENT, QUESTION, ANSWER],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
