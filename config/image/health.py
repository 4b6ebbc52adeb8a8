"""The health check of the image, for Docker and Podman: exits with 0 while `/live` answers 200.

Kubernetes has probes of its own and never runs it. It asks where the instance listens: at
``MM_PROBE_PORT`` of ``MM_BIND_HOST``, as they stand in the container's environment. Without a
listener to ask (``MM_PROBE_PORT=NONE``) there is nothing to find fault with. Uses nothing but
Python's own library, because it runs every half minute.
"""

from __future__ import annotations

import http.client
import os
import sys

#: Less than the health check may take, so that the reason is told and not "killed".
TIMEOUT_S = 4.0


def main() -> int:
    """Ask; answer the exit code."""
    port = (os.environ.get("MM_PROBE_PORT") or "8089").strip()
    if port.upper() == "NONE":
        return 0
    # All addresses, the default, are reached by the one that stands for them.
    host = (os.environ.get("MM_BIND_HOST") or "127.0.0.1").strip()
    try:
        connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
        connection.request("GET", "/live")
        status = connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException) as exc:
        print(f"health.py: no answer from {host}, port {port}: {exc}", file=sys.stderr)
        return 1
    print(f"/live: {status}")
    return 0 if status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
