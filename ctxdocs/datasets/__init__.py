"""Data for training and evaluation: JSON lines of documents and of questions about contexts.

:func:`read_records` reads files in order, :func:`stream_records` shuffles them by a seed and goes on where it was
stopped, :func:`split_of` says which titles are held out, and :func:`mix_contexts` puts distractors beside contexts.
"""

from ctxdocs.datasets.mixing import ContextPool, mix_contexts
from ctxdocs.datasets.reading import Skipped, read_records, write_records
from ctxdocs.datasets.records import Document, Question, Record, record_id
from ctxdocs.datasets.splits import SPLITS, Split, split_of, split_title
from ctxdocs.datasets.streaming import stream_records

__all__ = [
    "SPLITS",
    "ContextPool",
    "Document",
    "Question",
    "Record",
    "Skipped",
    "Split",
    "mix_contexts",
    "read_records",
    "record_id",
    "split_of",
    "split_title",
    "stream_records",
    "write_records",
]
