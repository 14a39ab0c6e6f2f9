# Runs a program that a model wrote inside the sandbox, and reports how it ended. There are two
# processes. That of the answer runs the program. That of the judge has what the program must not
# reach, the tests and the channel of the verdict; it asks the other for what the tests use of the
# program. Values of Python's plain types come as copies, so that the judge compares them itself.
# Other objects stay where they are, and what the tests do with them is asked for too.
#
# The argument is the filter of system calls that both put on themselves.
import gc

# What follows stays, so that looking for garbage in it would only take time.
gc.disable()

import builtins
import ctypes
import importlib
import io
import json
import marshal
import operator
import os
import pickle
import signal
import sys
import types

BINARY = "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor".split()
# What tests may do with an object of the program, besides calling it.
OPERATIONS = {
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in BINARY},
    **{
        f"__{name}__": getattr(operator, f"__{name}__")
        for name in "abs contains delitem eq ge getitem gt index invert le lt ne neg pos setitem".split()
    },
    **{
        f"__{function.__name__}__": function
        for function in (bool, complex, delattr, divmod, float, format, getattr, hash, int, iter, len, next, repr)
        + (reversed, round, setattr, str)
    },
    "__enter__": lambda value: value.__enter__(),
    "__exit__": lambda value, *_: value.__exit__(None, None, None),
}


def reflected(operation):
    return lambda right, left: operation(left, right)


OPERATIONS.update({f"__r{name}__": reflected(OPERATIONS[f"__{name}__"]) for name in [*BINARY, "divmod"]})


# Maximum bytes of a message.
MAX_BYTES = 1 << 30


class Pipe:
    """Messages between the two processes."""

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.read, self.write, self.end = os.read, os.write, os._exit

    def receive(self):
        count = int.from_bytes(self.read_exactly(8), "little")
        if count > MAX_BYTES:
            # The program wrote to this pipe.
            self.end(0)
        return self.read_exactly(count)

    def read_exactly(self, count):
        data = bytearray()
        while len(data) < count:
            more = self.read(self.source, min(count - len(data), 1 << 20))
            if not more:
                # The other process is gone.
                self.end(0)
            data += more
        return bytes(data)

    def send(self, data):
        data = len(data).to_bytes(8, "little") + data
        while data:
            try:
                data = data[self.write(self.target, data) :]
            except BrokenPipeError:
                self.end(0)


class Program(ctypes.Structure):
    """A filter of system calls, as `prctl` takes it."""

    _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_char_p)]


def restriction(calls):
    """A function after which there are no new processes."""
    prctl, program = ctypes.CDLL(None).prctl, Program(len(calls) // 8, calls)

    def restrict():
        if prctl(22, 2, ctypes.byref(program), 0, 0) != 0:
            os._exit(3)

    return restrict


class Answer:
    """The side of the program."""

    def __init__(self, pipe):
        self.pipe, self.namespace, self.objects = pipe, {}, {}
        # The program may replace all of Python's functions.
        self.type, self.base, self.run, self.id = type, BaseException, exec, id
        self.dumps, self.str, self.load_code = json.dumps, str, marshal.loads

    def serve(self):
        while True:
            try:
                reply = self.do(*self.load(self.pipe.receive()))
            except self.base as error:
                try:
                    text = self.str(error)[:1000]
                except self.base:
                    text = ""
                reply = ["x", self.type(error).__name__[:100], text]
            self.pipe.send(self.dumps(reply).encode())

    def load(self, data):
        unpickler = pickle.Unpickler(io.BytesIO(data))
        unpickler.persistent_load = self.find
        return unpickler.load()

    def find(self, name):
        kind, number = name
        return self.objects[number] if kind == "object" else lambda *arguments: self.call_back(number, arguments)

    def call_back(self, number, arguments):
        """Calls a function of the tests."""
        self.pipe.send(self.dumps(["f", number, self.encode(arguments)]).encode())
        is_value, value = self.load(self.pipe.receive())
        if not is_value:
            raise value
        return value

    def do(self, action, *arguments):
        if action == "run":
            self.run(self.load_code(arguments[0]), self.namespace)
            return None
        if action == "name":
            return self.encode(self.namespace[arguments[0]])
        if action != "call":
            return self.encode(OPERATIONS[action](*arguments))
        function, arguments, named = arguments
        before = [self.encode(argument) for argument in arguments]
        result = self.encode(function(*arguments, **named))
        after = [self.encode(argument) for argument in arguments]
        changes = [[index, new] for index, (old, new) in enumerate(zip(before, after)) if old != new]
        return ["u", result, changes] if changes else result

    def encode(self, value):
        """A value as JSON, with a letter for each type that JSON lacks."""
        try:
            return self.encode_plain(value)
        except RecursionError:
            return self.keep(value)

    def encode_plain(self, value):
        kind, encode = self.type(value), self.encode_plain
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            return value if -(2**60) < value < 2**60 else ["i", hex(value)]
        if kind is list:
            return ["l", [encode(item) for item in value]]
        if kind is tuple:
            return ["t", [encode(item) for item in value]]
        if kind is dict:
            return ["d", [[encode(key), encode(item)] for key, item in value.items()]]
        if kind is set or kind is frozenset:
            return ["s" if kind is set else "z", [encode(item) for item in value]]
        if kind is bytes or kind is bytearray:
            return ["b" if kind is bytes else "y", value.hex()]
        if kind is complex:
            return ["c", value.real, value.imag]
        if kind is range:
            return ["g", value.start, value.stop, value.step]
        if kind is types.ModuleType:
            return ["m", value.__name__]
        return self.keep(value)

    def keep(self, value):
        number = self.id(value)
        self.objects[number] = value
        return ["r", number]


class Remote:
    """An object of the program, as the tests see it."""

    __slots__ = ("_judge", "_number")

    def __init__(self, judge, number):
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments, **named):
        return self._judge.call(self, arguments, named)


