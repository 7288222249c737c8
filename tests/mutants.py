"""How sharp the tests are: wrong lines of code that they notice.

    pip install coverage
    python tests/mutants.py contexts --output contexts.json               # which test reaches which line, once
    python tests/mutants.py run --contexts contexts.json --count 120 --output mutants.json

`contexts` runs the daily suite in one process under coverage. `run` draws a seeded sample of mutants (one changed expression
each, in a line of a function that a test reaches), and runs for each the tests that reach the line, the cheapest first, until
one fails. Called again it goes on. `--suite DIR --files` runs the same mutants against the files of the same names in another checkout.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TARGETS = ("basd/components", "basd/objective.py", "basd/training", "basd/grid", "analysis")
# what takes seconds to import, and is imported once for all mutants
HEAVY = ("torch", "timm", "torchvision", "torch._dynamo", "mlflow", "optuna", "pandas", "matplotlib.pyplot", "seaborn",
         "hydra", "sklearn.datasets", "scipy.stats", "hypothesis", "rich.console")  # fmt: skip
# seconds that a mutant's tests may take beside what they took without it: one that never ends is noticed too
PATIENCE = 120.0

# -- which test reaches which line -----------------------------------------------------------------------------------------


class Contexts:
    """A pytest plugin that tells coverage which test runs; what a setup reaches counts for every test of its file."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.process_time()

    def pytest_runtest_setup(self, item: Any) -> None:
        self.coverage.switch_context(f"setup {item.nodeid}")

    def pytest_runtest_call(self, item: Any) -> None:
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_teardown(self, item: Any) -> None:
        self.coverage.switch_context("")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.process_time() - self.seconds[nodeid]


def contexts(output: Path, words: list[str]) -> int:
    """Run the suite and write {"lines": {file: {line: [test, …]}}, "seconds": {test: CPU seconds}}."""
    import coverage
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        cover = coverage.Coverage(data_file=f"{folder}/data", source=[str(ROOT / "basd"), str(ROOT / "analysis")])
        plugin = Contexts(cover)
        cover.start()
        status = pytest.main(["-n0", "-q", "-p", "no:cacheprovider", *words], plugins=[plugin])
        cover.stop()
        data = cover.get_data()
        by_file = defaultdict(list)
        for test in plugin.seconds:
            by_file[test.split("::")[0]].append(test)
        lines: dict[str, dict[int, list[str]]] = {}
        for path in data.measured_files():
            name = Path(path).relative_to(ROOT).as_posix()
            lines[name] = {}
            for line, reached in data.contexts_by_lineno(path).items():
                tests: set[str] = set()
                for context in reached:
                    if context.startswith("setup "):
                        tests.update(by_file[context.removeprefix("setup ").split("::")[0]])
                    elif context:
                        tests.add(context)
                lines[name][line] = sorted(tests)
    output.write_text(json.dumps({"lines": lines, "seconds": plugin.seconds}))
    return int(status)


# -- mutants ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A changed expression: characters `start` to `end` of a file become `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def text(self) -> str:
        return f"{self.file}:{self.line}: {' '.join(self.old.split())[:60]} → {' '.join(self.new.split())[:60]}"


COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
            ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Add}  # fmt: skip
# words for people and types: a change there is no wrong behaviour that a test must notice
WORDS = (ast.Raise, ast.Assert, ast.JoinedStr, ast.AnnAssign, ast.arguments)


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one thing wrong."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        yield ast.Compare(node.left, [COMPARED[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        yield node.values[0]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        # x.detach() → x
        yield node.func.value
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))


def mutants_of(file: str, source: str, lines: set[int]) -> Iterator[Mutant]:
    """Every mutant inside a function, in these lines."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node: ast.AST, inside: bool) -> Iterator[Mutant]:
        if isinstance(node, WORDS) or (isinstance(node, ast.Expr) and ast.unparse(node).startswith("log.")):
            return
        if inside and getattr(node, "lineno", 0) in lines:
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            for other in changed(node):
                text = ast.unparse(ast.fix_missing_locations(other))
                new = text if isinstance(other, ast.stmt) else f"({text})"
                yield Mutant(file, node.lineno, start, end, source.encode()[start:end].decode(), new)
        function = isinstance(node, ast.FunctionDef)
        children = node.body if function else ast.iter_child_nodes(node)
        for child in children:
            yield from visit(child, inside or function)

    yield from visit(ast.parse(source), False)


def sample(lines: dict[str, dict[str, list[str]]], count: int, seed: int) -> list[Mutant]:
    found: list[Mutant] = []
    for file in sorted(lines):
        if file.startswith(TARGETS):
            reached = {int(line) for line, tests in lines[file].items() if tests}
            found += mutants_of(file, (ROOT / file).read_text(), reached)
    print(f"{len(found)} mutants in lines that tests reach")
    return random.Random(seed).sample(found, count)


# -- running ---------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    mutant: Mutant
    status: str  # caught, survived, timeout, broken
    tests: int
    seconds: float
    by: str = ""  # the test that failed


def copy_of(suite: Path, folder: Path) -> Path:
    """A checkout to be mutated, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=suite, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (suite / name).exists():
            shutil.copy2(suite / name, folder / name)
    return folder


