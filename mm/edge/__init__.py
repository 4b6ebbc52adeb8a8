"""The outside world on asyncio: gRPC, etcd, runtimes. The only layer that knows wire formats and libraries."""
