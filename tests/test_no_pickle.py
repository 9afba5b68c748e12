"""The law that no file can run code: nothing unpickles, evaluates or builds objects by name out of what it reads."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("t5pegasus", "launch", "growth")
FORBIDDEN_MODULES = {"dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
OF_PICKLE = {"load", "loads", "Unpickler"}
OWN_CHILD = ("growth/verify.py",)
"""It sends a request to a process that it starts itself, and reads the answer, through pipes and no file."""


def dotted(node: ast.expr) -> str:
    """`np.load` of the expression np.load."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted(node.value)}.{node.attr}"
    return ""


def find_dangers(source: str) -> list[str]:
    """What could turn a file's content into code, by line."""
    dangers = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                imported = [alias.name.partition(".")[0] for alias in node.names]
            case ast.ImportFrom():
                imported = [(node.module or "").partition(".")[0]]
                if imported == ["pickle"]:
                    imported = [f"pickle.{alias.name}" for alias in node.names]
            case _:
                imported = []
        dangers += [f"{node.lineno}: import {name}" for name in imported if name in FORBIDDEN_MODULES]
        dangers += [f"{node.lineno}: import {name}" for name in imported if name.removeprefix("pickle.") in OF_PICKLE]
        if isinstance(node, ast.Call):
            name, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            module, _, function = name.rpartition(".")
            allowed = keywords.get("allow_pickle")
            is_danger = (
                (not module and name in FORBIDDEN_CALLS)
                or (module in ("pickle", "_pickle") and function in OF_PICKLE)
                or (module == "yaml" and function != "safe_load")
                or (module == "torch" and function == "load")
                or (allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False))
                or "trust_remote_code" in keywords
            )
            if is_danger:
                dangers.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.ClassDef) and any("Unpickler" in dotted(base) for base in node.bases):
            dangers.append(f"{node.lineno}: class {node.name}")
    return dangers


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_that_is_read_can_run_code(package):
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    found = {}
    for file in files:
        name = file.relative_to(REPOSITORY).as_posix()
        if name not in OWN_CHILD and (dangers := find_dangers(file.read_text(encoding="utf-8"))):
            found[name] = dangers
    assert found == {}


@pytest.mark.parametrize("name", OWN_CHILD)
def test_what_is_let_through_does_no_more_than_it_may(name):
    dangers = find_dangers((REPOSITORY / name).read_text(encoding="utf-8"))
    assert {danger.split(": ")[1] for danger in dangers} == {"pickle.load", "pickle.loads"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)", "from pickle import loads", "import torch",
        "np.load(path, allow_pickle=True)", "yaml.load(text)", "eval(text)",
        "class Reader(pickle.Unpickler): pass", "f(trust_remote_code=True)",
        "np.load(path, allow_pickle=flag)", "import dill", "exec(text)",
    ],
)  # fmt: skip
def test_each_danger_is_seen(source):
    assert find_dangers(source)


def test_what_is_harmless_is_not():
    assert not find_dangers("np.load(path, allow_pickle=False)\nyaml.safe_load(x)\nre.compile(x)\njson.load(f)")
