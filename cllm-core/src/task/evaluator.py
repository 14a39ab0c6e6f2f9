# Makes a program of an answer and of its tests, and the surroundings that the official evaluator of
# HumanEval gives them. This runs in the sandbox before the answer does, so that Python itself says
# what is Python; it runs nothing of the answer.
import ast
import builtins
import faulthandler
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
# Expressions that may do something.
EFFECTS = (ast.Call, ast.Await, ast.NamedExpr, ast.ListComp, ast.SetComp, ast.DictComp)
# A line that begins like this but belongs to no statement is broken code. Any other is prose.
DEFINITION_LINE = re.compile(r"\s*((async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[(:]|@\w)")
CONTINUATION_LINE = re.compile(r"(elif|except)\b|(else|finally)\s*:")
BLANK_LINE = re.compile(r"\s*(#|$)")
# A function within a line of prose.
INLINE_CODE = re.compile(r"(`+)((?:async\s+)?def\s[^`\n]+)\1")
SESSION_LINE = re.compile(r"(>>>|\.\.\.)( |$)")
BUILTINS = set(dir(builtins))
NOT_PYTHON = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)


def prepare(text):
    """What the two processes of the harness run. The tests, and what stands beside the requested
    function in the prompt, are for the judge. It asks the program for the other names of the tests."""
    try:
        return plan(**json.loads(text))
    except NOT_PYTHON:
        raise SyntaxError from None


def plan(prompt, entry_point, tests, blocks, unfenced):
    module = ast.parse(tests)
    imports = [s for s in module.body if isinstance(s, (ast.Import, ast.ImportFrom))]
    answer = compose(prompt, entry_point, tests, blocks, unfenced)
    beside = prompt_statements(prompt, entry_point) if entry_point and compiles(prompt + "\n    pass\n") else []
    names = wanted_names(tests) | {entry_point} - {None}
    statements = answer if isinstance(answer, list) else ast.parse(answer).body
    return {
        "answer": [compile_module(answer) if isinstance(answer, list) else compile(answer, "<string>", "exec")]
        # The answer finds what the tests import.
        + [compile_module(imports)] * bool(imports),
        "prompt": compile_module(beside),
        "tests": compile(tests, "<string>", "exec"),
        "names": names,
        "modules": set().union(*(imported_modules(statement, names) for statement in statements)),
    }


def imported_modules(statement, names):
    """What may be a module of what a statement imports under these names."""
    modules = set()
    for node in ast.walk(statement):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            wanted = [alias.name for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in names]
            parent = getattr(node, "module", None)
            modules.update(f"{parent}.{name}" if parent else name for name in wanted)
    return modules


def compile_module(statements):
    return compile(ast.fix_missing_locations(ast.Module(future_first(statements), [])), "<string>", "exec")


def compose(prompt, entry_point, tests, blocks, unfenced):
    """The program before its tests, as text or as statements. `blocks` are the fenced blocks of the
    answer, `unfenced` is the rest of it."""
    blocks = [(info, text) for info, text in blocks if text.strip()]
    if entry_point and not blocks and compiles(prompt + unfenced):
        return prompt + unfenced
    wanted = {entry_point} if entry_point else wanted_names(tests)
    read = [Source(text) for _, text in blocks]
    fenced = [source for source, (info, _) in zip(read, blocks) if is_python(info, source, wanted)]
    sources = [Source(unfenced), *fenced]
    if not any(source.defines(name) for source in sources for name in wanted):
        return prompt + continuation(sources)
    return prompt_statements(prompt, entry_point) + answer_statements(sources, wanted)


