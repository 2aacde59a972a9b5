"""A slow link between the ranks of one machine: a network namespace of its own whose loopback has a token bucket.

Compute and wire time are both real and overlap really; only the wire is shared by both directions, so a rank that
sends and receives ``n`` bytes has ``2 n`` on it.
"""

from __future__ import annotations

import subprocess

NAMESPACE = ("unshare", "--map-root-user", "--net")
"""What a command line begins with that runs in a network namespace of its own."""
_BURST = 192 << 10
"""Bytes that pass at once after a pause; a packet of the loopback has up to 64 KiB."""


def why_not() -> str | None:
    """Why there can be no such link here; None where there can."""
    script = f"ip link set lo up && {' '.join(_command(1e9))}"
    try:
        ended = subprocess.run([*NAMESPACE, "sh", "-c", script], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None if ended.returncode == 0 else (ended.stderr.strip() or "unshare failed").splitlines()[-1]


def bring_up() -> None:
    """Makes the loopback of this namespace work, without a limit."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def limit(bytes_per_second: float | None) -> None:
    """Lets so many bytes a second pass, both directions together; None: as many as the machine can."""
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=False, capture_output=True)
    if bytes_per_second is not None:
        subprocess.run(_command(bytes_per_second), check=True)


def _command(bytes_per_second: float) -> list[str]:
    rate = f"rate {8 * bytes_per_second:.0f}bit burst {_BURST} latency 200ms"
    return f"tc qdisc add dev lo root tbf {rate}".split()
