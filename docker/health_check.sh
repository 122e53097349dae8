#!/bin/sh
# The health check of Docker and Podman; KubeRay has probes of its own. A container with a raylet (`ray start`, or a run
# that starts its own cluster) is healthy if the raylet answers; any other is healthy.
pgrep -f 'raylet/raylet ' >/dev/null || exit 0
wget --no-proxy -q -t 1 -T 5 -O - http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success
