"""`mm demo`: three instances, real models, more of them than memory holds, checked answers.

Each noun has a file: ``zoo`` (which models), ``training`` (making them), ``capacity`` (how much
memory the instances get), ``processes`` and ``cluster`` (what is started and killed), ``traffic``
and ``tally`` (calls and what became of them), ``statistics`` (what the instances say), ``view``
(while it runs), ``summary`` (verdict), ``paste`` (calls to copy), ``run`` (the order of it all).
"""
