"""The outside world on asyncio: gRPC, etcd, runtimes; the only layer that knows their formats."""
