# Runs a program that a model wrote, inside the sandbox, and tells on a channel of its own how it ended.
# Everything used after the program ran is bound before: the program may replace builtins and functions of modules.
import os


def run(read, write, end, base, wrong, memory):
    os.closerange(3, 65536)
    source, channel = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)

    def take(count):
        found = b""
        while len(found) < count:
            piece = read(source, count - len(found))
            if not piece:
                end(1)
            found += piece
        return found

    program = take(int(take(20)))
    try:
        exec(compile(program, "answer", "exec"), {})
    except wrong:
        said = b"wrong"
    except memory:
        said = b"memory"
    except base as error:
        said = b"error " + type(error).__name__.encode()[:100]
    else:
        # The token comes last on the pipe, so that nothing in memory holds it while the program runs.
        said = b"passed " + take(32)
    write(channel, said + b"\n")
    end(0)


run(os.read, os.write, os._exit, BaseException, AssertionError, MemoryError)