def compiles(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<string>", "exec")
        except NOT_PYTHON:
            return False
    return True


def wanted_names(tests):
    """The names that tests use and do not define: Python's own ones only if there is no other."""
    module = ast.parse(tests)
    names = loaded_names(module) - bound_names(module)
    return names - BUILTINS or names


def is_python(info, source, wanted):
    """Whether a block is meant as Python. A wrong language does not hide what is wanted."""
    language = info.strip("{. }").lower()
    return not language or language.startswith(("py", "ipy")) or any(map(source.defines, wanted))


def continuation(sources):
    """What continues the prompt: the last source that begins like the body of a function."""
    texts = [source.text for source in sources]
    bodies = [text for text in texts if text.lstrip("\r\n").startswith((" ", "\t"))]
    return bodies[-1] if bodies else "\n".join(texts[1:] or texts)


def prompt_statements(prompt, entry_point):
    """What stands beside the function that is to be completed: imports and helpers."""
    text = prompt if compiles(prompt) else prompt + "\n    pass\n"
    return [statement for statement in ast.parse(text).body if entry_point not in bound_names(statement)]


class Source:
    """Python code of an answer: a fenced block, or what stands outside of the blocks."""

    def __init__(self, text):
        self.text = text
        self.code, self.is_broken = python_part(text)
        self.statements = [s for s in ast.parse(self.code).body if not reads_as_prose(s)]
        self.bound = set().union(*map(defined_names, self.statements))
        is_import = lambda s: isinstance(s, (ast.Import, ast.ImportFrom))
        own = (defined_names(s) for s in self.statements if not is_import(s))
        self.imported = self.bound - set().union(*own)

    def defines(self, name):
        if not self.is_broken:
            return name in self.bound
        return re.search(rf"^\s*(async\s+def|def|class)\s+{re.escape(name)}\b", self.text, re.M) is not None

    def defines_itself(self, name):
        """`from solution import f` in an example defines no `f`."""
        return self.defines(name) and name not in self.imported

    def used_names(self):
        """The names that it takes from its surroundings."""
        import symtable

        used, tables = set(), [symtable.symtable(self.code, "<string>", "exec")]
        for table in tables:
            tables.extend(table.get_children())
            is_module = table.get_type() == "module"
            used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (is_module or s.is_global())}
        return used - self.bound - BUILTINS


def python_part(text):
    """The text if it is Python, or else its lines that are; and whether some code is lost."""
    session = without_session_prompts(text)
    for code in (text, textwrap.dedent(text), session):
        if compiles(code):
            return code, False
    code, rest = without_prose(session)
    if not any(map(DEFINITION_LINE.match, [*code.splitlines(), *rest])):
        code = "\n".join([code, *filter(compiles, (found[1] for found in INLINE_CODE.findall(text)))])
    return code, any(map(DEFINITION_LINE.match, rest))


def without_session_prompts(text):
    """The commands of an interactive session; another text stays as it is."""
    if not text.lstrip().startswith(">>>"):
        return text
    return "\n".join(line[4:] for line in text.splitlines() if SESSION_LINE.match(line))


def without_prose(text):
    """The lines of the statements in a text, and the lines that belong to none."""
    lines = text.splitlines()
    code, rest, first = [], [], 0
    while first < len(lines):
        end = statement_end(lines, first)
        indented = indented_code(lines, first) if end is None else []
        if indented:
            code.extend(indented)
            first += len(indented)
        elif end is None:
            rest.append(lines[first])
            first += 1
        else:
            code.extend(lines[first:end])
            first = end
    return "\n".join(code), rest


def indented_code(lines, first):
    """The lines of an indented block of Markdown without their indentation, if they are Python."""
    if not lines[first].startswith(("    ", "\t")) or (first and lines[first - 1].strip()):
        return []
    is_inside = lambda line: not line.strip() or line.startswith(("    ", "\t"))
    block = textwrap.dedent("\n".join(itertools.takewhile(is_inside, lines[first:])))
    return block.splitlines() if compiles(block) else []


def statement_end(lines, first):
    """The line after the statement that begins at a line; None if none does."""
    from codeop import compile_command

    for end in range(first + 1, len(lines) + 1):
        following = next((line for line in lines[end:] if not BLANK_LINE.match(line)), "")
        if following[:1].isspace() or CONTINUATION_LINE.match(following):
            continue
        try:
            if compile_command("\n".join(lines[first:end]) + "\n", symbol="exec") is not None:
                return end
        except NOT_PYTHON:
            return None
    return None


