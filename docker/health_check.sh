#!/bin/sh
# The health check of Docker and Podman; KubeRay has probes of its own. A container that is a node of a cluster, by
# `ray start`, is healthy if its raylet answers; one that runs a single command is as healthy as that command.
pgrep -f 'raylet/raylet ' >/dev/null || exit 0
wget -q -T 5 -O - http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success