def forwarded(name):
    return lambda self, *arguments: self._judge.ask(name, self, *arguments)


for name in OPERATIONS:
    setattr(Remote, name, forwarded(name))


class Judge:
    """The side of the tests."""

    def __init__(self, pipe):
        self.pipe, self.remotes, self.functions, self.namespace = pipe, {}, {}, {}
        self.decoders = {
            "i": lambda text: int(text, 16),
            "l": lambda items: [self.decode(item) for item in items],
            "t": lambda items: tuple(self.decode(item) for item in items),
            "d": lambda items: {self.decode(key): self.decode(item) for key, item in items},
            "s": lambda items: {self.decode(item) for item in items},
            "z": lambda items: frozenset(self.decode(item) for item in items),
            "b": bytes.fromhex,
            "y": bytearray.fromhex,
            "c": complex,
            "g": range,
            # The program may give any name, but only the modules of its plan are there.
            "m": sys.modules.__getitem__,
            "r": lambda number: self.remotes.setdefault(number, Remote(self, number)),
        }

    def ask(self, *request):
        self.send(request)
        while True:
            reply = json.loads(self.pipe.receive())
            if not (isinstance(reply, list) and reply[0] == "f"):
                break
            self.send(self.answer_call(*reply[1:]))
        if isinstance(reply, list) and reply[0] == "x":
            raise exception(*reply[1:])
        if isinstance(reply, list) and reply[0] == "u":
            self.change(request, reply[2])
            reply = reply[1]
        return self.decode(reply)

    def call(self, function, arguments, named):
        return self.ask("call", function, arguments, named)

    def change(self, request, changes):
        """Gives the arguments of a call the content that the function left in them."""
        for index, new in changes:
            old, new = request[2][index], self.decode(new)
            if type(old) in (list, bytearray):
                old[:] = new
            elif type(old) in (dict, set):
                old.clear()
                old.update(new)

    def answer_call(self, number, arguments):
        try:
            return True, self.functions[number](*self.decode(arguments))
        except Exception as error:
            return False, error

    def send(self, message):
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        pickler.persistent_id = self.name_of
        pickler.dump(message)
        self.pipe.send(buffer.getvalue())

    def name_of(self, value):
        if type(value) is Remote:
            return "object", value._number
        if type(value) is types.FunctionType:
            self.functions[id(value)] = value
            return "function", id(value)
        return None

    def decode(self, value):
        return self.decoders[value[0]](*value[1:]) if type(value) is list else value

    def run(self, plan):
        """Returns if the program passes."""
        # Before the program can leave files, since some modules read or run these.
        for name in plan["modules"]:
            try:
                importlib.import_module(name)
            except ImportError:
                pass
        for code in plan["answer"]:
            self.ask("run", marshal.dumps(code))
        exec(plan["prompt"], self.namespace)
        for name in plan["names"] - self.namespace.keys():
            try:
                self.namespace[name] = self.ask("name", name)
            except KeyError:
                pass
        exec(plan["tests"], self.namespace)


def exception(name, text):
    """What the program raised, as the tests would see it."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, BaseException):
        try:
            return kind(text)
        except TypeError:
            pass
    return type(name, (Exception,), {})(text)


def without_tests(program):
    nothing = compile("", "<string>", "exec")
    return {"answer": [compile(program, "<string>", "exec")], "prompt": nothing, "tests": nothing, "names": set(), "modules": set()}


def verdict(judge, prepare, text):
    try:
        judge.run(prepare(text))
    except AssertionError:
        return b"assertion"
    except MemoryError:
        return b"memory"
    except BaseException as error:
        return b"error " + type(error).__name__.encode()[:100]
    return b"passed"


def main():
    restrict = restriction(bytes.fromhex(sys.argv.pop()))
    os.closerange(3, 65536)
    source, channel = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    given = Pipe(source, None)
    read_text = lambda: given.read_exactly(int(given.read_exactly(20))).decode()
    preparation, prepare = read_text(), without_tests
    fork, end = os.fork, os._exit
    requests, replies = os.pipe(), os.pipe()
    if preparation:
        trusted = {}
        exec(marshal.loads(bytes.fromhex(preparation)), trusted)
        prepare = trusted["prepare"]
        trusted["guard"]()
    # Nobody waits for the judge, and what is there already needs no copy in the other process.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    gc.enable()
    if fork():
        for descriptor in (source, channel, requests[1], replies[0]):
            os.close(descriptor)
        answer = Answer(Pipe(requests[0], replies[1]))
        restrict()
        answer.serve()
    for descriptor in (requests[0], replies[1]):
        os.close(descriptor)
    restrict()
    # The program can write to its folder, from which nothing may be imported here.
    sys.path[:] = filter(None, sys.path)
    judge = Judge(Pipe(replies[0], requests[1]))
    os.write(channel, verdict(judge, prepare, read_text()) + b"\n")
    end(0)


main()
