"""Pure decisions: no I/O, clock, logging or global chance; imports nothing of mesh or edge."""
