"""Programs that no sandbox may suffer from. Each prints SUCCESS only where its attack worked."""

# ruff: noqa: E501

PRELUDE = """
import ctypes, errno, glob, mmap, os, resource, select, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def won(): print("SUCCESS", flush=True)
def write(path):
    with open(path, "w") as file: file.write("x")
    won()
def call(name, *a):
    if getattr(libc, name)(*a) >= 0: won()
    else: raise OSError(name)
"""

USES_UP = {
    "loop": "while True: pass",
    "loop_in_c": "sum(range(10**12))",
    "sleep": "time.sleep(1000)",
    "sleep_in_child": "subprocess.run(['sleep', '1000'])",
    "wait_on_stdin": "r, w = os.pipe(); os.read(r, 1)",
    "ignore_sigterm": "for s in range(1, 64):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass",
    "catch_sigxcpu": "signal.signal(signal.SIGXCPU, lambda *a: None)\nwhile True: pass",
    "raise_own_limits": "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000)); won()\nwhile True: pass",
    "stop_itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stop_group": "os.killpg(0, signal.SIGSTOP); time.sleep(100)",
    "deadlock": "l = threading.Lock(); l.acquire(); l.acquire()",
    "regex": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "huge_int": "x = 9 ** (9 ** 9)",
    "huge_int_text": "sys.set_int_max_str_digits(0); x = str(7 ** (7 ** 8))",
    "recursion": "def f(): f()\nf()",
    "recursion_without_limit": "sys.setrecursionlimit(10**9)\ndef f(n): return [f(n + 1)]\nf(0)",
    "nested_source": "import ast\ntry: ast.literal_eval('-' * 10**6 + '1')\nexcept SyntaxError: pass",
    "fork_bomb": "while True:\n  try: os.fork()\n  except OSError: pass",
    "fork_bomb_sleeping": "while True:\n  try:\n    if os.fork() == 0: time.sleep(1000)\n  except OSError: time.sleep(.01)",
    "fork_children_die": "while True:\n  if os.fork() == 0: os._exit(0)\n  os.wait()",
    "vfork_exec_bomb": "while True:\n  try: subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n  except OSError: pass",
    "shell_fork_bomb": "os.system(':(){ :|:& };:'); time.sleep(100)",
    "thread_bomb": "n = 0\nwhile n < 500:\n  threading.Thread(target=time.sleep, args=(1000,)).start(); n += 1\nwon()",
    "memory_bytes": "x = bytearray(2 << 30); won()",
    "memory_list": "x = []\nwhile True: x.append([0] * 1000)",
    "memory_string": "x = 'x'\nwhile True: x += x",
    "memory_mmap": "m = mmap.mmap(-1, 1 << 30); won()",
    "memory_many_maps": "k = [mmap.mmap(-1, 1 << 20) for _ in range(1000)]; won()",
    "memory_in_children": "for _ in range(6):\n  if os.fork() == 0:\n    x = b'x' * (60 << 20); time.sleep(100)\ntime.sleep(1.5)\nwon()",
    "memory_sysv": "i = libc.shmget(0, 64 << 20, 0o1600)\nif i >= 0: won()",
    "memory_memfd": "k = [os.memfd_create('x') for _ in range(4)]\nfor f in k: os.ftruncate(f, 1 << 30)\nwon()",
    "memory_queue": "i = libc.msgget(0, 0o1600)\nif i >= 0: won()",
    "memory_locked": "b = ctypes.create_string_buffer(1 << 20); call('mlock', b, 1 << 20)",
    "memory_sockets": (
        "def fill():\n"
        "  k = []\n"
        "  while True:\n"
        "    try:\n"
        "      k.append(socket.socketpair())\n"
        "      for s in k[-1]:\n"
        "        s.setblocking(False)\n"
        "        while s.send(bytes(1 << 16)): pass\n"
        "    except BlockingIOError: pass\n"
        "    except OSError: break\n"
        "  time.sleep(1.5)\n"
        "for _ in range(12):\n"
        "  if os.fork() == 0: fill()\n"
        "time.sleep(1.5); won()"
    ),
    "memory_sockets_in_flight": "a, b = socket.socketpair()\nfor _ in range(1000):\n  c, d = socket.socketpair(); socket.send_fds(a, [b'x'], [c.fileno(), d.fileno()])\nwon()",
    "memory_socket_buffer": "a, b = socket.socketpair(); a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24); won()",
    "memory_xattr": "open('/tmp/f', 'w'); os.setxattr('/tmp/f', 'user.x', bytes(60000)); won()",
    "memory_xattr_of_descriptor": "f = open('/tmp/f', 'w'); os.setxattr(f.fileno(), 'user.x', bytes(60000)); won()",
    "memory_watches": "f = libc.inotify_init1(0); call('inotify_add_watch', f, b'/usr', 0xfff)",
    "output_forever": "while True: print('x' * 10000)",
    "output_without_newlines": "while True: os.write(1, bytes(1 << 20))",
    "error_output_forever": "while True: os.write(2, b'e' * 65536)",
    "output_by_children": "for _ in range(5):\n  if os.fork() == 0: break\nwhile True: os.write(1, bytes(65536))",
    "big_file_tmp": "f = open('/tmp/f', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()\nwon()",
    "big_file_cwd": "f = open('f', 'wb'); os.ftruncate(f.fileno(), 1 << 40); won()",
    "big_file_fallocate": "f = open('f', 'wb'); os.posix_fallocate(f.fileno(), 0, 1 << 30); won()",
    "many_files": "for i in range(1000):\n  with open(f'f{i}', 'wb') as f: f.write(bytes(200 << 10))\nwon()",
    "many_descriptors": "k = [open('/dev/null') for _ in range(1000)]; won()",
    "many_pipes": "k = [os.pipe() for _ in range(1000)]; won()",
    "deep_folders": "while True:\n  os.mkdir('d'); os.chdir('d')",
    "core_dump": "os.abort()",
    "segfault": "ctypes.string_at(0)",
}  # fmt: skip