def reads_as_prose(statement):
    """`Done` and `Output: 3` are Python, too."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is None
    return isinstance(statement, ast.Expr) and not isinstance(statement.value, EFFECTS)


def bound_names(node):
    """The names that a statement of a module gives a value."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    return set().union(*map(bound_names, ast.iter_child_nodes(node)))


def defined_names(statement):
    """The names that a statement defines: `f = cached(f)` wraps what is defined elsewhere."""
    if isinstance(statement, ast.AugAssign):
        return set()
    names = bound_names(statement)
    return names - loaded_names(statement) if isinstance(statement, ast.Assign) else names


def loaded_names(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def answer_statements(sources, wanted):
    """The last source that defines what is wanted, and what it needs of the others."""
    some = [source for source in sources if any(map(source.defines, wanted))]
    some = [source for source in some if any(map(source.defines_itself, wanted))] or some
    main = ([source for source in some if all(map(source.defines, wanted))] or some)[-1]
    if main.is_broken:
        raise SyntaxError
    helpers, needed, found = set(), main.used_names() | (wanted - main.bound), {main}
    while found:
        others = (source for source in sources if source is not main and not source.is_broken)
        found = {source for source in others if source.bound & needed} - helpers
        helpers |= found
        needed = needed.union(*(source.used_names() for source in found))
    statements = []
    for source in sources:
        is_helper = source in helpers
        kept = lambda s: source is main or changes_language(s) or (is_helper and is_help(s, main, wanted))
        statements += filter(kept, source.statements)
    return statements


def changes_language(statement):
    """Imports whose effect no name shows."""
    if not isinstance(statement, ast.ImportFrom):
        return False
    is_star = statement.names[0].name == "*"
    return statement.module == "__future__" or (is_star and is_installed(statement.module))


def is_installed(module):
    """Whether a module is there: examples import from files that nobody wrote."""
    import importlib.util

    return module is not None and importlib.util.find_spec(module.partition(".")[0]) is not None


def is_help(statement, main, wanted):
    """Whether a statement outside of the main source is more than an older version or an example."""
    names = bound_names(statement)
    if names and names <= main.bound:
        return False
    return isinstance(statement, DEFINITIONS) or not loaded_names(statement) & (wanted | {"print", "input"})


def future_first(statements):
    """With the imports at the top that Python wants there."""
    features, others = set(), []
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
            features.update(alias.name for alias in statement.names)
        else:
            others.append(statement)
    first = ast.ImportFrom("__future__", [ast.alias(name) for name in sorted(features)], 0, lineno=1, col_offset=0)
    return [first, *others] if features else others


# What the official evaluator takes away.
REMOVED = {
    builtins: "exit quit help",
    os: "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace"
    " unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    shutil: "rmtree move chown",
    subprocess: "Popen",
}
REMOVED_MODULES = ("ipdb", "joblib", "resource", "psutil", "tkinter")


class FolderForMultiprocessing:
    """The official evaluator has imported `multiprocessing` before it takes away `os.getcwd`, which
    that asks once. Here most programs do not need it, so it still finds the function when it is
    imported."""

    getcwd = staticmethod(os.getcwd)

    def find_spec(self, name, path, target=None):
        os.getcwd = self.getcwd if name == "multiprocessing.process" else None


class WriteOnly(io.StringIO):
    """All three streams of the official evaluator."""

    def refuse(self, *_arguments, **_options):
        raise OSError

    read = readline = readlines = refuse

    def readable(self, *_arguments, **_options):
        return False


def guard():
    """Gives the program the surroundings of the official evaluator; the sandbox needs none of it."""
    # It looks for a folder once, by functions that are removed below.
    tempfile.gettempdir()
    faulthandler.disable()
    os.environ["OMP_NUM_THREADS"] = "1"
    for owner, names in REMOVED.items():
        for name in names.split():
            setattr(owner, name, None)
    for module in REMOVED_MODULES:
        sys.modules[module] = None
    sys.meta_path.insert(0, FolderForMultiprocessing())
    sys.stdin = sys.stdout = sys.stderr = WriteOnly()
