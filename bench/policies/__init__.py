"""Which model to evict: policies and streams of calls, replayed against each other.

Owns the comparison that decides ``MM_EVICTION``: generated streams (``streams``), the policies as
their papers describe them and the one of the table (``classic``, ``frequency``, ``ours``), a bound
that none can pass (``bound``), and the replay that counts what each of them costs (``replay``).
"""
