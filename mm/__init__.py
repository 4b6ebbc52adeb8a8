"""mm: a distributed LRU cache for serving machine learning models.

One process (``mm serve``) runs beside each model runtime; together they form one cache over etcd.
The architecture is told in ``docs/architecture.md``, the words in ``docs/glossary.md``.
"""

__version__ = "0.1.0"
