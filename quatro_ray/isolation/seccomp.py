"""The seccomp filter for bubblewrap: system calls that are refused to a sandboxed program.

Namespaces and limits do most of the isolation. The filter closes what they leave open:

- memory of the kernel that no limit of a process counts: System V memory and queues, extended attributes, files without
  a name, watches, larger buffers of sockets, and descriptors that are sent through a socket;
- sockets of all families but AF_UNIX, some of which no namespace covers (AF_VSOCK reaches the host of a machine);
- parts of the kernel that no scored program needs (ptrace, keys, bpf, io_uring, mounts).

A refused call fails with EPERM. Sockets of AF_UNIX are left because asyncio needs a pair of them.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct

from quatro_ray.errors import SandboxError

# name: (x86_64, aarch64), from the kernel's tables of system calls.
_REFUSED = {
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "memfd_create": (319, 279), "inotify_add_watch": (254, 27), "fanotify_init": (300, 262),
    "setsockopt": (54, 208), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "unshare": (272, 97), "setns": (308, 268),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116),
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # x86_64 has a second set of numbers for the same calls, from here on
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16  # in struct seccomp_data; both are little-endian
_SOCKET = {"x86_64": 41, "aarch64": 198}
_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def seccomp_filter(machine: str | None = None) -> bytes:
    """Return the filter in the kernel's classic BPF.

    Args:
        machine: "x86_64" or "aarch64"; the processor of this machine by default.

    Raises:
        SandboxError: the processor is another one.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        raise SandboxError(f"the sandbox supports x86_64 and aarch64, not {machine}: run on another machine")
    column = list(_AUDIT_ARCH).index(machine)
    numbers = sorted(row[column] for row in _REFUSED.values())
    # Each jump goes to the last instruction, over the remaining tests and the instruction that allows the call.
    tests = [
        _instruction(_JUMP_AT_LEAST if number == _X32 else _JUMP_EQUAL, number, if_true=len(numbers) - i + 1)
        for i, number in enumerate([_X32, *numbers])
    ]
    return b"".join(
        [
            _instruction(_LOAD, _ARCH_OFFSET),
            _instruction(_JUMP_EQUAL, _AUDIT_ARCH[machine], if_true=1),
            _instruction(_RETURN, _KILL),
            _instruction(_LOAD, _NUMBER_OFFSET),
            _instruction(_JUMP_EQUAL, _SOCKET[machine], if_false=4),
            _instruction(_LOAD, _FIRST_ARGUMENT_OFFSET),  # the family, an int
            _instruction(_JUMP_EQUAL, socket.AF_UNIX, if_false=1),
            _instruction(_RETURN, _ALLOW),
            _instruction(_RETURN, _REFUSE),
            *tests,
            _instruction(_RETURN, _ALLOW),
            _instruction(_RETURN, _REFUSE),
        ]
    )
