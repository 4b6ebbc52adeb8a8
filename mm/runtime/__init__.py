"""For people who write model runtimes: a base class and ready-made runtimes."""
