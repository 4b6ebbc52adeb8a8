"""Pure decisions: no I/O, no clock, no logging, no global randomness; imports nothing of mesh or edge."""
