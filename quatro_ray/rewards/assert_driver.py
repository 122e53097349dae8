"""Runs a program, then tests in the program's namespace, then prints a token as proof that both ran to their ends.

This file is a program of its own, run in the sandbox. Standard input holds three parts, each preceded by its length in
ten digits: the program, the tests, the token. The program sees an empty standard input, and its output is discarded. A
program that exits early, in whatever way, prints no token.

Not defended against: program and tests have to share one interpreter. A program written against this file can find the
descriptor and read the token ahead, and a program can return objects that are equal to everything.
"""


def main() -> None:
    """Run the program and then the tests from standard input, and print the token if neither raised or exited."""
    import os
    import sys

    # These names stay as they are, whatever the program does later to the modules and to builtins.
    read, write, leave, build, execute, length = os.read, os.write, os._exit, compile, exec, int

    def take(num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            data += read(source, num_bytes - len(data)) or leave(1)
        return data

    source, results, null = os.dup(0), os.dup(1), os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    module = type(sys)("program")  # not __main__: code under `if __name__ == "__main__"` is not tested
    sys.modules["program"] = module
    execute(build(take(length(take(10))), "program.py", "exec"), module.__dict__)
    execute(build(take(length(take(10))), "tests.py", "exec"), module.__dict__)
    write(results, take(length(take(10))))
    leave(0)  # skips the program's exit handlers, and does not wait for its threads


main()