STAYS = {
    "daemon": "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)",
    "daemon_closed": "if os.fork() == 0:\n  os.setsid(); os.closerange(0, 64)\n  if os.fork() == 0: time.sleep(1000)",
    "daemon_ignores": "if os.fork() == 0:\n  signal.signal(15, signal.SIG_IGN); signal.signal(1, signal.SIG_IGN)\n  while True: time.sleep(9)",
    "daemon_renamed": "if os.fork() == 0:\n  os.setsid(); os.execv('/usr/bin/sleep', ['MARKER', '1000'])",
    "daemon_pdeathsig": "if os.fork() == 0:\n  libc.prctl(1, 0); os.setsid(); time.sleep(1000)",
    "daemon_stopped": "if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)",
    "daemon_spins": "if os.fork() == 0:\n  while True: pass",
    "daemon_nohup": "os.system('nohup setsid sleep 1000 MARKER >/dev/null 2>&1 &')",
    "daemon_refork": "if os.fork() == 0:\n  while True:\n    if os.fork(): os._exit(0)",
    "thread_left": "threading.Thread(target=time.sleep, args=(1000,)).start()",
}  # fmt: skip

WRITES = {
    f"write_{path.strip('/').replace('/', '_')}": f"write({path!r})"
    for path in (
        "/hostile", "/etc/hostile", "/etc/passwd", "/usr/hostile", "/usr/bin/python3", "/root/hostile", "/home/hostile",
        "/var/hostile", "/var/tmp/hostile", "/dev/hostile", "/dev/shm/hostile", "/dev/sda", "/dev/mem", "/box/hostile",
        "/box/program.py", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger",
        "/proc/1/oom_score_adj", "/proc/self/oom_score_adj", "/sys/hostile", "/run/hostile",
    )
} | {
    "write_project": "write('PROJECT/hostile')",
    "write_canary": "write('CANARY')",
    "write_venv": "write(sys.prefix + '/hostile')",
    "write_site_packages": "write([p for p in sys.path if p.endswith('site-packages')][0] + '/hostile.pth')",
    "write_stdlib": "write(os.__file__)",
    "symlink_out": "os.symlink('CANARY', '/tmp/l'); write('/tmp/l')",
    "symlink_folder_out": "os.symlink('/etc', '/tmp/e'); write('/tmp/e/hostile')",
    "symlink_root": "os.symlink('/proc/1/root', '/tmp/r'); write('/tmp/r/hostile')",
    "hard_link": "os.link('/usr/bin/env', '/tmp/env'); won()",
    "dot_dot": "write('../../../../../../var/tmp/hostile')",
    "proc_root": "write('/proc/1/root/var/tmp/hostile')",
    "proc_cwd": "if not os.path.samefile('/proc/1/cwd', '/tmp'): write('/proc/1/cwd/hostile')",
    "remove_everything": "os.system('rm -rf --no-preserve-root / 2>/dev/null')\nif not os.path.exists('/usr/bin/env'): won()",
    "remove_python": "import shutil; shutil.rmtree(sys.base_prefix); won()",
    "chmod": "os.chmod('/usr/bin/env', 0o4755); won()",
    "setuid_file": "import shutil; shutil.copy('/usr/bin/id', '/tmp/id'); os.chown('/tmp/id', 0, 0); won()",
    "mknod": "os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0)); won()",
    "read_disk": "open('/dev/vda', 'rb').read(1); won()",
}  # fmt: skip