def run_tests(tree: Path, tests: list[str], words: list[str], log: Path) -> int:
    """Start these tests of the tree in a child, which has the heavy imports already; its process id. It ends with pytest's status."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [
        str(tree),
        str(tree / "tests"),
        *(path for path in sys.path if str(ROOT) not in path or "venv" in path),
    ]
    import pytest

    words = [
        "-n0",
        "-x",
        "-q",
        "--timeout=120",
        "-p",
        "no:cacheprovider",
        f"--basetemp={log.with_suffix('.tmp')}",
        "--tb=line",
        *words,
    ]
    os._exit(int(pytest.main([*words, *tests])))


def by_file(tests: list[str], seconds: dict[str, float]) -> list[str]:
    """Cheap tests first; those of one file together, because they share what is set up."""
    cost: Counter[str] = Counter()
    for test in tests:
        cost[test.split("::")[0]] += seconds[test]
    return sorted(tests, key=lambda test: (cost[test.split("::")[0]], test.split("::")[0], seconds[test]))


def read(output: Path) -> list[dict[str, Any]]:
    """Outcomes of an earlier call, which is gone on with."""
    return json.loads(output.read_text()) if output.exists() else []


def write(output: Path, done: list[Outcome]) -> None:
    output.write_text(json.dumps([asdict(one) for one in done], indent=1))


def run(given: argparse.Namespace) -> int:
    known = json.loads(given.contexts.read_text())
    lines, seconds = known["lines"], known["seconds"]
    chosen = sample(lines, given.count, given.seed)[: given.first or None]
    suite = given.suite or ROOT
    for name in HEAVY:
        __import__(name)
    done = [Outcome(**{**one, "mutant": Mutant(**one["mutant"])}) for one in read(given.output)]
    known_mutants = {one.mutant for one in done}
    waiting, running = [(n, mutant) for n, mutant in enumerate(chosen) if mutant not in known_mutants], {}
    with tempfile.TemporaryDirectory() as scratch:
        trees = [copy_of(suite, Path(scratch) / f"tree{number}") for number in range(given.processes)]
        while waiting or running:
            while waiting and trees:
                number, mutant = waiting.pop(0)
                tests, tree = by_file(lines[mutant.file][str(mutant.line)], seconds), trees.pop()
                budget = PATIENCE + 4 * sum(seconds[test] for test in tests)
                if given.files:
                    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
                    tests, budget = [file for file in files if (suite / file).exists()], given.patience
                source = (suite / mutant.file).read_bytes()
                if source != (ROOT / mutant.file).read_bytes() or not tests:
                    done.append(Outcome(mutant, "broken", 0, 0.0, "the file differs there"))
                    write(given.output, done)
                    trees.append(tree)
                    continue
                mutated = source[: mutant.start] + mutant.new.encode() + source[mutant.end :]
                (tree / mutant.file).write_bytes(mutated)
                log = Path(scratch) / f"{number}.log"
                child = run_tests(tree, tests, given.words, log)
                running[child] = (mutant, tree, source, log, len(tests), time.monotonic(), budget)
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                for late, (*_, began, budget) in running.items():
                    if time.monotonic() - began > budget:
                        os.killpg(late, signal.SIGKILL)
                time.sleep(0.1)
                continue
            mutant, tree, source, log, tests, began, budget = running.pop(child)
            code, took = os.waitstatus_to_exitcode(status), time.monotonic() - began
            text = log.read_text(errors="replace")
            failed = next((line[7:120] for line in text.splitlines() if line.startswith(("FAILED", "ERROR "))), "")
            what = "survived" if code == 0 else "timeout" if code == -signal.SIGKILL else "caught"
            if code in (3, 4, 5):
                what, failed = "broken", text[-300:]
            (tree / mutant.file).write_bytes(source)
            shutil.rmtree(log.with_suffix(".tmp"), ignore_errors=True)
            trees.append(tree)
            done.append(Outcome(mutant, what, tests, round(took, 1), failed))
            write(given.output, done)
            print(f"{len(done):4d} {what:9s} {took:6.1f} s {tests:4d} tests  {mutant.text}  {failed}", flush=True)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in done:
        place = next(target for target in TARGETS if one.mutant.file.startswith(target))
        for where in (place, "all"):
            counts[where]["noticed" if one.status in ("caught", "timeout") else one.status] += 1
    for where, count in counts.items():
        total = count["noticed"] + count["survived"]
        print(f"{where:20s} {count['noticed']:4d} of {total} noticed, {count['broken']} could not be run")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("contexts")
    one.add_argument("--output", type=Path, required=True)
    two = commands.add_parser("run")
    two.add_argument("--contexts", type=Path, required=True)
    two.add_argument("--output", type=Path, required=True)
    two.add_argument("--count", type=int, default=120)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--first", type=int, help="only the first of the sample")
    two.add_argument("--processes", type=int, default=2)
    two.add_argument("--suite", type=Path, help="another checkout, whose tests and sources are used")
    two.add_argument("--files", action="store_true", help="whole files in place of single tests")
    two.add_argument("--patience", type=float, default=900.0, help="seconds for a mutant with --files")
    for each in (one, two):
        each.add_argument("words", nargs="*", help="further words for pytest, after --")
    given = parser.parse_args()
    return contexts(given.output, given.words) if given.command == "contexts" else run(given)


if __name__ == "__main__":
    raise SystemExit(main())
