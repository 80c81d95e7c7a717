"""A self-check: whether a model reads memories as it reads text, and what composing and compressing cost on it.

``examine(compressor)`` runs a compressor without training on documents, the user's own or made-up ones, and reports
line by line. What must be exact is measured against the model's own rounding; what costs quality or time is measured
and reported.
"""

from ctxdocs.doctor.examination import examine
from ctxdocs.doctor.loading import examined
from ctxdocs.doctor.report import Check, Report

__all__ = ["Check", "Report", "examine", "examined"]