READS = {
    f"read_{path.strip('/').replace('/', '_').replace('*', 'any')}": (
        f"for p in glob.glob({path!r}):\n  if open(p, 'rb').read(): won()\nopen({path!r})"
    )
    for path in (
        "/etc/shadow", "/etc/passwd", "/etc/hosts", "/etc/hostname", "/root/.ssh/*", "/root/.bashrc", "/root/.profile",
        "/home/*/.bashrc", "/var/log/*", "/proc/kcore", "/proc/kmsg", "/proc/1/mem", "/sys/kernel/*",
    )
} | {
    "read_canary": "open('CANARY').read(); won()",
    "read_project": "open('PROJECT/pyproject.toml').read(); won()",
    "list_root": "if len(os.listdir('/root')) > 1: won()",
    "list_home": "os.listdir('/home'); won()",
    "environ_of_all": "for p in glob.glob('/proc/[0-9]*/environ'):\n  if b'CANARY_VARIABLE' in open(p, 'rb').read(): won()",
    "own_environ": "if 'CANARY_VARIABLE' in os.environ or 'HOME' in os.environ: won()",
    "command_lines": "for p in glob.glob('/proc/[0-9]*/cmdline'):\n  if b'pytest' in open(p, 'rb').read(): won()",
    "mem_of_pid_1": "f = open('/proc/1/mem', 'rb'); f.seek(0x400000); f.read(1); won()",
    "open_descriptors": "for f in range(3, 64):\n  try:\n    if os.read(f, 1): won()\n  except OSError: pass",
    "root_of_pid_1": "if os.path.exists('/proc/1/root/var/tmp'): won()",
    "handle_of_root": "b = ctypes.create_string_buffer(256); m = ctypes.c_int(); b[0] = 128; call('name_to_handle_at', -100, b'/', b, ctypes.byref(m), 0)",
}  # fmt: skip

REACHES_OUT = {
    "tcp_loopback": "socket.create_connection(('127.0.0.1', PORT), 0.5); won()",
    "tcp_loopback_6": "socket.create_connection(('::1', PORT), 0.5); won()",
    "tcp_outside": "socket.create_connection(('192.0.2.1', 80), 0.5); won()",
    "udp_loopback": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(.3); s.sendto(b'x', ('127.0.0.1', PORT)); s.recv(1); won()",
    "udp_outside": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('192.0.2.1', 53)); won()",
    "name_service": "socket.getaddrinfo('localhost.example.com', 80); won()",
    "vsock": "s = socket.socket(40, socket.SOCK_STREAM); s.bind((0xffffffff, 5000)); won()",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); won()",
    "alg_socket": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET, 0); won()",
    "raw_socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); won()",
    "packet_socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW); won()",
    "unix_socket": "s = socket.socket(socket.AF_UNIX); s.connect('CANARY.sock'); won()",
    "unix_abstract": "s = socket.socket(socket.AF_UNIX); s.connect('\\0quatro-canary-MARKER'); won()",
    "interface_up": "os.system('ip link add d0 type dummy') == 0 and won()",
}  # fmt: skip

GAINS = {
    "ptrace_parent": "call('ptrace', 16, 1, 0, 0)",
    "ptrace_me": "call('ptrace', 0, 0, 0, 0)",
    "mount_tmpfs": "call('mount', b'none', b'/tmp', b'tmpfs', 0, 0)",
    "remount_root": "call('mount', b'none', b'/', 0, 32, 0)",
    "umount": "call('umount2', b'/proc', 2)",
    "unshare_user": "call('unshare', 0x10000000)",
    "unshare_mount": "call('unshare', 0x20000)",
    "clone_user": "n = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\nif libc.syscall(n, 0x10000000 | 17, 0, 0, 0, 0) >= 0: won()",
    "clone3_user": "a = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)\nif libc.syscall(435, a, 88) >= 0: won()",
    "setns": "f = os.open('/proc/1/ns/mnt', 0); call('setns', f, 0)",
    "bwrap_again": "if subprocess.run(['bwrap', '--unshare-user', '--ro-bind', '/', '/', 'true']).returncode == 0: won()",
    "chroot": "os.chroot('/tmp'); won()",
    "pivot_root": "call('syscall', 155, b'/tmp', b'/tmp')",
    "setuid": "os.setuid(0); won()",
    "setgid": "os.setgid(0); won()",
    "setgroups": "os.setgroups([0]); won()",
    "setuid_program": "if subprocess.run(['su', '-c', 'true'], stdin=subprocess.DEVNULL).returncode == 0: won()",
    "capability": "if int([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1], 16): won()",
    "write_uid_map": "write('/proc/self/uid_map')",
    "bpf": "call('syscall', 321, 0, 0, 0)",
    "keyring": "call('syscall', 248, b'user', b'k', b'v', 1, -3)",
    "io_uring": "b = ctypes.create_string_buffer(256); call('syscall', 425, 4, b)",
    "userfaultfd": "call('syscall', 323, 1)",
    "perf": "b = ctypes.create_string_buffer(128); call('syscall', 298, b, 0, -1, -1, 0)",
    "reboot": "call('reboot', 0)",
    "set_hostname": "socket.sethostname('hostile'); won()",
    "set_clock": "time.clock_settime(time.CLOCK_REALTIME, 0); won()",
    "nice_up": "os.nice(-20); won()",
    "real_time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)); won()",
    "terminal": "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x'); won()",
    "controlling_terminal": "open('/dev/tty').read(1); won()",
    "kill_pid_1": "os.kill(1, signal.SIGKILL); time.sleep(.2); won() if not os.path.exists('/proc/1') else None",
    "kill_all": "os.kill(-1, signal.SIGKILL); time.sleep(0.1)",
    "kill_group": "os.killpg(0, signal.SIGKILL)",
    "kill_canary": "os.kill(PID, signal.SIGKILL); won()",
    "kill_every_number": "for p in range(3, 40000):\n  try: os.kill(p, 9); won()\n  except ProcessLookupError: pass",
    "prlimit_of_others": "resource.prlimit(1, resource.RLIMIT_NOFILE, (1, 1)); won() if os.getpid() == 1 else None",
    "close_descriptors": "os.closerange(0, 64); time.sleep(0.1)",
    "write_to_stdin": "os.write(0, b'x'); won()",
    "status_forged": "for f in range(3, 64):\n  try: os.write(f, b'{ \"exit-code\": 0 }\\n'); won()\n  except OSError: pass",
    "i386_calls": "m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b8140000 00cd80c3'.replace(' ', ''))); f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nif f() > 0: won()",
    "x32_calls": "if libc.syscall(0x40000000 | 39) > 0: won()",
}  # fmt: skip

ATTACKS = USES_UP | STAYS | WRITES | READS | REACHES_OUT | GAINS
